"""The training loop: its objective against fp64 by hand, accumulation, schedule, log, step 0."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_chat import RECORDS, TEMPLATES, build_model, build_tokenizer
from torch import nn
from train_runs import RUN, cubed, log_of, record_gradients, relative, train
from transformers import get_scheduler

import deepalign_kernels as dak
from deepalign_kernels.train import TrainConfig, TrainingRun
from deepalign_kernels.train.cache import ReferenceCache


def by_hand(model, ref_model, objective, first=0.5, prefix=2.0, rest=0.1, length=5):
    """Objective, token records and gradients of one step over RECORDS: fp64, one conversation at a
    time, no padding, plain torch, positions counted along."""
    tokenizer, tokens, total, constants = build_tokenizer(), [], 0.0, []
    for record in RECORDS:
        turns = record.get("messages")
        if turns is None:
            turns = [
                {"role": "user", "content": record["prompt"]},
                {"role": "assistant", "content": record["completion"]},
            ]
        coded = tokenizer.apply_chat_template(
            turns, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = torch.tensor([coded["input_ids"]]), coded["assistant_masks"]
        logp = F.log_softmax(model(input_ids=ids).logits[0], -1)
        with torch.no_grad():
            ref = F.log_softmax(ref_model(input_ids=ids).logits[0], -1)
        position = 0
        for t in range(1, len(mask)):
            position = position + 1 if mask[t] else 0
            if position:
                beta = first if position == 1 else prefix if position <= length else rest
                a, b = logp[t - 1, ids[0, t]], ref[t - 1, ids[0, t]]
                loss, weight, constant = -a, torch.ones(()), 0.0
                if objective == "constrained":
                    loss = (2 / beta) * F.softplus(beta * (b - a))
                    constant = 2 * math.log(2) / beta  # where the two agree; not in the log
                    weight = 2 * torch.sigmoid(beta * (b - a))
                elif objective is cubed:
                    loss, weight = cubed(a, b, beta)
                total = total + loss
                constants.append(constant)
                tokens.append((position, a.item(), b.item(), weight.item()))
    loss = total / len(tokens)
    loss.backward()
    return (
        loss.item() - sum(constants) / len(tokens),
        tokens,
        {n: p.grad for n, p in model.named_parameters()},
    )


@pytest.mark.parametrize(
    "objective, reference, head",
    (
        ("constrained", "precomputed", "fused"),
        ("constrained", "frozen", "fused"),
        ("sft", "precomputed", "fused"),
        ("sft", "precomputed", "logits"),
        (cubed, "frozen", "fused"),
        (cubed, "precomputed", "logits"),
    ),
)
def test_one_step_is_the_objective_by_hand(tmp_path, objective, reference, head):
    model, ref = build_model(0), build_model(1)
    gold, tokens, gold_grads = by_hand(build_model(0).double(), build_model(1).double(), objective)
    grads = record_gradients(model)
    ref_model = ref if objective != "sft" else None
    _, result = train(
        model, tmp_path, objective=objective, reference=reference, ref_model=ref_model,
        head=head, batch_size=3, gradient_accumulation_steps=3,
    )  # fmt: skip
    assert result.metrics["objective"] == pytest.approx(gold, rel=1e-5, abs=1e-5)
    assert relative(grads, gold_grads) < 1e-5
    norm = math.sqrt(sum(g.square().sum().item() for g in gold_grads.values()))
    assert result.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert result.metrics["trained_tokens"] == len(tokens)

    groups = {
        "first": [t for t in tokens if t[0] == 1],
        "prefix": [t for t in tokens if 2 <= t[0] <= 5],
        "rest": [t for t in tokens if t[0] > 5],
    }
    assert all(groups.values())
    mean = lambda rows, of: sum(map(of, rows)) / len(rows)  # noqa: E731
    nll = mean(tokens, lambda t: -t[1])
    assert result.metrics["nll"] == pytest.approx(nll, rel=1e-5)
    for name, rows in groups.items():
        nll = mean(rows, lambda t: -t[1])
        assert result.metrics[f"nll_{name}"] == pytest.approx(nll, rel=1e-4)
        if objective != "sft":
            weight, ratio = mean(rows, lambda t: t[3]), mean(rows, lambda t: t[1] - t[2])
            assert result.metrics[f"weight_{name}"] == pytest.approx(weight, rel=1e-4)
            assert result.metrics[f"log_ratio_{name}"] == pytest.approx(ratio, rel=1e-3, abs=1e-4)
        else:
            assert f"weight_{name}" not in result.metrics


@pytest.mark.parametrize(
    "objective, size, accumulate",
    (("constrained", 2, 4), ("constrained", 3, 3), ("constrained", 1, 7), ("sft", 5, 2)),
)
def test_micro_batches_add_up_to_the_big_batch(tmp_path, objective, size, accumulate):
    """Uneven micro-batches too: 7 conversations of 2 to 60 trained tokens in threes, in fives."""
    grads, metrics = [], []
    for name, b, a in (("big", 7, 1), ("small", size, accumulate)):
        model = build_model(0)
        seen = record_gradients(model)
        ref = build_model(1) if objective == "constrained" else None
        _, result = train(
            model, tmp_path / name, objective=objective, ref_model=ref, batch_size=b,
            gradient_accumulation_steps=a,
        )  # fmt: skip
        grads.append(seen)
        metrics.append(result.metrics)
    assert relative(grads[1], grads[0]) < 1e-6
    for key in ("objective", "nll", "grad_norm", "nll_first"):
        assert metrics[1][key] == pytest.approx(metrics[0][key], rel=1e-6, abs=1e-5)


@pytest.mark.slow
def test_accumulated_training_gives_the_same_weights(tmp_path):
    """Nine steps over three epochs in fp64, where the optimizer does not blow up rounding."""
    weights = []
    for name, b, a in (("big", 6, 1), ("small", 2, 3)):
        model = build_model(0).double()
        train(model, tmp_path / name, batch_size=b, gradient_accumulation_steps=a, max_steps=6)
        weights.append({n: p.detach() for n, p in model.named_parameters()})
    assert relative(weights[1], weights[0]) < 1e-6
    start = {n: p.detach().double() for n, p in build_model(0).named_parameters()}
    assert relative(weights[0], start) > 1e-5  # and they did move


def test_sft_is_the_limit_of_constrained_at_beta_zero(tmp_path):
    grads = []
    for options in ({"objective": "sft"}, {"objective": "constrained", "beta": 0.0}):
        model = build_model(0)
        grads.append(record_gradients(model))
        ref = build_model(1) if "beta" in options else None
        train(model, tmp_path / options["objective"], ref_model=ref, **options)
    assert relative(grads[1], grads[0]) < 1e-6
    model = build_model(0)
    third = record_gradients(model)
    train(model, tmp_path / "beta", beta=2.0, ref_model=build_model(1))
    assert relative(third, grads[0]) > 0.1  # with another beta it is another gradient


@pytest.mark.slow
def test_the_constraint_holds_the_prefix(tmp_path):
    """What the method is for: a large beta leaves the first tokens about where they were."""
    ratios = {}
    for name, beta in (("free", 0.0), ("held", dak.BetaSchedule(first=20, prefix=20, rest=0.0))):
        _, result = train(
            build_model(0), tmp_path / name, beta=beta, max_steps=25, learning_rate=5e-3
        )
        ratios[name] = result.metrics
    held, free = ratios["held"], ratios["free"]
    assert held["log_ratio_first"] < free["log_ratio_first"] / 2
    assert held["log_ratio_prefix"] < free["log_ratio_prefix"] / 2
    assert held["nll_rest"] < 2 * free["nll_rest"]  # the free part is learned all the same
    assert held["weight_first"] < 0.3 and free["weight_first"] == 1.0


@pytest.mark.parametrize(
    "kind,warmup", (("linear", 0), ("linear", 10), ("cosine", 10), ("cosine", 1), ("constant", 1))
)
def test_learning_rates_are_those_of_transformers(tmp_path, kind, warmup):
    steps = 14
    trainer, _ = train(
        build_model(), tmp_path, objective="sft", lr_schedule=kind, max_steps=steps,
        warmup_steps=warmup, learning_rate=3e-3, batch_size=2,
    )  # fmt: skip
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-3)
    name = "constant_with_warmup" if kind == "constant" else kind
    schedule = get_scheduler(name, optimizer, warmup, steps)
    logged = [r["lr"] for r in log_of(tmp_path) if r["event"] == "step"]
    assert len(logged) == steps
    for step, rate in enumerate(logged):
        expected = optimizer.param_groups[0]["lr"]
        assert rate == trainer.lr_at(step) == pytest.approx(expected, rel=1e-12)
        optimizer.step()
        schedule.step()
    if warmup == 10 and kind != "constant":
        assert logged[0] == 0 and logged[10] == 3e-3 > logged[11]


def test_the_update_is_adamw_with_the_papers_betas(tmp_path):
    """The weights after three steps against torch's plain AdamW, fed with the gradients seen."""
    assert TrainConfig(tmp_path).adam_betas == (0.5, 0.999)
    assert TrainConfig(tmp_path).warmup_of(50) == 10
    model, twin = build_model(0), build_model(0)
    seen, steps = record_gradients(model), []
    options = {"warmup_steps": 1, "learning_rate": 1e-2, "max_grad_norm": 0.5}
    trainer, _ = train(
        model, tmp_path, callbacks=[lambda *_: steps.append(dict(seen))], max_steps=3,
        weight_decay=0.1, **options,
    )  # fmt: skip
    assert {g["betas"] for g in trainer.optimizer.param_groups} == {(0.5, 0.999)}
    named = dict(twin.named_parameters())
    decayed = [p for p in named.values() if p.dim() > 1]
    others = [p for p in named.values() if p.dim() == 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.5, 0.999), weight_decay=0.1, foreach=False)
    schedule = get_scheduler("linear", plain, 1, 3)  # 0, then the peak, then half of it
    for grads in steps:
        for name, p in named.items():
            p.grad = grads[name]
        assert nn.utils.clip_grad_norm_(twin.parameters(), 0.5) > 0.5  # clipping did something
        plain.step()
        schedule.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, named[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("template", ("marked", "think"))
@pytest.mark.parametrize("reference", ("precomputed", "frozen"))
def test_policy_and_reference_agree_before_the_first_step(tmp_path, reference, template):
    config = TrainConfig(tmp_path, reference=reference, **RUN)
    tokenizer = build_tokenizer(TEMPLATES[template])
    model = build_model(0, attention_dropout=0.3)  # the check has to switch it off
    result = TrainingRun(model, tokenizer, config, RECORDS).train()
    assert result.step0_max_log_ratio < 1e-4
    start = log_of(tmp_path)[0]
    assert start["event"] == "start"
    assert start["step0_max_log_ratio"] == result.step0_max_log_ratio


def test_a_reference_that_slipped_by_a_token_stops_the_run(tmp_path, monkeypatch):
    real = ReferenceCache.load

    def slipped(*args):
        entry = real(*args)
        return entry._replace(logp=entry.logp.roll(1))

    monkeypatch.setattr(ReferenceCache, "load", slipped)
    with pytest.raises(RuntimeError, match="they do not speak about the same tokens"):
        train(build_model(0), tmp_path)
    # Another reference model may differ: that is what it is for.
    _, result = train(build_model(0), tmp_path / "b", ref_model=build_model(1), max_steps=1)
    assert result.step0_max_log_ratio > 0.1


def test_templates_own_tokens_are_trained_at_rest_beta(tmp_path):
    """Six think tokens in front of the content: position 0, beta `rest`, counted as "rest"."""
    tokenizer = build_tokenizer(TEMPLATES["think"])
    data = [RECORDS[0]]
    counts = {}
    for origin in ("content", "span"):
        config = TrainConfig(tmp_path / origin, position_origin=origin, **RUN)
        trainer = TrainingRun(build_model(), tokenizer, config, data)
        (batch,) = trainer._batches(0)
        trained = batch.targets != -100
        beta = config.beta_at(batch.positions)[trained].tolist()
        counts[origin] = beta
    rest, prefix = pytest.approx(0.1), 2.0
    assert counts["content"][:12] == [rest] * 6 + [0.5] + [prefix] * 4 + [rest]
    assert counts["span"][:6] == [0.5] + [prefix] * 4 + [rest]
