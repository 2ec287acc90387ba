"""Analyses as runs: records, interruptions, the command; curves during training."""

import contextlib
import dataclasses
import json
import time

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="deepalign_kernels.analyze needs transformers")

import tiny_chat
from answer_pairs import draw_pairs

from deepalign_kernels import analyze, runs
from deepalign_kernels.analyze import run as module
from deepalign_kernels.analyze.dynamics import Dynamics
from deepalign_kernels.analyze.gradients import exact_norms
from deepalign_kernels.analyze.run import Settings, analyse
from deepalign_kernels.cli import main as cli

pytestmark = pytest.mark.clean_memory
SETTINGS = Settings(positions=6, gradients="all", gradient_examples=2, top=3, top_positions=2)


def models():
    return tiny_chat.build_model(0), tiny_chat.build_model(1)


def values_of(folder, name):
    return [r for r in runs.read_records(folder, "profile") if r.name == name]


def test_records_hold_what_the_functions_return(tmp_path):
    model, base = models()
    pairs, tokenizer, said = draw_pairs(250), tiny_chat.build_tokenizer(), []
    analyse(tmp_path / "a", model, base, tokenizer, pairs, SETTINGS, say=said.append)
    expected = analyze.profile(model, base, None, pairs, positions=8)
    records = values_of(tmp_path / "a", "profile")
    assert [r.cell["group"] for r in records] == ["odd", "even", "odd", "even"]
    for i, record in enumerate(records):
        assert set(record.data["values"]) == set(expected.metrics)
        for metric, got in record.data["values"].items():
            assert got == pytest.approx(getattr(expected, metric)[i, : len(got)], rel=1e-5)
    norms = exact_norms(model, pairs)
    assert [r.item for r in values_of(tmp_path / "a", "gradients")] == ["0", "2", "1", "3"]
    for record in values_of(tmp_path / "a", "gradients"):
        got, i = record.data["values"], int(record.item)
        assert np.allclose(got["layers"], norms.layers[i, : len(got["whole"])], 1e-5)
        assert np.allclose(got["whole"], norms.whole[i, : len(got["whole"])], 1e-5)
    terms = values_of(tmp_path / "a", "vocabulary")
    assert [(r.cell["group"], r.cell["position"]) for r in terms] == [
        ("odd", 1), ("odd", 2), ("even", 1), ("even", 2)
    ]  # fmt: skip
    assert len(terms[0].data["values"]["text"]) == 3
    firsts = values_of(tmp_path / "a", "first_token")
    for i, (record, pair) in enumerate(zip(firsts, pairs, strict=True)):
        with torch.no_grad():  # without a head of ours, hidden states or an op
            scores = model(torch.tensor([pair.context])).logits[0, -1].double()
        first, second = scores.topk(2).values
        assert record.cell["group"] == pair.group and record.item == f"{i}"
        assert record.data["values"]["odds"] == pytest.approx(float(first - second), rel=1e-4)
        behind = float(first - scores[pair.answer[0]])
        assert record.data["values"]["margin"] == pytest.approx(behind, rel=1e-4)
        assert record.data["values"]["margin"] == pytest.approx(expected.margin[i, 0], rel=1e-4)
        assert record.data["favourite"] == tokenizer.decode([int(scores.argmax())])
    assert "100 %, 0 s left" in said[-1]
    assert not (tmp_path / "a" / "work").exists()


