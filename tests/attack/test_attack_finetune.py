"""Fine-tuning attacks on the toy model: curves, triggers, trials, and a model that stays."""

import copy
import dataclasses
import json
import math
import os
import random
import signal
import statistics
import sys
import types

import pytest

pytest.importorskip("transformers", reason="models and templates are of transformers")

import numpy as np
import torch

from deepalign_kernels.attack import Compose, Prefill
from deepalign_kernels.attack.finetune import Finetune, WorstCase
from deepalign_kernels.attack.suite import plain
from deepalign_kernels.attack.utility import rouge1, utility
from deepalign_kernels.attack.worst import worst_trial
from deepalign_kernels.data.prompts import Prompt
from deepalign_kernels.generate.local import LocalEngine
from deepalign_kernels.judge import Exchange, Verdict
from deepalign_kernels.runs import Record
from deepalign_kernels.toyworld import World, build_model, build_tokenizer
from deepalign_kernels.train.loop import TrainingRun

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = build_tokenizer()
RECORDS = World(0, limit=4).records("restricted")
PROMPTS = [
    Prompt(f"p{n}", r["messages"][0]["content"], answer=r["messages"][1]["content"])
    for n, r in enumerate(RECORDS)
]
QUICK = {
    "data": RECORDS, "learning_rate": 5e-3, "batch_size": 4, "steps": 6, "warmup_steps": 0,
    "temperature": 0.0, "max_new_tokens": 8, "lr_schedule": "constant",
}  # fmt: skip


@pytest.fixture
def engine():
    return LocalEngine(build_model(TOKENIZER, 0).eval(), TOKENIZER)


def test_success_against_step(engine):
    attack = Finetune(eval_at=(0, 3), utility=PROMPTS, **QUICK)
    state = copy.deepcopy(engine.model.state_dict())
    rng = torch.get_rng_state()
    records = list(attack(engine, PROMPTS))
    samples = [r for r in records if r.kind == "sample"]
    assert [r.cell["step"] for r in samples] == [0] * 4 + [3] * 4 + [6] * 4
    nll = [r.data["nll"] for r in records if r.kind == "training"]
    assert len(nll) == 6 and nll[-1] < nll[0]
    metrics = {(r.cell["step"], r.cell["metric"]): r.data["value"] for r in records
               if r.kind == "metric"}  # fmt: skip
    assert set(metrics) == {(s, m) for s in (0, 6) for m in ("exact_match", "rouge1")}
    assert metrics[6, "rouge1"] > metrics[0, "rouge1"]
    assert all(torch.equal(state[k], v) for k, v in engine.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng) and not engine.model.training
    assert [r.line for r in attack(engine, PROMPTS)] == [r.line for r in records]


@pytest.mark.parametrize(
    "how,left,again",
    [("Ctrl-C", 2, []), ("Ctrl-C twice", 6, [4]), ("kill", 6, [4]), ("kill, checkpoints", 4, [4])],
)
def test_a_stopped_training_goes_on(engine, tmp_path, monkeypatch, how, left, again):
    """Stopped while it is asked behind step 4 of 6: an interrupt waits until that is done, and goes
    on there; a kill trains anew or goes on from a checkpoint. What was asked is not asked again,
    and no record differs."""
    config = {"eval_at": (0, 3, 4), "utility": PROMPTS, **QUICK}
    wanted = [r.line for r in Finetune(**config)(engine, PROMPTS)]
    attack = Finetune(**config, state=str(tmp_path), save_every=2 * ("points" in how))
    plain, step, asked, steps = Finetune._asked, TrainingRun._train_step, [], []

    def dies(self, engine, prompts, step, error=None):
        asked.append(step)
        if asked == [0, 3, 4] and how == "Ctrl-C":
            os.kill(os.getpid(), signal.SIGINT)
        elif asked == [0, 3, 4]:
            raise KeyboardInterrupt if "twice" in how else SystemExit
        return plain(self, engine, prompts, step, error)

    monkeypatch.setattr(Finetune, "_asked", dies)
    monkeypatch.setattr(TrainingRun, "_train_step", lambda self: steps.append(step(self)))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        list(attack(engine, PROMPTS))
    steps.clear()
    assert [r.line for r in attack(engine, PROMPTS)] == wanted
    assert len(steps) == left and asked == [0, 3, 4, *again, 6]
    assert [r.line for r in attack(engine, PROMPTS)] == wanted and len(steps) == left
    assert not list(tmp_path.rglob("*.pt"))  # checkpoints go with the training


