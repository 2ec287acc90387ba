"""The CUDA C++ kernels, run on the CPU by tests/support/cuda_on_host, against fp64: formulas,
clusters, tiles, alignment, barriers. What it cannot show: the GPU's exp2, its memory model, its
speed."""

import cuda_on_host
import pytest
import torch
from cases import (
    COMPLETE as CASES,
)
from cases import (
    DTYPES,
    FUSED,
    KINDS,
    POISONS,
    check,
    check_poisoned,
    fused,
    make,
    values_and_grad,
)
from cuda_on_host import pretend

from deepalign_kernels import backends
from deepalign_kernels.reference import token_kl as spec_kl
from deepalign_kernels.reference import token_stats as spec_stats
from deepalign_kernels.testing import assert_in_budget

pytestmark = pytest.mark.skipif(
    cuda_on_host.why_not() is not None, reason=f"cuda_on_host: {cuda_on_host.why_not()}"
)

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
OP = pytest.mark.parametrize("op", CASES)
PLAIN = (-100, 1.0, 0.0)
# Pretended GPUs on which rows of a few thousand columns take every path: one block, clusters up to
# 16, rows that do not fit (read again), no clusters.
GPUS = {
    "whole": {},
    "clusters": {"shared": 9000},
    "no_cluster_of_16": {"shared": 4600, "big_clusters": False},
    "read_again": {"shared": 2600},
    "sm_80": {"shared": 6000, "major": 8},
    "newer_than_the_build": {"shared": 6000, "major": 12, "ptx": 80},
}


def native(op):
    return backends._choose(op, "cpu", torch.float32, "native")


def stats(policy, ref, target, *options):
    return native("token_stats_fwd")(policy, ref, target, None, -100, *options)


@OP
@DTYPE
@pytest.mark.parametrize("V", [1, 7, 127, 1031])
def test_small_vocabularies(op, dtype, V):
    with pretend():
        check(op, make(5, V).to("cpu", dtype))


@OP
@DTYPE
@pytest.mark.parametrize("gpu", GPUS)
def test_every_layout_of_a_row_over_blocks(op, dtype, gpu):
    with pretend(**GPUS[gpu], order=len(gpu)):
        check(op, make(4, 3001).to("cpu", dtype))


@OP
@pytest.mark.parametrize("kind", KINDS)
def test_hard_rows(op, kind):
    for gpu, dtype in (("clusters", torch.bfloat16), ("read_again", torch.float32)):
        with pretend(**GPUS[gpu]):
            check(op, make(6, 2001, kind).to("cpu", dtype))


@OP
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.01},
        {"temperature": 0.7},
        {"temperature": 100.0},
        {"softcap": 3.0},
        {"softcap": 30.0, "temperature": 1.7},
    ],
    ids=str,
)
def test_temperature_and_softcap(op, options):
    for dtype in (torch.float32, torch.bfloat16):
        with pretend(shared=4000):
            check(op, make(5, 1031).to("cpu", dtype), **options)


@pytest.mark.parametrize("op", FUSED)
@pytest.mark.parametrize("gpu", GPUS)
def test_value_and_gradient_in_one_launch(op, gpu):
    for dtype in DTYPES:
        with pretend(**GPUS[gpu], order=3) as host:
            for kind in ("noise", "confident_50", "leading_block_masked", "nearly_equal"):
                before = host.host_launches()
                check(op, make(4, 1001, kind).to("cpu", dtype), fused)
                assert host.host_launches() == before + 1
            check(op, make(4, 901).to("cpu", dtype), fused, temperature=0.01)
            check(op, make(4, 901).to("cpu", dtype), fused, temperature=1.7, softcap=30.0)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("options", [(0.5, 1.0, 0.0), (0.0, 0.7, 0.0), (0.1, 1.0, 30.0)], ids=str)
def test_stats(gpu, options):
    with pretend(**GPUS[gpu]):
        kinds = ("noise", "confident_20", "leading_block_masked", "uniform")
        for kind, dtype in zip(kinds, (*DTYPES, torch.float32), strict=True):
            r = make(5, 1501, kind).to("cpu", dtype)
            got = stats(r.policy[None], r.ref[None], r.target, *options)
            base, gold = (
                spec_stats.token_stats_fwd(
                    r.policy[None].to(d), r.ref[None].to(d), r.target, None, -100, *options
                )
                for d in (torch.float32, torch.float64)
            )
            for i in range(8):
                assert_in_budget(f"row {i} {kind} {dtype}", got[i], base[i], gold[i])
            if options[0] > 0:  # the divergence of either model from the mixture
                found, base, gold = (_js_parts(r, d, options) for d in (None, *ACCURATE))
                for i in range(2):
                    assert_in_budget(f"part {i} {kind} {dtype}", found[i], base[i], gold[i])