@pytest.mark.parametrize("answers", ["given", "model", "base"])
def test_an_interrupted_run_goes_on_to_the_same_records(tmp_path, monkeypatch, answers):
    pairs, tokenizer = draw_pairs(250), tiny_chat.build_tokenizer()
    settings = dataclasses.replace(SETTINGS, answers=answers)
    call = (*models(), tokenizer, pairs, settings)
    analyse(tmp_path / "whole", *call, max_tokens=16)

    loaded, stops = [], 0
    for stop in range(1, 40):  # every forward and every unit, one after the other
        left = [stop]

        def counted(make, left=left):
            def run(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return make(*args, **kwargs)

            return run

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            for name in ("exact_norms", "profile_of", "sample_answers", "largest_terms"):
                patch.setattr(module, name, counted(getattr(module, name)))
            patch.setattr(torch, "save", counted(torch.save))
            loaders = [lambda i=i: loaded.append(i) or call[i] for i in (0, 1)]
            analyse(tmp_path / "cut", *loaders, *call[2:], max_tokens=16)
            break
        stops += 1
    assert stops >= 2 and not (tmp_path / "cut" / "work").exists()
    whole, cut = ((tmp_path / n / "records.jsonl").read_bytes() for n in ("whole", "cut"))
    assert whole == cut
    loaded.clear()
    analyse(tmp_path / "cut", *loaders, *call[2:], max_tokens=16)  # all is there: no model loaded
    assert not loaded


def test_other_weights_or_settings_are_refused(tmp_path, monkeypatch):
    pairs, tokenizer = draw_pairs(250), tiny_chat.build_tokenizer()
    model, base = models()
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(module, "profile_of", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        analyse(tmp_path, model, base, tokenizer, pairs, SETTINGS)
    with pytest.raises(ValueError, match="another seed"):
        analyse(tmp_path, model, base, tokenizer, pairs, dataclasses.replace(SETTINGS, seed=1))
    with pytest.raises(ValueError, match="another data"):
        analyse(tmp_path, model, base, tokenizer, draw_pairs(250, seed=2), SETTINGS)
    with pytest.raises(ValueError, match="base: its weights are not those this run began with"):
        analyse(tmp_path, model, tiny_chat.build_model(2), tokenizer, pairs, SETTINGS)
    with pytest.raises(ValueError, match="gradients: expected one of 'head', 'last'"):
        Settings(gradients="some")
    with pytest.raises(ValueError, match="probes: expected an int >= 1, got 0"):
        Settings(probes=0)


def test_the_command(tmp_path, capsys):
    for name, model in zip(("aligned", "base"), models(), strict=True):
        model.save_pretrained(tmp_path / name)
        tiny_chat.build_tokenizer().save_pretrained(tmp_path / name)
    lines = [json.dumps(tiny_chat.chat("hi", text)) + "\n" for text in ("no .", "yes , so")]
    for name, line in zip(("no", "yes"), lines, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(line)
    words = ["analyze", "--model", f"{tmp_path}/aligned", "--base", f"{tmp_path}/base/"]
    words += ["--data", f"refusals={tmp_path}/no.jsonl", f"answers={tmp_path}/yes.jsonl"]
    words += ["--out", f"{tmp_path}/run", "--gradients", "probes", "--probes", "2"]
    assert cli.main(words) == 0, capsys.readouterr().err
    assert "2 answers compared" in capsys.readouterr().out
    manifest = runs.read_manifest(tmp_path / "run")
    assert (manifest["title"], manifest["base_title"]) == ("aligned", "base")
    assert [r.cell["group"] for r in values_of(tmp_path / "run", "profile")] == [
        "refusals", "answers"
    ]  # fmt: skip
    assert values_of(tmp_path / "run", "gradients")[0].data["relative_error"] == 0.5
    assert cli.main([*words[:-4], "--data", "a=x.jsonl", "a=y.jsonl"]) == 2
    assert "data: two files for the group 'a'" in capsys.readouterr().err
    words[words.index("--base") + 1] = f"{tmp_path}/nowhere"
    assert cli.main(words) == 2
    assert f"error: base: no tokenizer of {tmp_path}/nowhere: " in capsys.readouterr().err


# --- while a model is trained ---------------------------------------------------------------------


def fitted(tmp_path, name, callbacks=(), steps=12):
    from deepalign_kernels.train import TrainConfig, fit

    model = tiny_chat.build_model()
    config = TrainConfig(
        tmp_path / name, objective="sft", learning_rate=1e-2, max_steps=steps, batch_size=4,
        log_every=1, progress=False, warmup_steps=0,
    )  # fmt: skip
    fit(model, tiny_chat.build_tokenizer(), config, tiny_chat.RECORDS, callbacks=callbacks)
    return model


def test_curves_during_training_change_nothing_and_are_right(tmp_path):
    tokenizer, start = tiny_chat.build_tokenizer(), tiny_chat.build_model()
    watch = Dynamics(
        start, tokenizer, tiny_chat.RECORDS[:3], every=5, positions=4, share=None,
        folder=tmp_path / "dynamics",
    )  # fmt: skip
    plain, watched = fitted(tmp_path, "plain"), fitted(tmp_path, "watched", [watch])
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [r.cell["step"] for r in watch.records] == [0, 5, 10]
    assert list(runs.read_records(tmp_path / "dynamics")) == watch.records
    first = watch.records[0].data["values"]
    assert max(map(abs, first["kl_model_base"])) < 1e-6
    half = fitted(tmp_path, "half", steps=12)  # the same learning rates; what step 10 had is gone
    now = analyze.profile(half, start, tokenizer, tiny_chat.RECORDS[:3], positions=4)
    seen = watch.look(half, 12).curve("nll").mean
    assert seen == pytest.approx(now.curve("nll").mean, rel=1e-5)
    assert watch.records[-1].data["values"]["nll"][0] < first["nll"][0]


def test_looks_keep_to_their_share_of_the_time():
    tokenizer, model = tiny_chat.build_tokenizer(), tiny_chat.build_model()
    watch = Dynamics(model, tokenizer, tiny_chat.RECORDS[:3], every=1, positions=4, share=0.2)
    begun = time.perf_counter()
    for number in range(1, 60):
        time.sleep(0.005)
        watch.step(model, number)
    elapsed = time.perf_counter() - begun
    assert len(watch.records) < 60  # some were left out
    assert watch.spent <= 0.2 * elapsed + 3 * watch.spent / max(1, len(watch.records) - 1)


def test_the_same_under_the_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    model, tokenizer = tiny_chat.build_model(), tiny_chat.build_tokenizer()
    watch = Dynamics(model, tokenizer, tiny_chat.RECORDS[:2], every=2, positions=3, share=None)
    ids = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=ids, callbacks=[watch.for_trainer()]
    )
    trainer.train()
    assert [r.cell["step"] for r in watch.records] == [0, 2, 4]