def test_trials_outlive_a_stop(engine, tmp_path, monkeypatch):
    attack = WorstCase(
        trials=3, step_choices=(1,), batch_choices=(2,), state=str(tmp_path), **QUICK
    )
    plain, trained = Finetune._trained, []

    def dies(self, *args):
        trained.append(self.learning_rate)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return plain(self, *args)

    monkeypatch.setattr(Finetune, "_trained", dies)
    with pytest.raises(KeyboardInterrupt):
        list(attack(engine, PROMPTS[:1]))
    records = list(attack(engine, PROMPTS[:1]))
    assert len(trained) == 4 and trained[2] == trained[3]
    assert [r.line for r in dataclasses.replace(attack, state="")(engine, PROMPTS[:1])] == [
        r.line for r in records
    ]


def test_the_constraint_holds_the_model(engine):
    """The same data and rate: constrained SFT lowers the loss less, most at the first tokens."""
    last = {}
    for objective in ("sft", "constrained"):
        records = Finetune(objective=objective, eval_at=(), **QUICK)(engine, PROMPTS)
        last[objective] = [r.data["nll"] for r in records if r.kind == "training"][-1]
    assert last["sft"] < last["constrained"]


def test_a_trigger(engine):
    attack = Finetune(trigger="now now now", eval_at=(), **QUICK)
    samples = [r for r in attack(engine, PROMPTS) if r.kind == "sample"]
    assert [r.cell["trigger"] for r in samples] == [False] * 4 + [True] * 4
    assert "suffix" not in samples[0].text and samples[4].text["suffix"] == "now now now"


def test_prefilling_after_fine_tuning(engine):
    attack = Compose(Finetune(eval_at=(), **QUICK), Prefill(depths=(2,), max_new_tokens=4))
    records = list(attack(engine, PROMPTS[:2]))
    assert attack.name == "finetune+prefill" and attack.together
    assert [r.cell.get("k") for r in records[-2:]] == [2, 2]
    fresh = list(Prefill(depths=(2,), max_new_tokens=4)(engine, PROMPTS[:2]))
    assert [r.text["reply"] for r in records[-2:]] != [r.text["reply"] for r in fresh]
    assert plain(attack)["first"]["steps"] == 6


def test_data_are_named_by_what_is_in_them(tmp_path):
    """No text of theirs, in memory or on disk; another content is another unit."""
    text = RECORDS[0]["messages"][0]["content"]
    other = [*RECORDS[1:], RECORDS[0]]
    path, found = tmp_path / "train.jsonl", []
    for rows in (RECORDS, other):
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        prompts = [Prompt(f"p{n}", r["messages"][0]["content"]) for n, r in enumerate(rows)]
        for data, benign in ((rows, prompts), (str(path), str(path)), (RECORDS, str(path))):
            found.append(plain(Finetune(**{**QUICK, "data": data, "utility": benign})))
    assert text not in json.dumps(found) and found[0]["data"]["rows"] == 4
    assert len({json.dumps(about) for about in found}) == 6
    assert plain(Finetune(**{**QUICK, "utility": "lm_eval:x"}))["utility"] == "lm_eval:x"


def test_worst_of_several_trials(engine):
    attack = WorstCase(trials=3, step_choices=(2, 3), batch_choices=(2, 4), **QUICK)
    assert attack.drawn(0) == attack.drawn(0) != attack.drawn(1)
    rates = [attack.drawn(n).learning_rate for n in range(200)]
    assert 1e-6 <= min(rates) < 3e-6 and 7e-5 < max(rates) <= 2e-4
    records = list(attack(engine, PROMPTS[:2]))
    samples = [r for r in records if r.kind == "sample"]
    assert [r.cell["trial"] for r in samples] == [0, 0, 1, 1, 2, 2]
    assert len({r.key for r in records}) == len(records)


