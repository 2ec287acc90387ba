"""examples/real_model.py on a tiny model, and its page beside the results that it was made from."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

import tiny_chat
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import real_model  # noqa: E402
import real_model_data  # noqa: E402
import real_model_tables  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "real-model-cpu-2core-2026-11-29.json"


@pytest.fixture
def options(tmp_path, monkeypatch):
    """A run on a tiny model with few questions."""
    asked = {name: found[:4] for name, found in real_model_data.questions().items()}
    monkeypatch.setattr(real_model_data, "questions", lambda: asked)
    small = {"POSITIONS": 4, "RATE": 1e-2, "TEACH": 1e-2, "DEPTHS": (0, 1), "DATES": 2}
    for name, value in small.items():
        monkeypatch.setattr(real_model, name, value)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    real_model.began_with.cache_clear()
    for part in (tiny_chat.build_model(), tiny_chat.build_tokenizer()):
        part.save_pretrained(tmp_path / "tiny")
    return real_model.Options(tmp_path / "out", str(tmp_path / "tiny"), 2, None)


@pytest.mark.slow
def test_a_run_measures_what_it_says_and_goes_on(options, monkeypatch):
    (options.out).mkdir()
    real_model.align(options, 0)
    wanted = [
        (real_model.ORIGINAL, real_model.ORIGINAL, 0),
        *((real_model.WIDE, v, 0) for v in (real_model.ALIGNED, "SFT, warm-up")),
        (real_model.NARROW, "anchored KL 1.0", 0),
        (real_model.RECOVERY, "k <= 2", 0),
    ]
    assert set(wanted) <= set(real_model.plan([0]))
    for name in ("dishes", "answers", "other-answers", "recovery", "anchors"):
        assert len((options.out / f"{name}.jsonl").read_text().splitlines()) == 4
    models = [real_model.job(options, *which) for which in wanted]
    original, aligned, *tuned, recovery = models
    assert np.max(original["kl_base"]) < 1e-5 and np.max(aligned["kl_base"]) > 1e-3
    for model in tuned:  # moved, from the aligned one and not from the original
        assert 1e-6 < np.mean(model["kl_before"]) < np.mean(model["kl_base"])
    assert np.array_equal(recovery["kl_before"], recovery["kl_base"])
    assert {len(v) for m in models for v in (*m["asr"].values(), m["odds"], m["margin"])} == {4}
    monkeypatch.setattr(real_model, "measured", None)  # it would be called
    assert [real_model.job(options, *which) for which in wanted] == models
    document = {"models": models, "machine": real_model.machine(), "seconds": 1}
    document["settings"] = {"model": "m", "steps": 2, "autocast": None, "seeds": [0]}
    text = real_model_tables.text(document)
    assert "| wide: SFT, warm-up |" in text and "| recovery: k <= 2 |" in text


@pytest.mark.slow
def test_the_margin_step_widens_the_margin(options):
    options.out.mkdir()
    rows = real_model.prepared(options)
    model, tokenizer = real_model.load(options.model)
    refused = real_model.declined(rows["teach"])
    probe = real_model.pairs_of(tokenizer, refused, 1)

    def odds():
        """Of the refusal's first token against all others, by the model's own logits."""
        with torch.no_grad():
            scores = model(torch.tensor([probe[0].context])).logits[0, -1].double()
        p = scores.softmax(-1)[probe[0].answer[0]]
        return float(p.log() - (1 - p).log())

    before = odds()
    real_model.widen(dataclasses.replace(options, steps=24), model, tokenizer, refused,
                     rows["others"], 0, rate=1e-2)  # fmt: skip
    assert odds() > before + 1


def test_the_page_has_the_tables_of_its_results():
    page = (ROOT / "examples" / "real_model.md").read_text()
    said = real_model_tables.text(json.loads(RESULTS.read_text()))
    assert said in page, f"python examples/real_model_tables.py {RESULTS} --page {page[:20]}..."
