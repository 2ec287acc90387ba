"""constrained_loss: equations 3 and 5 of arXiv 2406.05946, reductions, and its edges."""

import math

import pytest
import torch
from cases import IGNORE, POISONS, check_poisoned, make, plain_constrained, plain_logp

import deepalign_kernels as dak
from deepalign_kernels.testing import assert_in_budget

pytestmark = [pytest.mark.every_isa, pytest.mark.interpreter_slow]


def rows(device, T=9, V=301, dtype=torch.float32):
    return make(T, V).to(device, dtype)


def scalar(r, reduction="mean", **kw):
    """(loss, gradient) of the library on fresh leaves."""
    leaf = r.policy.detach().requires_grad_()
    loss = dak.constrained_loss(
        leaf, r.target, beta=r.beta, ref_logits=r.ref, reduction=reduction, **kw
    )
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def plain_scalar(r, dtype, divide_by):
    leaf = r.policy.detach().to("cpu", dtype).requires_grad_()
    tokens = plain_constrained(leaf, r.ref.to("cpu", dtype), r.target.cpu(), r.beta.cpu())
    loss = tokens.sum() / divide_by
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scalar_reductions_with_their_gradient(dtype, reduction, device):
    r = rows(device, dtype=dtype)
    divide_by = (r.target != IGNORE).sum().item() if reduction == "mean" else 1
    ours, gold, base = (
        scalar(r, reduction),
        plain_scalar(r, torch.float64, divide_by),
        plain_scalar(r, torch.float32, divide_by),
    )
    for what, o, b, g in zip(("loss", "gradient"), ours, base, gold, strict=True):
        assert_in_budget(f"{reduction} {what}", o, b, g)


def test_the_weight_of_equation_5(device):
    """d loss / d logits = w (p - onehot) with w = 2 sigmoid(beta Delta): by hand for two
    columns."""
    policy = torch.tensor([[0.0, 0.0]], device=device, requires_grad=True)  # p = 1/2 each
    ref = torch.tensor([[0.0, math.log(3.0)]], device=device)  # p_ref(column 1) = 3/4
    target = torch.tensor([1], device=device)
    loss, parts = dak.constrained_loss(policy, target, beta=2.0, ref_logits=ref, return_parts=True)
    delta = math.log(0.75 / 0.5)
    weight = 2 / (1 + math.exp(-2 * delta))
    torch.testing.assert_close(parts.weight.item(), weight)
    torch.testing.assert_close(parts.logp.item(), math.log(0.5))
    torch.testing.assert_close(parts.ref_logp.item(), math.log(0.75))
    torch.testing.assert_close(loss.item(), math.log1p(math.exp(2 * delta)))
    loss.backward()
    torch.testing.assert_close(policy.grad.cpu(), torch.tensor([[0.5 * weight, -0.5 * weight]]))


def test_parts_are_detached_and_equal_token_logp(device):
    r = rows(device)
    r.policy.requires_grad_()
    for reduction in ("mean", "none"):
        _, parts = dak.constrained_loss(
            r.policy,
            r.target,
            beta=r.beta,
            ref_logits=r.ref,
            reduction=reduction,
            return_parts=True,
        )
        assert not any(x.requires_grad for x in parts)
        assert torch.equal(parts.logp, dak.token_logp(r.policy, r.target).detach())
        assert torch.equal(parts.ref_logp, dak.token_logp(r.ref, r.target))


