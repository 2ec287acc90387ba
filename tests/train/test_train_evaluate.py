"""Held-out data: each number against fp64 by hand; the best state is kept and comes back."""

import json
import math

import pytest
import torch
from tiny_chat import RECORDS, build_model, build_tokenizer
from train_runs import RUN, log_of

from deepalign_kernels.data.examples import tokenize_chat
from deepalign_kernels.train import TrainConfig, TrainingRun, fit
from deepalign_kernels.train import folder as folders

HELD_OUT = RECORDS[:4]
BETAS = {1: 0.5, 2: 2.0, 3: 2.0, 4: 2.0, 5: 2.0}


def run(out, model=None, ref_model=None, callbacks=(), eval_data=HELD_OUT, **options):
    base = {**RUN, "max_steps": 6, "learning_rate": 3e-3, "eval_every": 2, **options}
    config = TrainConfig(out, **base)
    parts = (model or build_model(0), build_tokenizer(), config, RECORDS[4:], ref_model, callbacks)
    return TrainingRun(*parts, eval_data=eval_data)


def evaluations(out):
    return [r for r in log_of(out) if r["event"] == "eval"]


def by_hand(model, ref_model):
    """{position, 16 for later ones: [(objective, nll, log ratio, divergence), ...]}"""
    model, ref_model, out = model.double(), ref_model.double(), {}
    for e in tokenize_chat(build_tokenizer(), HELD_OUT):
        ids = torch.tensor([e.input_ids])
        p, q = (m(input_ids=ids).logits[0].log_softmax(-1) for m in (model, ref_model))
        for t in range(1, len(e.labels)):
            if e.labels[t] != -100:
                a, b = p[t - 1, ids[0, t]].item(), q[t - 1, ids[0, t]].item()
                beta = BETAS.get(e.positions[t], 0.1)
                loss = (2 / beta) * (math.log1p(math.exp(beta * (b - a))) - math.log(2))
                kl = (p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum().item()
                row = out.setdefault(min(e.positions[t] or 16, 16), [])
                row.append((loss, -a, a - b, kl))
    return out


@pytest.mark.parametrize(
    "how",
    (
        {},
        {"head": "logits"},
        {"reference": "frozen"},
        {"reference": "frozen", "head": "logits"},
        {"eval_kl": True, "reference_dtype": "float32"},
        {"eval_kl": True, "reference_dtype": "float32", "objective": "sft"},
    ),
    ids=str,
)
@torch.no_grad()
def test_the_numbers_are_those_by_hand(tmp_path, how):
    with torch.enable_grad():
        run(tmp_path, ref_model=build_model(1), batch_size=3, **how).train()
    said = evaluations(tmp_path)[0]
    assert said["step"] == 0
    gold = by_hand(build_model(0), build_model(1))
    tokens = [row for rows in gold.values() for row in rows]
    mean = lambda rows, n: sum(row[n] for row in rows) / len(rows)  # noqa: E731
    objective = mean(tokens, 1 if how.get("objective") == "sft" else 0)
    assert said["objective"] == pytest.approx(objective, rel=1e-4)
    assert said["nll"] == pytest.approx(mean(tokens, 1), rel=1e-5)
    whole = "eval_kl" in how or "reference" in how
    names = {"nll_at": 1, "log_ratio_at": 2} | ({"kl_at": 3} if whole else {})
    for at in range(16):
        rows = gold.get(at + 1, [])
        assert said["tokens_at"][at] == len(rows)
        for name, column in names.items():
            if rows:
                close = pytest.approx(mean(rows, column), rel=1e-3, abs=1e-4)
                assert said[name][at] == close, (name, at)
            else:
                assert said[name][at] is None
    assert ("kl_at" in said) == whole


def test_evaluation_changes_nothing_and_comes_when_it_is_due(tmp_path):
    runs = {}
    for name, data in (("with", HELD_OUT), ("without", None)):
        model = build_model(0, attention_dropout=0.3)
        runs[name] = run(tmp_path / name, model, eval_data=data)
        runs[name].train()
    pairs = zip(*(r.model.parameters() for r in runs.values()), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert [r["step"] for r in evaluations(tmp_path / "with")] == [0, 2, 4, 6]
    assert not evaluations(tmp_path / "without")
    run(tmp_path / "ends", eval_every=None, objective="sft").train()
    said = evaluations(tmp_path / "ends")
    assert [r["step"] for r in said] == [0, 6] and "log_ratio_at" not in said[0]


def test_the_best_state_is_kept_and_comes_back(tmp_path):
    """The rate is far too high, so the best is not the last."""
    states = {0: build_model(0).state_dict()}

    def keep(run, record):
        states[record["step"]] = {k: v.clone() for k, v in run.model.state_dict().items()}

    done = run(tmp_path, callbacks=[keep], learning_rate=0.03, objective="sft", best_by="nll")
    done.train()
    said = evaluations(tmp_path)
    best = min(said, key=lambda r: r["nll"])
    assert best["step"] != 6 and done.best["step"] == best["step"]
    assert done.load_best()["nll"] == best["nll"]
    now = done.model.state_dict()
    assert all(torch.equal(now[k], states[best["step"]][k]) for k in now)
    with pytest.raises(ValueError, match="eval_data: no evaluation in"):
        run(tmp_path / "other", eval_data=None).load_best()


def test_a_resume_goes_on_with_the_evaluation(tmp_path):
    def stop(run, record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    whole = run(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", callbacks=[stop]).train()
    again = run(tmp_path / "parts")
    again.train(resume=True)
    assert evaluations(tmp_path / "parts") == evaluations(tmp_path / "whole")
    files = [folders.read(tmp_path / name / "best.pt") for name in ("parts", "whole")]
    assert files[0]["eval"] == files[1]["eval"] == again.best
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "late", callbacks=[stop], eval_data=None).train()
    with pytest.raises(ValueError, match="eval_data: this run began without"):
        run(tmp_path / "late").train(resume=True)


def test_the_divergence_is_of_the_model_a_run_began_with(tmp_path):
    """Also at a resume; training is what it is without."""

    def stop(run, record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    about = {"objective": "sft", "eval_kl": True}
    plain = run(tmp_path / "plain", objective="sft")
    plain.train()
    whole = run(tmp_path / "whole", **about)
    whole.train()
    assert all(map(torch.equal, whole.model.parameters(), plain.model.parameters()))
    first, *later = (r["kl_at"][0] for r in evaluations(tmp_path / "whole"))
    assert abs(first) < 1e-3 and min(later) > 0.1
    (kept,) = (tmp_path / "whole").glob("reference-*/about.json")
    assert json.loads(kept.read_text())["about"]["model"]  # no other model's may be taken for it
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", callbacks=[stop], **about).train()
    run(tmp_path / "parts", **about).train(resume=True)
    assert evaluations(tmp_path / "parts") == evaluations(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "late", callbacks=[stop], objective="sft").train()
    with pytest.raises(ValueError, match="eval_data: this run began without, or without eval_kl"):
        run(tmp_path / "late", **about).train(resume=True)
    wrong = {"runs along": {"reference": "frozen"}, "hidden states": {"head": "logits"}}
    for why, odd in wrong.items():
        with pytest.raises(ValueError, match=f"eval_kl: .*{why}"):
            run(tmp_path / "odd", **about, **odd)


def test_fit_takes_held_out_data(tmp_path):
    config = TrainConfig(tmp_path, **RUN)
    fit(build_model(0), build_tokenizer(), config, RECORDS, eval_data=HELD_OUT)
    assert len(evaluations(tmp_path)) == 2
    with pytest.raises(ValueError, match="best_by: expected one of 'objective', 'nll'"):
        TrainConfig(tmp_path, best_by="loss")


def test_a_run_that_gets_no_better_ends_early(tmp_path):
    """At a rate that only hurts the first evaluation stays the best."""
    early = {"learning_rate": 0.5, "lr_schedule": "constant", "max_steps": 8, "early_stop": 2}
    trainer = run(tmp_path, save_every=100, **early)
    assert trainer.train().steps == 4 and trainer.best["step"] == 0
    assert log_of(tmp_path)[-1]["event"] == "end" and len(evaluations(tmp_path)) == 3
    assert [p.name for p in tmp_path.glob("c*.pt")] == ["checkpoint-0000004.pt"]
    again = run(tmp_path, save_every=100, **early)
    assert again.train(resume=True).steps == 4  # it has ended
    again.load_best()
    assert all(map(torch.equal, again.model.parameters(), build_model(0).parameters()))
    longer = run(tmp_path, save_every=100, **{**early, "early_stop": 3})
    assert longer.train(resume=True).steps > 4


def test_a_run_that_gets_better_goes_on(tmp_path):
    trainer = run(tmp_path, early_stop=1, eval_data=RECORDS[4:])
    assert trainer.train().steps == 6 and trainer.best["step"] == 6


def test_early_stop_needs_evaluations(tmp_path):
    with pytest.raises(ValueError, match="early_stop: it counts evaluations; give eval_every"):
        run(tmp_path, eval_every=None, early_stop=1)
    with pytest.raises(ValueError, match="early_stop: .* on eval_data, and there are none"):
        run(tmp_path, eval_data=None, early_stop=1)