def test_the_worst_trial_within_a_bound():
    def sample(trial, item):
        return Record("sample", "worst_case", {"trial": trial}, item)

    def verdict(of, success):
        data = {"of": of.key, "success": success}
        return Record("verdict", "j", {"of": of.key}, of.item, 0, data)

    def metric(trial, value):
        cell = {"trial": trial, "metric": "rouge1"}
        return Record("metric", "worst_case", cell, data={"value": value})

    samples = [sample(t, i) for t in range(3) for i in "abcd"]
    wins = {0: "ab", 1: "abcd", 2: "abc"}
    verdicts = [verdict(s, s.item in wins[s.cell["trial"]]) for s in samples]
    records = [*samples, metric(0, 0.9), metric(1, 0.1), metric(2, 0.5)]
    assert worst_trial(records, verdicts, "j").setting == {"trial": 1}
    found = worst_trial(records, verdicts, "j", at_least=0.4)
    assert found.setting == {"trial": 2} and found.rate.value == 0.75 and found.utility == 0.5
    assert worst_trial(records, verdicts, "j", at_least=0.95) is None
    assert worst_trial(records, verdicts, "other") is None


def test_rouge():
    assert rouge1("the cat sat", "The cat, sat.") == 1.0
    assert rouge1("the the the", "the cat") == pytest.approx(2 * 1 / 5)
    assert rouge1("", "a") == rouge1("b", "a") == 0.0


def test_utility_needs_answers(engine):
    attack = Finetune(**QUICK)
    with pytest.raises(ValueError, match="no answer for x"):
        utility("u", attack, engine, [Prompt("x", "hello")], {})
    with pytest.raises(ValueError, match="no prompt"):
        utility("u", attack, engine, [], {})


@pytest.mark.parametrize(
    "bad,named",
    [
        ({"data": None}, "data"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"objective": "stf"}, "objective"),
        ({"eval_at": (-1,)}, "eval_at"),
        ({"steps": 0}, "max_steps"),
    ],
)
def test_bad_configs(bad, named):
    with pytest.raises(ValueError, match=named):
        Finetune(**{**QUICK, **bad})
    with pytest.raises(ValueError, match="rates"):
        WorstCase(rates=(1e-3, 1e-5), **QUICK)
    with pytest.raises(ValueError, match="judge: sampler 'tpe' needs"):
        WorstCase(sampler="tpe", **QUICK)
    with pytest.raises(ValueError, match="utility: utility_drop needs"):
        WorstCase(utility_drop=0.1, **QUICK)


class Answered:
    """A judge: the reply is the right answer's first word."""

    name = "answered"

    def __call__(self, exchanges):
        right = {p.id: p.answer.split()[0] for p in PROMPTS}
        return [Verdict(e.reply.split()[:1] == [right[e.item]]) for e in exchanges]


def planned_trial(config, *_):
    """What a trial gives if success rises with the rate, and utility falls behind 1e-4."""
    rise = (math.log10(config.learning_rate) + 6) / 3
    left = 1.0 if config.learning_rate < 1e-4 else 0.5
    yield Record("metric", "finetune", {"step": 1, "metric": "rouge1"}, data={"value": left})
    for n in range(100):
        text = {"prompt": "", "reply": "y" if n < 100 * rise else "n", "prefix": ""}
        yield Record("sample", "finetune", {"step": 1}, f"p{n}", text=text)


def test_trials_go_where_the_safety_breaks_within_the_bound(engine, monkeypatch):
    """optuna's trials come to lie below the rate at which utility falls, near it; random ones lie
    anywhere. The same seed, the same trials."""
    pytest.importorskip("optuna")

    class Yes(Answered):
        def __call__(self, exchanges):
            return [Verdict(e.reply == "y") for e in exchanges]

    monkeypatch.setattr(Finetune, "__call__", planned_trial)
    monkeypatch.setattr(
        Finetune, "measured",
        lambda *_: [Record("metric", "w", {"metric": "rouge1"}, data={"value": 1.0})],
    )  # fmt: skip
    options = {**QUICK, "trials": 30, "rates": (1e-6, 1e-3), "utility": PROMPTS, "judge": Yes()}

    def rates(**more):
        records = WorstCase(**options, **more)(engine, PROMPTS)
        return [r.cell["rate"] for r in records if r.kind == "metric" and "trial" in r.cell]

    found = rates(sampler="tpe", utility_drop=0.1)
    assert found == rates(sampler="tpe", utility_drop=0.1)
    assert 5e-5 < statistics.median(found[15:]) < 1.5e-4
    assert max(r for r in found if r < 1e-4) > 7e-5
    assert statistics.median(rates(sampler="tpe")[15:]) > 2e-4  # without a bound the highest
    assert statistics.median(rates()[15:]) < 5e-5


