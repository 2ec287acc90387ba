"""token_kl: conventions, exact zeros, masked columns."""

import math

import pytest
import torch
from cases import make

import deepalign_kernels as dak
from deepalign_kernels import backends

pytestmark = [pytest.mark.every_isa, pytest.mark.interpreter_slow]

DIRECTIONS = ("policy_ref", "ref_policy", "js")


def kl_and_grad(policy, ref, **kw):
    leaf = policy.detach().requires_grad_()
    kl = dak.token_kl(leaf, ref, **kw)
    return kl.detach(), torch.autograd.grad(kl.sum(), leaf)[0]


def test_directions_by_hand(device):
    """F24: two columns, q = (1/2, 1/2) and p = (1/4, 3/4)."""
    q = torch.zeros(1, 2, device=device)
    p = torch.tensor([[0.0, math.log(3.0)]], device=device)
    kl_qp = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    kl_pq = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert dak.token_kl(q, p).item() == pytest.approx(kl_qp, rel=1e-6)
    assert dak.token_kl(q, p, direction="policy_ref").item() == pytest.approx(kl_qp, rel=1e-6)
    assert dak.token_kl(q, p, direction="ref_policy").item() == pytest.approx(kl_pq, rel=1e-6)
    b, m = 0.3, (0.3 * 0.25 + 0.7 * 0.5, 0.3 * 0.75 + 0.7 * 0.5)
    js = b * (0.25 * math.log(0.25 / m[0]) + 0.75 * math.log(0.75 / m[1]))
    js += (1 - b) * 0.5 * (math.log(0.5 / m[0]) + math.log(0.5 / m[1]))
    assert dak.token_kl(q, p, direction="js", js_beta=b).item() == pytest.approx(js, rel=1e-5)


