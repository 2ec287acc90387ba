"""The rules of single tokens, by formulas of their own, and every place that takes one: by name and
as a function."""

import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
from linear_cases import make, plain_logits
from train_runs import cubed

import deepalign_kernels as dak
from deepalign_kernels import hf, rules

ODD = [-torch.inf, torch.nan, 0.0, -1.0, -200.0]
BETAS = [0.0, 1e-3, 2.0, 100.0, -1.0, torch.nan]


def focal(logp, ref_logp=None, beta=None):
    """-(1 - p)^2 log p, with its whole derivative."""
    p = logp.exp()
    loss = -((1 - p) ** 2) * logp
    return loss, (1 - p) ** 2 - 2 * p * (1 - p) * logp


def plain(name, logp, ref_logp, beta):
    """Token losses [N] whose gradient torch takes."""
    if name == "exact":
        delta = ref_logp - logp
        b = torch.where(beta == 0, 1.0, beta)  # or the branch not taken gives 0 * inf
        return torch.where(beta == 0, delta, -2 / b * F.logsigmoid(-b * delta))
    if name == "surrogate":
        return (2 * torch.sigmoid(beta * (ref_logp - logp))).clamp(min=0.3).detach() * -logp
    if name in ("nll", "dft"):
        return -logp * (logp.exp().detach() if name == "dft" else 1.0)
    return {"focal": focal, "cubed": cubed}[name](logp, ref_logp, beta)[0]


NAMED = {
    "exact": "exact",
    "surrogate": "surrogate",
    "nll": "nll",
    "dft": "dft",
    "focal": focal,
    "cubed": cubed,
}


@pytest.mark.parametrize("name", sorted({*NAMED, *rules.RULES}))
def test_loss_and_weight(name):
    g = torch.Generator().manual_seed(0)
    logp, ref_logp = (torch.randn(40, generator=g).abs().double().mul(-3) for _ in range(2))
    beta = torch.tensor([0.0, 0.1, 0.5, 2.0], dtype=torch.float64).repeat(10)
    logp.requires_grad_()
    expected = plain(name, logp, ref_logp, beta)
    (slope,) = torch.autograd.grad(expected.sum(), logp)
    rule = rules.objective_of(NAMED[name])
    loss, weight = rules.run(rule.name, 0.3, logp.detach(), ref_logp, beta)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight, -slope, rtol=1e-12, atol=1e-12)
    out = rules.with_gradient(logp, loss, weight)
    assert torch.equal(out, loss)
    assert torch.equal(torch.autograd.grad(out.sum(), logp)[0], -weight)


def test_no_token_trains_on_a_broken_reference():
    values = itertools.product(ODD, ODD, BETAS)
    logp, ref_logp, beta = (torch.tensor(x).double() for x in zip(*values, strict=True))
    poisoned = logp.isnan() | ref_logp.isnan() | beta.isnan() | (beta < 0)
    for name, floor in (("exact", 0.0), ("surrogate", 0.0), ("surrogate", 0.2)):
        loss, weight = rules.run(name, floor, logp, ref_logp, beta)
        assert torch.equal(weight.isnan(), poisoned) and loss[poisoned].isnan().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["dft", "focal", "cubed"])
def test_linear_loss_with_another_rule(name, reduction):
    p = make(dtype=torch.float64).leaves(only=("hidden", "weight"))
    logits, ref = (x / p.options["temperature"] for x in plain_logits(p))
    cap = p.options["softcap"]
    logits, ref = (
        (cap * torch.tanh(x * p.options["temperature"] / cap) / p.options["temperature"])
        for x in (logits, ref)
    )
    keep, target = p.target >= 0, p.target.clamp(min=0)[:, None]
    picked, ref_picked = (x.log_softmax(-1).gather(1, target)[:, 0] for x in (logits, ref))
    expected = torch.where(keep, plain(name, picked, ref_picked, p.beta), 0.0)
    given = {}
    if name == "cubed":
        given = dict(beta=p.beta, ref_logp=ref_picked.detach())
    head = dict(bias=p.bias, lora_a=p.lora_a, lora_b=p.lora_b, **p.options)
    got = dak.linear_constrained_loss(
        p.hidden, p.weight, p.target, objective=NAMED[name], reduction=reduction, **given, **head
    )
    if reduction == "mean":
        expected = expected.sum() / keep.sum()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    leaves = p.hidden, p.weight
    grads = [torch.autograd.grad(x.sum(), leaves) for x in (expected, got)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-9)


def test_a_function_lives_until_its_backward_and_no_longer():
    p = make(N=3000, H=4, V=8, full=False).leaves(only=("weight",))

    def call(reduction):
        def rule(logp, ref_logp=None, beta=None):
            return -logp, torch.ones_like(logp)

        return dak.linear_constrained_loss(
            p.hidden, p.weight, p.target, objective=rule, reduction=reduction
        )

    gc.collect()
    before = len(rules._FUNCTIONS)
    loss = call("none")  # more than one chunk: the backward makes the scores again
    gc.collect()
    assert len(rules._FUNCTIONS) == before + 1
    loss.sum().backward()
    del loss
    gc.collect()
    assert len(rules._FUNCTIONS) == before


def test_compiled_with_a_function():
    p = make(full=False).leaves(only=("hidden", "weight"))

    def step(hidden, weight):
        return dak.linear_constrained_loss(hidden, weight, p.target, objective=focal)

    eager = step(p.hidden, p.weight)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(p.hidden, p.weight)
    assert torch.equal(eager, compiled)
    grads = [torch.autograd.grad(x, (p.hidden, p.weight)) for x in (eager, compiled)]
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize(
    "objective,message",
    [
        ("dpo", "objective: expected one of 'exact', 'surrogate', .* or a function"),
        (3, "objective: expected one of .* got 3"),
        (lambda logp: (logp, logp), r"objective: expected a function of \(logp, ref_logp, beta\)"),
        (lambda a, b=None, c=None: (a.sum(), a), "objective: expected loss in the shape of logp"),
        (cubed, "ref_logp, ref_hidden: expected exactly one of the two, got neither"),
    ],
)
def test_bad_objective(objective, message):
    p = make(full=False)
    with pytest.raises(ValueError, match=message):
        dak.linear_constrained_loss(p.hidden, p.weight, p.target, objective=objective)


def test_bad_objective_in_the_head():
    with pytest.raises(ValueError, match="ref_logp, ref_rows: expected one of the two"):
        hf.ConstrainedLoss(beta=0.5, objective=cubed)
    with pytest.raises(ValueError, match="beta: objective=.* needs a number|beta: expected"):
        p = make(full=False)
        given = dict(objective=cubed, ref_logp=torch.zeros(len(p.hidden)))
        dak.linear_constrained_loss(p.hidden, p.weight, p.target, **given)
