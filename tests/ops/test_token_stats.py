"""token_stats against independent formulas and against the other ops."""

import math

import pytest
import torch
from cases import IGNORE, KINDS, make, plain_kl, plain_logp

import deepalign_kernels as dak
from deepalign_kernels.testing import assert_in_budget

pytestmark = [pytest.mark.every_isa, pytest.mark.interpreter_slow]

FLOATS = ("logp", "ref_logp", "kl_policy_ref", "kl_ref_policy", "js", "entropy", "ref_entropy")


def plain_stats(r, dtype):
    r = r.to("cpu", dtype)
    keep = r.target != IGNORE
    entropies = []
    for x in (r.policy, r.ref):
        logp = x.masked_fill(x == -torch.inf, -1e30).log_softmax(-1)
        entropies.append(torch.where(keep, -(logp.exp() * logp).sum(-1), 0))
    return {
        "logp": plain_logp(r.policy, r.target),
        "ref_logp": plain_logp(r.ref, r.target),
        **{f"kl_{d}": plain_kl(r.policy, r.ref, r.target, d) for d in ("policy_ref", "ref_policy")},
        "js": plain_kl(r.policy, r.ref, r.target, "js"),
        "entropy": entropies[0],
        "ref_entropy": entropies[1],
    }


# What comes after the load is fp32 for every dtype of the logits.
HARD = [(kind, torch.float32) for kind in KINDS]
HARD += [("confident_20", torch.bfloat16), ("leading_block_masked", torch.bfloat16)]
HARD += [("noise", torch.float16), ("all_at_plus_1e4", torch.float16)]
FAST = (*HARD[-4:], ("noise", torch.float32), ("nearly_equal", torch.float32))


@pytest.mark.parametrize(
    "kind,dtype",
    [pytest.param(*x, marks=[pytest.mark.slow] * (x not in FAST)) for x in HARD],
    ids=str,
)
def test_every_field(kind, dtype, device, interpreted):
    r = make(5, 1099 if interpreted else 4999, kind).to(device, dtype)
    got, gold, base = (
        dak.token_stats(r.policy, r.ref, r.target),
        plain_stats(r, torch.float64),
        plain_stats(r, torch.float32),
    )
    for name in FLOATS:
        assert_in_budget(name, getattr(got, name), base[name], gold[name])
    agree = (r.policy.argmax(-1) == r.ref.argmax(-1)) & (r.target != IGNORE)
    assert got.top1_agree.dtype == torch.bool and torch.equal(got.top1_agree, agree)


@pytest.mark.parametrize("V", [1, 2, 7, 4097])
def test_small_vocabularies(V, device, interpreted):
    r = make(5, 1025 if interpreted and V > 1025 else V).to(device, torch.float32)
    got, gold, base = (
        dak.token_stats(r.policy, r.ref, r.target),
        plain_stats(r, torch.float64),
        plain_stats(r, torch.float32),
    )
    for name in FLOATS:
        assert_in_budget(name, getattr(got, name), base[name], gold[name])


def test_the_optional_fields(device):
    r = make(4, 100).to(device, torch.float32)
    got = dak.token_stats(r.policy, r.ref, js_beta=None)
    assert got.logp is None and got.ref_logp is None and got.js is None
    assert (got.kl_policy_ref > 0).all()
    torch.testing.assert_close(
        got.kl_policy_ref, dak.token_kl(r.policy, r.ref), rtol=1e-6, atol=1e-6
    )


def test_rows_left_out(device):
    r = make(4, 100).to(device, torch.float32)
    valid = torch.tensor([True, False, True, True], device=device)
    target = torch.tensor([1, 1, IGNORE, 5], device=device)
    r.policy[1:3] = torch.nan
    got = dak.token_stats(r.policy, r.ref, target, valid=valid)
    for x in got:
        assert not x[1:3].any() and x[3].isfinite()
    assert not any(x.requires_grad for x in got)


def test_ties_take_the_first_maximum(device):
    """F25."""
    policy, ref = torch.zeros(2, 9000, device=device), torch.zeros(2, 9000, device=device)
    ref[0, 8000] = 1.0
    policy[1, 5] = policy[1, 8999] = ref[1, 5] = 1.0
    assert dak.token_stats(policy, ref).top1_agree.tolist() == [False, True]


@pytest.mark.parametrize("V", [10, 1037])
def test_nothing_agrees_with_a_nan(V, device):
    """In the policy, the reference or both, at the maximum, before or behind it."""
    policy = torch.zeros(10, V, device=device)
    policy[:, 4] = 1.0
    ref = policy.clone()
    for i, column in enumerate((4, 0, V - 1)):
        policy[i, column] = ref[3 + i, column] = torch.nan
        policy[6 + i, column] = ref[6 + i, column] = torch.nan
    assert dak.token_stats(policy, ref).top1_agree.tolist() == [False] * 9 + [True]


def test_infinities_and_poison(device):
    policy, ref = torch.zeros(1, 10, device=device), torch.zeros(1, 10, device=device)
    ref[0, 3] = -torch.inf
    got = dak.token_stats(policy, ref, torch.tensor([99], device=device))
    assert got.logp.isnan().all() and got.ref_logp.isnan().all()
    assert got.kl_policy_ref.item() == torch.inf and math.isfinite(got.kl_ref_policy.item())
    assert got.entropy.item() == pytest.approx(
        math.log(10)
    ) and got.ref_entropy.item() == pytest.approx(math.log(9))


def test_batched_and_strided(device):
    r = make(6, 321).to(device, torch.bfloat16)
    wide = torch.zeros(2, 4, 400, dtype=torch.bfloat16, device=device)
    wide[:, :3, :321] = r.policy.view(2, 3, 321)
    a = dak.token_stats(r.policy, r.ref, r.target)
    b = dak.token_stats(wide[:, :3, :321], r.ref.view(2, 3, 321), r.target.view(2, 3))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y.flatten(), rtol=2e-6, atol=2e-6)