def test_beta_0_is_sft(device):
    """F23: beta = 0 has w = 1: the gradient of cross-entropy."""
    r = rows(device)
    leaf = r.policy.detach().requires_grad_()
    loss = dak.constrained_loss(leaf, r.target, beta=0.0, ref_logits=r.ref)
    (grad,) = torch.autograd.grad(loss, leaf)
    (sft,) = torch.autograd.grad(
        -dak.token_logp(leaf, r.target).sum() / (r.target != IGNORE).sum(), leaf
    )
    torch.testing.assert_close(grad, sft, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("beta", [1e-3, 0.1, 2.0, 100.0])
@pytest.mark.parametrize("delta", [0.0, 1e-8, -1e-8, 20.0, -20.0, 1e3, -1e3])
def test_beta_and_log_ratio_over_their_range(beta, delta, device):
    """F23: from Delta = +-1e-8 to +-1e3 and beta from 1e-3 to 100, against fp64."""
    policy = torch.zeros(1, 4, device=device, requires_grad=True)
    target, logp = torch.zeros(1, dtype=torch.long, device=device), -math.log(4)
    ref_logp = torch.full((1,), logp + delta, device=device)
    loss, parts = dak.constrained_loss(
        policy, target, beta=beta, ref_logp=ref_logp, return_parts=True
    )
    d = (ref_logp.double() - parts.logp.double()).item()
    u = beta * d
    gold = 2 / beta * (max(u, 0.0) + math.log1p(math.exp(-abs(u))))
    assert loss.item() == pytest.approx(gold, rel=2e-6)
    weight = 2 / (1 + math.exp(-u)) if u > -700 else 0.0
    assert parts.weight.item() == pytest.approx(weight, rel=2e-5, abs=1e-37)


@pytest.mark.parametrize(
    "policy_inf,ref_inf,loss,weight",
    [(False, True, 0.0, 0.0), (True, False, math.inf, 2.0), (True, True, math.log(2.0), 1.0)],
)
def test_impossible_targets(policy_inf, ref_inf, loss, weight, device):
    """F23: target of probability 0 in one model or in both (then Delta counts as 0)."""
    policy, ref = torch.zeros(1, 5, device=device), torch.zeros(1, 5, device=device)
    policy[0, 2], ref[0, 2] = -torch.inf if policy_inf else 0.0, -torch.inf if ref_inf else 0.0
    policy.requires_grad_()
    target = torch.tensor([2], device=device)
    value, parts = dak.constrained_loss(policy, target, beta=2.0, ref_logits=ref, return_parts=True)
    assert value.item() == pytest.approx(loss) and parts.weight.item() == pytest.approx(weight)
    (grad,) = torch.autograd.grad(value, policy)
    assert torch.isfinite(grad).all()
    assert grad[0, 2].item() == pytest.approx(-weight * (1.0 if policy_inf else 0.8))


def test_the_official_implementation_is_the_surrogate(device):
    """Value w * NLL with w detached and floored at 1e-3; the gradient differs from the exact one by
    the floor only."""
    r = rows(device, T=30)
    got = scalar(r, objective="surrogate", min_weight=1e-3)
    logp, ref_logp = (plain_logp(x.double().cpu(), r.target.cpu()) for x in (r.policy, r.ref))
    weight = (2 * (1 - torch.sigmoid(r.beta.cpu() * (logp - ref_logp)))).clamp(min=1e-3)
    n = (r.target != IGNORE).sum().item()
    assert got[0].item() == pytest.approx((-(weight * logp)).sum().item() / n, rel=1e-5)
    exact = scalar(r)[1]
    above = (weight > 1e-3).to(device)
    torch.testing.assert_close(got[1][above], exact[above], rtol=0, atol=0)


@pytest.mark.parametrize("normalizer", [3, 3.0, torch.tensor(3), torch.tensor(3.0)], ids=str)
def test_normalizer(normalizer, device):
    """F16: an int, a float or a 0-d tensor."""
    r = rows(device)
    given = normalizer.to(device) if isinstance(normalizer, torch.Tensor) else normalizer
    total, grad = scalar(r, "sum")
    loss, g = scalar(r, normalizer=given)
    torch.testing.assert_close(loss, total / 3)
    torch.testing.assert_close(g, grad / 3)


@pytest.mark.parametrize("value", [-1.0, torch.inf, torch.nan])
def test_a_normalizer_that_is_no_count_gives_nan(value, device):
    """Not a loss of 0 and gradients of 0, with which training would go on and learn nothing."""
    r = rows(device)
    loss, grad = scalar(r, normalizer=torch.tensor(value, device=device))
    assert loss.isnan() and grad[r.target != IGNORE].isnan().all()


def test_accumulated_microbatches_equal_the_full_batch(device):
    """F16: with the global token count as normalizer, uneven micro-batches add up."""
    r = rows(device, T=10)
    full = scalar(r)
    n = (r.target != IGNORE).sum()
    parts = [
        scalar(
            type(r)(*(x[i:j] for x in (r.policy, r.ref, r.target, r.beta, r.grad))), normalizer=n
        )
        for i, j in ((0, 3), (3, 10))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], full[0])
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), full[1])


