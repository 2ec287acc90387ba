"""Every logits-level op x backend x dtype against independent fp64 formulas (F29: the oracle shares
no helper)."""

import pytest
import torch
from cases import CASES, DTYPES, FUSED, KINDS, Rows, check, fused, make, values_and_grad

pytestmark = pytest.mark.every_isa

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
OP = pytest.mark.parametrize("op", CASES)


def some(values, fast):
    """All of `values` for `make test`, those in `fast` for `make test-fast`."""
    pack = lambda v: v if isinstance(v, tuple) else (v,)  # noqa: E731
    return [v if v in fast else pytest.param(*pack(v), marks=pytest.mark.slow) for v in values]


# Aligned, odd, one each side of a 4096 block, and the sizes of real vocabularies (F12).
SMALL_V = [(V, torch.float32) for V in (1, 2, 7, 127, 1000, 4095, 4096, 4097)]
SMALL_V += [(V, torch.bfloat16) for V in (1, 7, 1000, 4095, 4096)]
SMALL_V += [(V, torch.float16) for V in (2, 127, 1000, 4097)]
REAL_V = (32000, 50257, 65537, 128256, 262144)


# After the load all is fp32, so that not every kind of row needs every dtype.
HARD = [(kind, torch.float32) for kind in KINDS]
HARD += [(kind, torch.bfloat16) for kind in ("confident_20", "leading_block_masked", "heavy_tails")]
HARD += [(kind, torch.float16) for kind in ("noise", "confident_50", "all_at_plus_1e4")]


@pytest.mark.every_isa(fast=True)
@OP
@pytest.mark.parametrize("kind,dtype", some(HARD, (HARD[2], HARD[12], HARD[14])), ids=str)
def test_hard_rows(op, dtype, kind, device, interpreted):
    """F1, F5, F6, F29: confident, uniform, heavy-tailed, offset, strongly negative and masked
    rows; in tiles of 512 columns at most, the interpreter's narrower rows have several, too."""
    check(op, make(6, 1103 if interpreted else 5003, kind).to(device, dtype))


@pytest.mark.every_isa(fast=True)
@OP
@pytest.mark.parametrize("V,dtype", some(SMALL_V, (SMALL_V[2], SMALL_V[10], SMALL_V[13])), ids=str)
def test_small_vocabularies(op, dtype, V, device, interpreted):
    """F12: V = 1, 2, 7, ... and odd V, whose rows start off any vector boundary."""
    if interpreted and V > 4000:
        V -= 3072  # each side of 1024, the widest tile there
    check(op, make(5, V).to(device, dtype))


@pytest.mark.interpreter_slow
@OP
@pytest.mark.parametrize("V", some(REAL_V, (50257,)))
def test_real_vocabularies(op, V, device, interpreted):
    """F12, F35: 32k to 262k columns, where a probability of 1/V would underflow fp16."""
    if interpreted and V != 50257:
        pytest.skip("one is enough in the interpreter")
    V = 20001 if interpreted else V  # 1/V is below the normal numbers of fp16
    check(
        op,
        make(1 if interpreted else 2, V).to(
            device, torch.float16 if V in (20001, 50257) else torch.bfloat16
        ),
    )


OPTIONS = [{"temperature": x} for x in (0.01, 0.7, 100.0)]
OPTIONS += [{"softcap": 3.0}, {"softcap": 30.0, "temperature": 1.7}]


@OP
@pytest.mark.parametrize("options", some(OPTIONS, (OPTIONS[0], OPTIONS[4])), ids=str)
def test_temperature_and_softcap(op, options, device, interpreted):
    """F22: values and gradients, with the factor 1/T and the slope of tanh."""
    for dtype in (torch.float32, torch.bfloat16)[: 1 if interpreted else 2]:
        check(op, make(5, 600 if interpreted else 1031).to(device, dtype), **options)


@OP
def test_every_layout(op, device):
    """F14, F17, F20: [B, T, V] views, row strides, unaligned starts, shifted labels, stride-0
    gradients."""
    r = make(6, 401).to(device, torch.float32)
    expected = values_and_grad(CASES[op].ours, r)
    wide = torch.full((3, 3, 1000), torch.nan, device=device)
    wide[:, :2, 3:404] = r.policy.view(3, 2, 401)
    padded = torch.cat([torch.zeros(1, dtype=torch.long, device=device), r.target])[
        1:
    ]  # not 16-byte aligned
    view = Rows(
        wide[:, :2, 3:404],
        r.ref.view(3, 2, 401),
        padded.view(3, 2).int(),
        r.beta.view(3, 2),
        r.grad.view(3, 2),
    )
    got = values_and_grad(CASES[op].ours, view)
    for name, a, b in zip(("value", "gradient"), got, expected, strict=True):
        # The row is summed in another alignment: equal to rounding, not to the bit.
        torch.testing.assert_close(
            a.reshape(b.shape), b, rtol=2e-6, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    ones = Rows(
        r.policy, r.ref, r.target, r.beta, torch.ones((), device=device).expand(6)
    )  # what .sum() sends back
    dense = Rows(r.policy, r.ref, r.target, r.beta, torch.ones(6, device=device))
    assert torch.equal(
        values_and_grad(CASES[op].ours, ones)[1], values_and_grad(CASES[op].ours, dense)[1]
    )


@OP
def test_ignored_rows_are_never_used(op, device):
    """F15, F17: NaN in the logits, in beta or in the upstream gradient of an ignored row does not
    leak."""
    r = make(6, 300).to(device, torch.float32)
    clean = values_and_grad(CASES[op].ours, r)
    out = r.target == -100
    for x in (r.policy, r.ref, r.beta, r.grad):
        x[out] = torch.nan
    dirty = values_and_grad(CASES[op].ours, r)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b) and not b[out].any()