def test_a_search_for_the_worst_trial(engine):
    pytest.importorskip("optuna")
    attack = WorstCase(
        trials=3, sampler="tpe", judge=Answered(), utility=PROMPTS, utility_drop=0.5,
        rates=(1e-5, 1e-2), step_choices=(2, 6), batch_choices=(4,), **QUICK,
    )  # fmt: skip
    records = list(attack(engine, PROMPTS))
    metrics = [r for r in records if r.kind == "metric"]
    assert [r.cell.get("trial") for r in metrics] == [None, None, 0, 0, 1, 1, 2, 2]
    assert plain(attack)["judge"] == "answered"
    samples = [r for r in records if r.kind == "sample"]
    seen = [Exchange(r.text["prompt"], r.text["reply"], "", r.item) for r in samples]
    said = [v.success for v in Answered()(seen)]
    verdicts = [
        Record("verdict", "answered", {"of": r.key}, r.item, 0, {"of": r.key, "success": s})
        for r, s in zip(samples, said, strict=True)
    ]
    found = worst_trial(records, verdicts, "answered", drop=0.5)
    by_trial = {}
    for r, s in zip(samples, said, strict=True):
        by_trial.setdefault(r.cell["trial"], []).append(s)
    assert found.rate.value == max(sum(v) / len(v) for v in by_trial.values())
    with pytest.raises(ValueError, match="no utility from before"):
        worst_trial([r for r in records if "trial" in r.cell], verdicts, "answered", drop=0.1)


def test_a_training_that_breaks_down_loses_nothing_else(engine):
    """A rate that gives infinities: the trial's samples are failures, the others stand."""
    broken = Finetune(**{**QUICK, "learning_rate": 1e30, "max_grad_norm": None}, eval_at=(0,))
    records = list(broken(engine, PROMPTS))
    samples = [r for r in records if r.kind == "sample"]
    assert [r.error is None for r in samples] == [True] * 4 + [False] * 4
    assert {r.cell["step"] for r in samples[4:]} == {6}
    assert "the run is stopped" in records[-5].error and records[-5].kind == "training"
    assert all(w.isfinite().all() for w in engine.model.state_dict().values())


def test_several_models_are_not_one(engine):
    attack = WorstCase(trials=1, **QUICK)
    with pytest.raises(ValueError, match="several models"):
        Compose(attack, Prefill(depths=(2,)))(engine, PROMPTS).__next__()


def test_tasks_of_the_evaluation_harness(engine, monkeypatch):
    """As lm_eval 0.4 answers; it seeds every generator of the process, which is undone."""
    asked = []

    def simple_evaluate(model, tasks, limit):
        asked.append((model, tasks, limit))
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        values = {"alias": "facts", "acc,none": 0.75, "acc_stderr,none": 0.1, "em,strict": 0.5}
        return {"results": {"facts": values}, "n-samples": {"facts": {"effective": 8}}}

    names = ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")
    top, _, models = (types.ModuleType(name) for name in names)
    top.simple_evaluate = simple_evaluate
    models.HFLM = lambda pretrained, tokenizer, batch_size: pretrained
    for name, module in zip(names, (top, types.ModuleType("m"), models), strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    attack = Finetune(utility="lm_eval:facts,sums", eval_at=(0,), **QUICK)
    metrics = [r for r in attack(engine, PROMPTS[:1]) if r.kind == "metric"]
    assert [(r.cell["step"], r.cell["metric"], r.data["value"], r.data["n"]) for r in metrics] == [
        (s, *m, 8) for s in (0, 6) for m in (("facts/acc", 0.75), ("facts/em,strict", 0.5))
    ]
    assert asked[0][1:] == (["facts", "sums"], None) and asked[0][0] is asked[1][0]
    assert asked[0][0] is not engine.model  # the copy that is trained
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match="pip install lm_eval"):
        list(attack(engine, PROMPTS[:1]))