@pytest.mark.parametrize(
    "kind,dtype",
    [
        ("noise", torch.float32),
        ("confident_50", torch.bfloat16),
        ("common_offset", torch.float16),
        ("leading_block_masked", torch.bfloat16),
        ("uniform", torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_logits_give_exactly_zero(direction, kind, dtype, device, interpreted):
    """F9: value and gradient, to the bit, also where two tensors of different strides hold the
    rows."""
    V = 601 if interpreted else 5001  # of several tiles, the last in part
    r = make(2, V, kind).to(device, dtype)
    wide = torch.zeros(2, V + 999, dtype=dtype, device=device)
    wide[:, :V] = r.policy
    for other in (r.policy.clone(), wide[:, :V]):
        value, grad = kl_and_grad(r.policy, other, direction=direction, temperature=0.7)
        assert not value.any() and not grad.any()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("eps", [1e-3, 1e-5])
def test_nearly_equal_logits(direction, eps, device):
    """F9: at least -1e-6, and within 1e-6 of the fp64 value."""
    g = torch.Generator().manual_seed(3)
    policy = (4 * torch.randn(4, 3000, generator=g)).to(device)
    ref = policy + eps * torch.randn(4, 3000, generator=g).to(device)
    value = dak.token_kl(policy, ref, direction=direction)
    q, p = policy.double().log_softmax(-1), ref.double().log_softmax(-1)
    m = torch.logaddexp(q, p) - math.log(2)
    gold = {
        "policy_ref": (q.exp() * (q - p)).sum(-1),
        "ref_policy": (p.exp() * (p - q)).sum(-1),
        "js": 0.5 * ((q.exp() * (q - m)).sum(-1) + (p.exp() * (p - m)).sum(-1)),
    }[direction]
    assert value.min() >= -1e-6
    assert (value.double() - gold).abs().max() <= 1e-6


def test_js_is_symmetric_bounded_and_tends_to_the_kls(device):
    """F24: beta <-> 1 - beta with the models swapped; at most log 2; JS / beta -> KL at the
    ends."""
    r = make(6, 1501).to(device, torch.float32)
    a = dak.token_kl(r.policy, r.ref, direction="js", js_beta=0.2)
    b = dak.token_kl(r.ref, r.policy, direction="js", js_beta=0.8)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert dak.token_kl(r.policy, r.ref, direction="js").max() <= math.log(2) + 1e-6
    far = torch.zeros(2, 2, device=device)
    far[0, 0] = far[1, 1] = 200.0
    assert dak.token_kl(far[:1], far[1:], direction="js").item() == pytest.approx(
        math.log(2), rel=1e-6
    )
    for b in (1e-30, 1e-9, 1 - 1e-9):  # 1 - b or b itself is 1 in fp32
        value, grad = kl_and_grad(far[:1], far[1:], direction="js", js_beta=b)
        entropy = -b * math.log(b) - (1 - b) * math.log1p(-b)  # of the mixture's two parts
        assert value.item() == pytest.approx(entropy, abs=1e-6) and grad.abs().max() <= 1e-6
    near, other = r.policy * 0.1, r.ref * 0.1
    for end, direction in ((1e-4, "ref_policy"), (1 - 1e-4, "policy_ref")):
        js = dak.token_kl(near, other, direction="js", js_beta=end) / min(end, 1 - end)
        torch.testing.assert_close(
            js, dak.token_kl(near, other, direction=direction), rtol=1e-2, atol=1e-3
        )


def test_js_where_both_models_underflow(device):
    """F3: columns where both probabilities are far below fp32 must not give log 0."""
    policy, ref = (
        torch.full((1, 64), -500.0, device=device),
        torch.full((1, 64), -500.0, device=device),
    )
    policy[0, 0], ref[0, 1] = 500.0, 500.0
    value, grad = kl_and_grad(policy, ref, direction="js")
    assert value.item() == pytest.approx(math.log(2), rel=1e-6) and torch.isfinite(grad).all()


@pytest.mark.parametrize("V", [5, 5000])
def test_masked_columns(V, device):
    """F4: own probability 0 counts 0 (also where both are 0); own finite and other masked is
    +inf."""
    r = make(3, V).to(device, torch.float32)
    policy, ref = r.policy, r.ref
    policy[0, 1] = ref[0, 1] = -torch.inf  # both masked
    policy[1, 2] = -torch.inf  # only the policy
    ref[2, 3] = -torch.inf  # only the reference
    forward, grad_f = kl_and_grad(policy, ref, direction="policy_ref")
    assert torch.isfinite(forward[:2]).all() and forward[2] == torch.inf
    assert (
        torch.isfinite(grad_f[:2]).all() and grad_f[2].isnan().all()
    )  # no gradient to follow at +inf
    reverse, grad_r = kl_and_grad(policy, ref, direction="ref_policy")
    assert (
        reverse[1] == torch.inf
        and torch.isfinite(reverse[[0, 2]]).all()
        and torch.isfinite(grad_r).all()
    )
    js, grad_js = kl_and_grad(policy, ref, direction="js")
    assert torch.isfinite(js).all() and torch.isfinite(grad_js).all()
    # dropping the doubly masked column changes nothing
    keep = [c for c in range(V) if c != 1]
    for kw in ({"direction": d} for d in DIRECTIONS):
        whole = dak.token_kl(policy[:1], ref[:1], **kw)
        torch.testing.assert_close(
            whole, dak.token_kl(policy[:1, keep], ref[:1, keep], **kw), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("masked", ["own", "both"])
@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min, -1e9], ids=str)
def test_a_mask_may_be_any_low_number(value, masked, device):
    """A masked column counts nothing and takes no gradient, however its logit says so: one of them,
    or so many that whole lanes see no other."""
    r = make(2, 1500).to(device, torch.float32)
    own, other = r.policy.clone(), r.ref.clone()
    for x in (own, other) if masked == "both" else (own,):
        x[0, 7], x[1, 500:] = value, value
    for direction in ("policy_ref", "ref_policy"):
        policy, ref = (own, other) if direction == "policy_ref" else (other, own)
        kl, grad = kl_and_grad(policy, ref, direction=direction)
        q, p = (x.detach().double().log_softmax(-1) for x in (own, other))
        terms = torch.where(q.exp() == 0, 0.0, q.exp() * (q - p))
        gold = terms.sum(-1)
        torch.testing.assert_close(kl.double(), gold, rtol=2e-6, atol=2e-6)
        if direction == "policy_ref":
            gold_grad = torch.where(q.exp() == 0, 0.0, q.exp() * (q - p - gold[:, None]))
        else:
            gold_grad = p.exp() - q.exp()
        torch.testing.assert_close(grad.double(), gold_grad, rtol=2e-6, atol=2e-6)
    stats = dak.token_stats(own, other)
    torch.testing.assert_close(stats.kl_policy_ref.double(), gold, rtol=2e-6, atol=2e-6)
    entropy = -torch.where(q.exp() == 0, 0.0, q.exp() * q).sum(-1)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("direction,policy_is_own", [("policy_ref", True), ("ref_policy", False)])
@pytest.mark.parametrize("at", [0, 4999])
def test_support_mismatch_is_infinite_even_where_the_own_probability_underflows(
    direction, policy_is_own, at, device
):
    """F4: e^-300 is 0 in fp32, and the KL is +inf all the same, before or after the maximum was
    met."""
    own, other = torch.zeros(1, 5000, device=device), torch.zeros(1, 5000, device=device)
    own[0, at], own[0, 2500], other[0, at] = -300.0, 0.0, -torch.inf
    policy, ref = (own, other) if policy_is_own else (other, own)
    assert dak.token_kl(policy, ref, direction=direction).item() == torch.inf


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_row_of_only_minus_infinity_is_nan_like_torch(direction, device):
    """F5: undefined, so NaN, unless the row is not valid."""
    policy, ref = (
        torch.full((2, 700), -torch.inf, device=device),
        torch.zeros(2, 700, device=device),
    )
    valid = torch.tensor([True, False], device=device)
    value = dak.token_kl(policy, ref, direction=direction, valid=valid)
    assert value[0].isnan() and value[1] == 0


def test_shift_invariance(device):
    """F6: adding 64 to every logit of a row changes nothing beyond the rounding of the inputs."""
    r = make(4, 2000).to(device, torch.float32)
    quarter = lambda x: (x * 4).round() / 4  # noqa: E731  exact after the shift
    policy, ref = quarter(r.policy), quarter(r.ref)
    for direction in DIRECTIONS:
        a = kl_and_grad(policy, ref, direction=direction)
        b = kl_and_grad(policy + 64, ref - 64, direction=direction)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [(1.0, 0.0), (0.7, 5.0)], ids=str)
def test_js_parts_add_up_over_shards(options, device, backend):
    """Under the normalisers of the whole row, the columns' parts sum to what one sweep gives."""
    if why := backends.unavailable(backend, "token_js_parts", device.type):
        pytest.skip(f"{backend} token_js_parts: {why}")
    r = make(6, 5003).to(device, torch.bfloat16)
    policy, ref, valid = r.policy[None], r.ref[None], r.target != -100
    call = torch.ops.deepalign
    js, norm_q, norm_p, center = call.token_kl_fwd(policy, ref, valid, 2, 0.3, *options)
    sums = [0.0, 0.0]
    for a, b in ((0, 1), (1, 2048), (2048, 5003)):
        parts = call.token_js_parts(
            policy[..., a:b], ref[..., a:b], valid, norm_q, norm_p, 0.3, *options
        )
        assert not any(part[~valid].any() for part in parts)
        sums = [s + part for s, part in zip(sums, parts, strict=True)]
    torch.testing.assert_close(sums[0], center, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(0.3 * sums[1] + 0.7 * sums[0], js, rtol=2e-6, atol=2e-6)