ACCURATE = (torch.float32, torch.float64)


def _js_parts(r, dtype, options):
    """token_js_parts on the shard [100, 1201) of the columns; `dtype` for the specification."""
    x, y, valid = r.policy[None], r.ref[None], r.target != -100
    _, *norms, _ = native("token_kl_fwd")(x, y, valid, 2, *options)
    x, y, op = x[..., 100:1201], y[..., 100:1201], native("token_js_parts")
    if dtype is not None:
        x, y, norms = x.to(dtype), y.to(dtype), [n.to(dtype) for n in norms]
        op = spec_kl.token_js_parts
    return op(x, y, valid, *norms, *options)


@OP
@pytest.mark.parametrize("shared", [227 << 10, 5000, 2600])
def test_no_barrier_is_missing(op, shared):
    """Whatever order the threads run in, every bit is the same."""
    r = make(3, 1501).to("cpu", torch.bfloat16)
    with pretend(shared):
        first = values_and_grad(CASES[op].ours, r)
    for order in (1, 2, 3):
        with pretend(shared, order=order):
            again = values_and_grad(CASES[op].ours, r)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), order


@pytest.mark.parametrize("order", [0, 1, 7])
def test_rows_are_laid_over_the_blocks_that_hold_them(order):
    """H200: V = 128256 bf16 in clusters of 4, with two models of 8; small rows in one block."""
    x, y = (torch.randn(1, 1, 128256).bfloat16() for _ in range(2))
    target = torch.tensor([5])
    with pretend(order=order) as gpu:
        logp, _ = native("token_logp_fwd")(x, target, *PLAIN)
        assert gpu.host_last_cluster() == 4
        kl = native("token_kl_fwd")(x, y, None, 0, 0.5, 1.0, 0.0)[0]
        assert gpu.host_last_cluster() == 8 and gpu.host_last_bytes() < 76 << 10
        native("token_logp_fwd")(x[..., :32000], target, *PLAIN)
        assert gpu.host_last_cluster() == 1
        native("token_kl_fwd")(x.float(), y.float(), None, 0, 0.5, 1.0, 0.0)
        assert gpu.host_last_cluster() == 16
        # The limit of shared memory fits every call, whatever other threads launch in between, and
        # a shape seen before asks the driver nothing.
        asked = gpu.host_queries()
        native("token_logp_fwd")(x[..., :32000], target, *PLAIN)
        native("token_kl_fwd")(x.float(), y.float(), None, 0, 0.5, 1.0, 0.0)
        assert gpu.host_queries() == asked and gpu.host_dynamic_limit() == 227 << 10
    with pretend(major=12, ptx=80) as gpu:
        native("token_logp_fwd")(x, target, *PLAIN)
        assert gpu.host_last_cluster() == 1
    q, p = (z.double().log_softmax(-1)[0, 0] for z in (x, y))
    torch.testing.assert_close(logp.double()[0], q[5], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(kl.double()[0], (q.exp() * (q - p)).sum(), rtol=1e-6, atol=2e-6)


@DTYPE
@pytest.mark.parametrize("shared", [227 << 10, 2600])
@pytest.mark.parametrize("vocab", [33, 1501])
def test_gradient_may_overwrite_the_logits(dtype, shared, vocab):
    r = make(6, vocab).to("cpu", dtype)
    policy, ref, valid = r.policy[None], r.ref[None], r.target != -100
    loss = (r.target, r.beta, ref, None, torch.tensor(0.125), -100, False, 0.0, 1.0, 0.0)
    with pretend(shared, order=5):
        for op, arguments in _gradients(policy, ref, valid, r, loss):
            apart, x = torch.empty_like(policy), policy.clone()
            arguments(native(op), policy, apart)
            arguments(native(op), x, x)
            assert torch.equal(apart, x), op


def _gradients(policy, ref, valid, r, loss):
    _, norm = native("token_logp_fwd")(policy, r.target, *PLAIN)
    yield "token_logp_bwd", lambda f, x, out: f(r.grad, x, r.target, norm, *PLAIN, out)
    for d in range(3):
        o = (d, 0.3, 1.0, 0.0)
        _, *saved = native("token_kl_fwd")(policy, ref, valid, *o)
        yield (
            "token_kl_bwd",
            lambda f, x, out, o=o, s=saved: f(r.grad, x, ref, valid, *s, *o, out),
        )
        yield "token_kl_fused", lambda f, x, out, o=o: f(r.grad, x, ref, valid, *o, out)
    yield "token_logp_fused", lambda f, x, out: f(r.grad, x, r.target, *PLAIN, out)
    yield "constrained_loss_fused", lambda f, x, out: f(x, *loss, out)


@pytest.mark.slow
@DTYPE
@pytest.mark.parametrize("shared", [227 << 10, 2600])
def test_strides_and_alignment(dtype, shared):
    """Rows that start anywhere, each matrix elsewhere; nothing is written beside them."""
    r = make(6, 999).to("cpu", dtype)

    def spread(x, at):
        wide = torch.full((1, 6, 1016), torch.nan, dtype=dtype)
        wide[..., at : at + 999] = x
        return wide, wide[..., at : at + 999]

    with pretend(shared):
        for at_x, at_y, at_out in ((0, 0, 0), (3, 3, 3), (1, 2, 5), (8, 0, 3)):
            policy, ref = spread(r.policy[None], at_x)[1], spread(r.ref[None], at_y)[1]
            valid = r.target != -100
            loss = (r.target, r.beta, ref, None, torch.tensor(0.125), -100, False, 0.0, 1.0, 0.0)
            for op, arguments in _gradients(policy, ref, valid, r, loss):
                expected = torch.empty(1, 6, 999, dtype=dtype)
                arguments(native(op), r.policy[None], expected)
                wide, out = spread(torch.zeros(1, 6, 999, dtype=dtype), at_out)
                arguments(native(op), policy, out)
                # Another alignment is another order of summation: equal to rounding.
                near = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
                torch.testing.assert_close(out, expected, rtol=near, atol=2e-6)
                assert wide[..., :at_out].isnan().all() and wide[..., at_out + 999 :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_gradient_of_fp32_logits_is_rounded_to_nearest(dtype):
    r = make(6, 1501)
    policy, ref, valid = r.policy[None], r.ref[None], r.target != -100
    loss = (r.target, r.beta, ref, None, torch.tensor(0.125), -100, False, 0.0, 1.0, 0.0)
    with pretend(4000):
        for op, arguments in _gradients(policy, ref, valid, r, loss):
            full, half = torch.empty_like(policy), torch.empty(policy.shape, dtype=dtype)
            arguments(native(op), policy, full)
            arguments(native(op), policy, half)
            assert torch.equal(half, full.to(dtype)), op


def test_equal_logits_give_exactly_nothing():
    x = (4 * torch.randn(1, 3, 2001)).bfloat16()
    for gpu in GPUS.values():
        with pretend(**gpu):
            for direction in range(3):
                for softcap, temperature in ((0.0, 1.0), (0.0, 0.7), (30.0, 1.3)):
                    o = (direction, 0.3, temperature, softcap)
                    kl, *saved = native("token_kl_fwd")(x, x.clone(), None, *o)
                    out = torch.empty_like(x)
                    native("token_kl_bwd")(torch.ones(3), x, x.clone(), None, *saved, *o, out)
                    assert not kl.any() and not out.any(), o
                    out.fill_(torch.nan)
                    kl = native("token_kl_fused")(torch.ones(3), x, x.clone(), None, *o, out)
                    assert not kl.any() and not out.any(), o


def test_infinities_of_a_masked_column():
    """+inf where only the second model masks a column, in whichever block or tile it is."""
    x, y = (torch.randn(1, 1, 2001) for _ in range(2))
    for gpu in GPUS.values():
        with pretend(**gpu):
            for column in (0, 1, 700, 1999, 2000):
                masked = y.clone()
                masked[..., column] = -torch.inf
                kl, *saved = native("token_kl_fwd")(x, masked, None, 0, 0.5, 1.0, 0.0)
                out = torch.empty_like(x)
                grad = torch.ones(1)
                native("token_kl_bwd")(grad, x, masked, None, *saved, 0, 0.5, 1.0, 0.0, out)
                assert kl.item() == torch.inf and out.isnan().all()
                native("token_kl_fused")(grad, x, masked, None, 0, 0.5, 1.0, 0.0, out.zero_())
                assert out.isnan().all()
                back = native("token_kl_fwd")(x, masked, None, 1, 0.5, 1.0, 0.0)[0]
                assert torch.isfinite(back).all()
                peak = x.clone()
                peak[..., column] += 60
                logp, norm = native("token_logp_fwd")(peak, torch.tensor([column]), *PLAIN)
                assert logp.item() == 0.0 and norm[0, 0] == peak.max()


def test_targets_that_are_not_there_and_rows_that_are_left_out():
    x = torch.randn(1, 3, 501)
    target = torch.tensor([-100, 501, 3])
    x[0, 0] = torch.nan  # never read
    with pretend(2600):
        logp, norm = native("token_logp_fwd")(x, target, *PLAIN)
        assert logp[0] == 0 and logp[1].isnan() and logp[2] < 0 and not norm[0].any()
        out = torch.empty_like(x)
        grad = torch.tensor([torch.nan, 1.0, 1.0])
        native("token_logp_bwd")(grad, x, target, norm, *PLAIN, out)
        assert not out[0, 0].any() and out[0, 1].isnan().all() and torch.isfinite(out[0, 2]).all()
        for poison in (torch.nan, -torch.inf):
            x[0, 2, slice(3, 4) if poison != poison else slice(None)] = poison
            logp, norm = native("token_logp_fwd")(x, target, *PLAIN)
            native("token_logp_bwd")(grad, x, target, norm, *PLAIN, out)
            assert logp[2].isnan() and out[0, 2].isnan().all()
        x[0, 2] = 1.0
        rows = stats(x, x.clone(), target, 0.5, 1.0, 0.0)
        assert not rows[:, 0].any() and rows[:2, 1].isnan().all() and (rows[2:5, 1:] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", ["policy", "ref", "both"])
def test_masks_of_finite_numbers(dtype, masked):
    """A column, the likeliest one, whole lanes or nearly a whole row at -inf or at a number that
    stands for it: KLs, gradients, entropies as in fp64."""
    for value in (-torch.inf, torch.finfo(dtype).min, -1e30, -1e9):
        r = make(6, 1003)
        policy, ref = r.policy.clone(), r.ref.clone()
        for x in (policy,) * (masked != "ref") + (ref,) * (masked != "policy"):
            x[0, 7], x[1, r.policy[1].argmax()], x[2, :512] = value, value, value
            x[3, 5:], x[4, -64:], x[5, ::2] = value, value, value
        policy, ref = policy.to(dtype)[None], ref.to(dtype)[None]
        golds, bases = (
            _spec_of_masks(policy.to(d), ref.to(d)) for d in (torch.float64, torch.float32)
        )
        for gpu in ("whole", "clusters", "read_again"):
            with pretend(**GPUS[gpu]):
                ours = _spec_of_masks(policy, ref, native)
            for name, gold in golds.items():
                # Row by row: a KL of 1e37 must not widen the budget of its neighbours, but its own
                # gradient cannot be nearer than the KL's rounding, which it subtracts.
                for i, o, b, g in zip(range(6), ours[name], bases[name], gold, strict=True):
                    kl = golds["value 0"][i].item()
                    size = kl if 1 < kl < torch.inf and name == "gradient 0" else 1.0
                    assert_in_budget(f"{name} {value} {gpu} row {i}", o / size, b / size, g / size)


def _spec_of_masks(policy, ref, op=None):
    """{what: [6, ...]} of token_kl and token_stats, from `op` or the specification."""
    spec = {"token_stats_fwd": spec_stats, "token_kl_fwd": spec_kl, "token_kl_bwd": spec_kl}
    op = op or (lambda name: getattr(spec[name], name))
    found, grad = {}, torch.ones(6, dtype=torch.float32)
    for d in range(3):
        o = (d, 0.3, 1.0, 0.0)
        value, *saved = op("token_kl_fwd")(policy, ref, None, *o)
        out, fused_out = torch.empty_like(policy), torch.empty_like(policy)
        op("token_kl_bwd")(grad, policy, ref, None, *saved, *o, out)
        found |= {f"value {d}": value, f"gradient {d}": out[0]}
        if op is native:
            found[f"value {d}"] = op("token_kl_fused")(grad, policy, ref, None, *o, fused_out)
            torch.testing.assert_close(fused_out, out, rtol=1e-2, atol=1e-5, equal_nan=True)
    rows = op("token_stats_fwd")(policy, ref, None, None, -100, 0.3, 1.0, 0.0)
    return found | {"stats": rows.T}


@pytest.mark.parametrize("beta", [0.0, 2.0])
@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_row_has_nothing_finite(poison, beta):
    with pretend():
        check_poisoned(poison, beta, "cpu")


def test_scale_grad():
    for dtype in DTYPES:
        grad = torch.randn(1, 3, 1001).to(dtype)
        wanted = (grad.float() * 0.3).to(dtype)
        with pretend():
            native("scale_grad")(grad, torch.tensor(1.0))
            native("scale_grad")(grad, torch.tensor(0.3))
        assert torch.equal(grad, wanted)


def test_bad_tensors_are_refused_by_name():
    x = torch.randn(1, 2, 9)
    with pretend():
        with pytest.raises(RuntimeError, match="target: expected contiguous int64"):
            native("token_logp_fwd")(x, torch.zeros(3, dtype=torch.long), *PLAIN)
        with pytest.raises(RuntimeError, match="ref: expected the dtype of the policy"):
            native("token_kl_fwd")(x, x.half(), None, 0, 0.5, 1.0, 0.0)
        with pytest.raises(RuntimeError, match="temperature"):
            native("token_logp_fwd")(x, torch.zeros(2, dtype=torch.long), -100, 0.0, 0.0)
