"""What the trainer passes on to the ops: floor, temperature, divergence; against fp64 by hand."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_chat import RECORDS, build_model, build_tokenizer
from train_runs import RUN, log_of, record_gradients, relative, train

from deepalign_kernels.data.examples import tokenize_chat
from deepalign_kernels.train import TrainConfig, TrainingRun
from deepalign_kernels.train.__main__ import parser

PAPER = {1: 0.5, 2: 2.0, 3: 2.0, 4: 2.0, 5: 2.0}


def divergence(p, q, direction):
    """[V], [V] log-probabilities of policy and reference -> nats."""
    if direction == "js":
        m = (0.5 * (p.exp() + q.exp())).log()
        return 0.5 * divergence(q, m, "policy_ref") + 0.5 * divergence(p, m, "policy_ref")
    a, b = (p, q) if direction == "policy_ref" else (q, p)
    return (a.exp() * (a - b)).sum()


def by_hand(
    objective, temperature=1.0, min_weight=0.0, kl_coef=0.0, kl_direction="policy_ref",
    data=RECORDS,
):  # fmt: skip
    """(objective of a log, its gradients, mean divergence of a first token), over `data`."""
    model, ref_model = build_model(0).double(), build_model(1).double()
    total, shown, count, kls = 0.0, 0.0, 0, []
    for record, e in zip(data, tokenize_chat(build_tokenizer(), data), strict=True):
        ids = torch.tensor([e.input_ids])
        p = (model(input_ids=ids).logits[0] / temperature).log_softmax(-1)
        with torch.no_grad():
            q = (ref_model(input_ids=ids).logits[0] / temperature).log_softmax(-1)
        for t in range(1, len(e.labels)):
            if e.labels[t] == -100:
                continue
            a, b, beta = p[t - 1, ids[0, t]], q[t - 1, ids[0, t]], PAPER.get(e.positions[t], 0.1)
            beta = beta * record.get("beta_scale", 1)
            weight = 2 * torch.sigmoid(beta * (b - a)).detach()
            if objective == "surrogate":
                loss = weight.clamp(min=min_weight) * -a
            elif objective == "sft":
                loss = -a
            elif beta == 0:
                loss = b - a  # plain cross-entropy, less what the reference says
            else:
                loss = (2 / beta) * torch.nn.functional.softplus(beta * (b - a))
                shown = shown - 2 * math.log(2) / beta
            kl = divergence(p[t - 1], q[t - 1], kl_direction)
            if e.positions[t] == 1:
                kls.append(kl.item())
            total, count = total + loss + kl_coef * kl, count + 1
    (total / count).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    return (total.item() + shown) / count, grads, sum(kls) / len(kls)


@pytest.mark.parametrize("head", ("fused", "logits"))
@pytest.mark.parametrize(
    "options",
    (
        {"objective": "surrogate", "min_weight": 0.9},
        {"objective": "constrained", "temperature": 1.7},
        {"objective": "sft", "kl_coef": 0.3},
        {"objective": "constrained", "kl_coef": 2.0, "kl_direction": "js", "temperature": 0.8},
    ),
    ids=str,
)
def test_a_step_is_the_objective_by_hand(tmp_path, options, head):
    gold, gold_grads, kl = by_hand(**options)
    model = build_model(0)
    grads = record_gradients(model)
    reference = "frozen" if "kl_coef" in options else "precomputed"
    _, result = train(
        model, tmp_path, ref_model=build_model(1), reference=reference, head=head, batch_size=4,
        gradient_accumulation_steps=2, **options,
    )  # fmt: skip
    assert result.metrics["objective"] == pytest.approx(gold, rel=1e-5, abs=1e-5)
    assert relative(grads, gold_grads) < 1e-5
    if "kl_coef" in options:
        assert result.metrics["kl_first"] == pytest.approx(kl, rel=1e-4)
    else:
        assert "kl_first" not in result.metrics


SCALES = (0, 2, 0.5, 1, 7, 1, 0.25)
SCALED = [{**r, "beta_scale": s} for r, s in zip(RECORDS, SCALES, strict=True)]
SCALED[3] = RECORDS[3]


@pytest.mark.parametrize(
    "how",
    ({"head": "logits"}, {"packing": True}, {"objective": "surrogate", "min_weight": 0.5}),
    ids=str,
)
def test_beta_of_a_record_is_scaled(tmp_path, how):
    """In a batch that mixes scales, 0 among them; also in the held-out objective."""
    options = {"objective": "constrained", **how}
    asked = {name: options[name] for name in ("objective", "min_weight") if name in options}
    gold, gold_grads, _ = by_hand(data=SCALED, **asked)
    assert abs(gold - by_hand(**asked)[0]) > 1e-3 * abs(gold)
    model = build_model(0)
    grads = record_gradients(model)
    config = TrainConfig(
        tmp_path, **{**RUN, "batch_size": 4, "gradient_accumulation_steps": 2, **options}
    )
    parts = model, build_tokenizer(), config, SCALED, build_model(1)
    result = TrainingRun(*parts, eval_data=SCALED).train()
    assert result.metrics["objective"] == pytest.approx(gold, rel=1e-5, abs=1e-5)
    assert relative(grads, gold_grads) < 1e-5
    held_out = next(line for line in log_of(tmp_path) if line["event"] == "eval")
    assert held_out["objective"] == pytest.approx(gold, rel=1e-5, abs=1e-5)


def test_choices_that_do_nothing_are_warned_of(tmp_path):
    config = TrainConfig(tmp_path, **RUN, objective="sft", eval_every=3)
    with pytest.warns(UserWarning) as said:
        TrainingRun(build_model(0), build_tokenizer(), config, SCALED)
    texts = [str(w.message) for w in said]
    assert "eval_every: without eval_data nothing is evaluated" in texts
    assert "data: records have a beta_scale, and objective='sft' has no beta" in texts


def test_the_log_leaves_out_what_no_learning_changes(tmp_path):
    """At step 0 policy and reference are one: equation 3 is then its constant and nothing else,
    whatever share of the batch the prefix has."""
    for name, data in (("all", RECORDS), ("short", RECORDS[:1])):
        _, result = train(build_model(0), tmp_path / name, data=data)
        assert abs(result.metrics["objective"]) < 1e-4 < result.metrics["nll"]


def test_the_constant_of_mixed_parts_is_mixed_as_they_are(tmp_path):
    examples = tokenize_chat(build_tokenizer(), RECORDS)

    class Mixed:
        part_weights = {0: 0.3, 1: 0.7}

        def examples(self, epoch):
            return [replace(e, part=n % 2) for n, e in enumerate(examples)]

    _, result = train(build_model(0), tmp_path, data=Mixed(), batch_size=7)
    assert abs(result.metrics["objective"]) < 1e-4


@pytest.mark.parametrize(
    "options, why",
    (
        ({"min_weight": 0.1}, "min_weight: a floor belongs to objective='surrogate'"),
        ({"min_weight": -1.0, "objective": "surrogate"}, "min_weight: expected"),
        ({"kl_coef": 0.5, "head": "logits"}, "kl_coef: what is kept of a reference are hidden"),
        ({"kl_positions": 3}, "kl_positions: says where kl_coef acts, which is 0"),
        ({"kl_positions": 0, "kl_coef": 1.0}, "kl_positions: expected an integer >= 1, got 0"),
        ({"kl_coef": 1.0, "parallel": "fsdp", "reference": "model"}, "give 'precomputed' or"),
        ({"reference_dtype": "float16"}, "reference_dtype: expected one of 'bfloat16'"),
        ({"kl_coef": -0.5, "reference": "frozen"}, "kl_coef: expected a finite number >= 0"),
        ({"kl_direction": "reverse"}, "kl_direction: expected one of 'policy_ref'"),
        ({"temperature": 0.0}, "temperature: expected a finite number > 0"),
    ),
)
def test_what_has_no_meaning_is_refused(tmp_path, options, why):
    with pytest.raises(ValueError, match=why):
        TrainConfig(tmp_path, **options)


def test_all_of_it_is_reached_from_the_command_line():
    line = "--model m --data d --output o --objective surrogate --min-weight 1e-3 --kl-coef 0.5"
    given = parser().parse_args([*line.split(), "--kl-direction", "js", "--temperature", "1.5"])
    assert (given.min_weight, given.kl_coef, given.temperature) == (1e-3, 0.5, 1.5)
    assert given.kl_direction == "js"