@OP
def test_repeatable_and_independent_of_other_rows(op, device, interpreted):
    """F31: bitwise the same ten times (where threads race), and whatever the neighbours hold."""
    r = make(5, 1027 if interpreted else 4099).to(device, torch.bfloat16)
    first = values_and_grad(CASES[op].ours, r)
    for _ in range(1 if interpreted else 9):
        assert all(
            torch.equal(a, b)
            for a, b in zip(first, values_and_grad(CASES[op].ours, r), strict=True)
        )
    alone = values_and_grad(
        CASES[op].ours, Rows(r.policy[3:4], r.ref[3:4], r.target[3:4], r.beta[3:4], r.grad[3:4])
    )
    assert torch.equal(alone[0], first[0][3:4]) and torch.equal(alone[1], first[1][3:4])


@OP
@DTYPE
def test_results_are_fp32_and_gradients_have_the_dtype_of_the_logits(op, dtype, device):
    """F10: token losses are never stored in 16 bits."""
    value, grad = values_and_grad(CASES[op].ours, make(4, 33).to(device, dtype))
    assert value.dtype == torch.float32 and grad.dtype == dtype


@OP
def test_no_rows(op, device):
    """F15: T = 0."""
    r = make(4, 33).to(device, torch.float32)
    value, grad = values_and_grad(
        CASES[op].ours, Rows(*(x[:0] for x in (r.policy, r.ref, r.target, r.beta, r.grad)))
    )
    assert value.shape == (0,) and grad.shape == (0, 33)


@OP
def test_one_dimension_and_four(op, device):
    r = make(8, 65).to(device, torch.float32)
    flat, _ = values_and_grad(CASES[op].ours, r)
    cube = Rows(
        *(x.view(2, 2, 2, *x.shape[1:]) for x in (r.policy, r.ref, r.target, r.beta, r.grad))
    )
    value, grad = values_and_grad(CASES[op].ours, cube)
    assert torch.equal(value.flatten(), flat) and grad.shape == (2, 2, 2, 65)
    one, _ = values_and_grad(
        CASES[op].ours, Rows(r.policy[0], r.ref[0], r.target[0], r.beta[0], r.grad[0])
    )
    assert one.shape == () and torch.equal(one, flat[0])


@OP
def test_scaling_the_upstream_gradient_by_the_fp16_loss_scale(op, device):
    """F21: a loss scale of 2^16 overflows the fp16 gradient only where the true value is past
    65504."""
    r = make(5, 900).to(device, torch.float16)
    big = Rows(r.policy, r.ref, r.target, r.beta, torch.full((5,), 2.0**15, device=device))
    grad = values_and_grad(CASES[op].ours, big)[1]
    gold = values_and_grad(CASES[op].plain, big.to("cpu", torch.float64))[1]
    fits = gold.abs() < 6e4
    assert torch.isfinite(grad.cpu()[fits]).all() and fits.any()


@pytest.mark.parametrize("op", FUSED)
@DTYPE
def test_value_and_gradient_in_one_call(op, dtype, device, interpreted):
    """The internal ops that the linear losses use, against the same formulas."""
    shapes = ((1, "noise"), (1031, "noise"), (5003, "confident_20"), (4096, "heavy_tails"))
    for V, kind in shapes[: 2 if interpreted else 4]:
        check(op, make(5, V, kind).to(device, dtype), fused)
    check(op, make(5, 900).to(device, dtype), fused, temperature=0.7, softcap=30.0)


@pytest.mark.parametrize("op", FUSED)
def test_one_call_leaves_out_ignored_rows(op, device):
    r = make(6, 300).to(device, torch.float32)
    clean = fused(op, r)
    ignored = r.target == -100
    for x in (r.policy, r.ref, r.grad):
        x[ignored] = torch.nan
    for a, b in zip(clean, fused(op, r), strict=True):
        assert torch.equal(a, b) and not b[ignored].any()