@pytest.mark.parametrize(
    "reduction,kw",
    [("mean", {}), ("sum", {}), ("none", {}), ("mean", {"normalizer": torch.tensor(0)})],
)
def test_nothing_to_train_gives_zero_with_a_gradient_edge(reduction, kw, device):
    """F15: all ignored, the normalizer too: loss 0 and gradient 0, never NaN."""
    r = rows(device)
    r.target.fill_(IGNORE)
    leaf = r.policy.detach().requires_grad_()
    kw = {k: v.to(device) for k, v in kw.items()}
    loss = dak.constrained_loss(
        leaf, r.target, beta=r.beta, ref_logits=r.ref, reduction=reduction, **kw
    )
    assert loss.requires_grad and not loss.any()
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert not grad.any() and not grad.isnan().any()


def test_one_valid_token(device):
    """F15."""
    r = rows(device)
    r.target[1:] = IGNORE
    r.target[0] = 3
    loss, grad = scalar(r)
    (tokens, _) = scalar(r, "sum")
    torch.testing.assert_close(loss, tokens)
    assert grad[0].any() and not grad[1:].any()


@pytest.mark.parametrize("factor", [1.0, 0.25, -3.0, 0.0])
def test_upstream_factor(factor, device):
    r = rows(device)
    leaf = r.policy.detach().requires_grad_()
    loss = factor * dak.constrained_loss(leaf, r.target, beta=r.beta, ref_logits=r.ref)
    (grad,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(grad, factor * scalar(r)[1], rtol=1e-6, atol=1e-9)


def test_a_scalar_loss_can_be_backpropagated_once(device):
    """F18: the second time is an error, not a doubled gradient; reduction='none' may be used as
    often as wanted."""
    r = rows(device)
    leaf = r.policy.detach().requires_grad_()
    loss = dak.constrained_loss(leaf, r.target, beta=r.beta, ref_logits=r.ref)
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()
    tokens = dak.constrained_loss(leaf, r.target, beta=r.beta, ref_logits=r.ref, reduction="none")
    first = torch.autograd.grad(tokens.sum(), leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(tokens.sum(), leaf)[0])


def test_without_grad_nothing_of_the_size_of_the_logits_is_made(device):
    """F19: no_grad and inference_mode give the value and allocate no gradient."""
    r = rows(device)
    expected = scalar(r)[0]
    made = []
    real = torch.empty

    def watch(*a, **k):
        made.append(a)
        return real(*a, **k)

    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", watch)
            leaf = r.policy.detach().requires_grad_()
            loss = dak.constrained_loss(leaf, r.target, beta=r.beta, ref_logits=r.ref)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert not [a for a in made if a and isinstance(a[0], torch.Size) and len(a[0]) == 3]


def test_target_out_of_range_poisons_its_row(device):
    """F14: NaN in that token, its gradient row and the scalar loss; the other rows are
    untouched."""
    for bad in (301, 10**12, -7):
        r = rows(device)
        r.target[0] = bad
        leaf = r.policy.detach().requires_grad_()
        tokens = dak.constrained_loss(
            leaf, r.target, beta=r.beta, ref_logits=r.ref, reduction="none"
        )
        (grad,) = torch.autograd.grad(tokens.sum(), leaf)
        assert tokens[0].isnan() and not tokens[1:].isnan().any()
        assert grad[0].isnan().all() and not grad[1:].isnan().any()
        loss, g = scalar(r)
        assert loss.isnan() and g[0].isnan().all() and not g[1:].isnan().any()


def test_negative_entry_of_beta_poisons_its_row(device):
    r = rows(device)
    r.beta[0] = -0.5
    tokens = dak.constrained_loss(
        r.policy, r.target, beta=r.beta, ref_logits=r.ref, reduction="none"
    )
    assert tokens[0].isnan() and not tokens[1:].isnan().any()


@pytest.mark.parametrize("beta", [0.0, 2.0])
@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_row_has_nothing_finite(poison, beta, device):
    check_poisoned(poison, beta, device)


@pytest.mark.parametrize("ignore", [2, -1, 301, 10**6])
def test_other_ignore_indices(ignore, device):
    """F14: a valid column, -1, and values past the vocabulary as ignore_index."""
    r = rows(device)
    target = torch.where(r.target == IGNORE, ignore, r.target)
    keep = target != ignore
    a = dak.constrained_loss(
        r.policy, target, beta=r.beta, ref_logits=r.ref, ignore_index=ignore, reduction="none"
    )
    b = dak.constrained_loss(
        r.policy, torch.where(keep, target, IGNORE), beta=r.beta, ref_logits=r.ref, reduction="none"
    )
    assert torch.equal(a, b) and not a[~keep].any()
