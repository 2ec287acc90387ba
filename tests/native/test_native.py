"""What only the native CPU kernels can get wrong: instruction sets, threads, aliasing, strides,
offsets. Formulas and edge cases are tested for every backend alike in the other files."""

import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from cases import COMPLETE as CASES
from cases import Rows, values_and_grad
from conftest import ISAS, instruction_set, lesser_isas

from deepalign_kernels import backends, use_backend
from deepalign_kernels.reference import token_kl as spec_kl
from deepalign_kernels.reference import token_logp as spec_logp
from deepalign_kernels.testing import EPS32

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = (-100, 1.0, 0.0)  # ignore_index, temperature, softcap


_WHY_NOT = backends.native_library("cpu")
pytestmark = pytest.mark.skipif(_WHY_NOT is not None, reason=f"native: {_WHY_NOT}")


def isa_now():
    return ISAS[torch.ops.deepalign_native.use_isa(-1)]


def isas_here():
    return (*lesser_isas(), isa_now()) if _WHY_NOT is None else ()


@pytest.fixture(autouse=True, params=isas_here())
def native(request):
    with use_backend("native"), instruction_set(request.param):
        yield


def op(name, dtype=torch.float32):
    return backends.choose(name, "cpu", dtype)


def make(rows, vocab, dtype=torch.float32, seed=0):
    """(policy, ref) [1, rows, vocab], target [rows] with ignored entries, grad [rows]."""
    g = torch.Generator().manual_seed(seed)
    policy, ref = (3 * torch.randn(1, rows, vocab, generator=g) for _ in range(2))
    policy[0, :, vocab // 3] += 15
    target = torch.randint(vocab, (rows,), generator=g)
    target[::4] = -100
    return policy.to(dtype), ref.to(dtype), target, torch.randn(rows, generator=g)


def everything(policy, ref, target, grad, gradients=None, softcap=0.0):
    """Every op on these rows -> {name: result}. Gradients are written to copies of `gradients`."""
    dtype, rows, tail = policy.dtype, target.numel(), (1.0, softcap)
    beta, scale = torch.linspace(0, 3, rows), torch.tensor(0.125)
    blank = torch.empty_like(policy) if gradients is None else gradients
    logp, norm = op("token_logp_fwd", dtype)(policy, target, -100, *tail)
    results = {"logp": logp, "norm": norm, "logp_grad": blank.clone()}
    op("token_logp_bwd", dtype)(grad, policy, target, norm, -100, *tail, results["logp_grad"])
    valid = target != -100
    for direction in range(3):
        options = (direction, 0.3, *tail)
        kl, *saved = op("token_kl_fwd", dtype)(policy, ref, valid, *options)
        out = results[f"kl{direction}_grad"] = blank.clone()
        op("token_kl_bwd", dtype)(grad, policy, ref, valid, *saved, *options, out)
        results[f"kl{direction}"] = kl
    options = (-100, False, 0.0, *tail)
    forward = op("constrained_loss_fwd", dtype)
    results["loss"] = forward(policy, target, beta, ref, None, *options)[0]
    out = results["fused_grad"] = blank.clone()
    fused = op("constrained_loss_fused", dtype)
    results["fused"] = fused(policy, target, beta, ref, None, scale, *options, out)[0]
    results["stats"] = op("token_stats_fwd", dtype)(policy, ref, target, None, -100, 0.5, *tail)
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thread_count_and_repetition_change_no_bit(dtype):
    problem = make(37, 4099, dtype)
    first = everything(*problem)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for name, result in everything(*problem).items():
                assert torch.equal(result, first[name]), (name, threads)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbouring_rows_change_no_bit(dtype):
    policy, ref, target, grad = make(8, 4099, dtype)
    whole = everything(policy, ref, target, grad)
    norms = op("token_kl_fwd", dtype)(policy, ref, None, 0, 0.5, 1.0, 0.0)
    for r in (1, 6):
        i = slice(r, r + 1)
        alone = op("token_kl_fwd", dtype)(policy[:, i], ref[:, i], None, 0, 0.5, 1.0, 0.0)
        assert all(torch.equal(a, w[i]) for a, w in zip(alone, norms, strict=True))
        out = torch.empty_like(policy[:, i])
        logp, norm = op("token_logp_fwd", dtype)(policy[:, i], target[i], *PLAIN)
        op("token_logp_bwd", dtype)(grad[i], policy[:, i], target[i], norm, *PLAIN, out)
        assert torch.equal(logp, whole["logp"][i])
        assert torch.equal(out, whole["logp_grad"][:, i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [33, 4099])
def test_gradient_may_overwrite_the_logits(dtype, vocab):
    policy, ref, target, grad = make(6, vocab, dtype)
    apart = everything(policy, ref, target, grad)
    _, norm = op("token_logp_fwd", dtype)(policy, target, *PLAIN)
    x = policy.clone()
    op("token_logp_bwd", dtype)(grad, x, target, norm, *PLAIN, x)
    assert torch.equal(x, apart["logp_grad"])
    valid = target != -100
    for direction in range(3):
        options = (direction, 0.3, 1.0, 0.0)
        _, *saved = op("token_kl_fwd", dtype)(policy, ref, valid, *options)
        x = policy.clone()
        op("token_kl_bwd", dtype)(grad, x, ref, valid, *saved, *options, x)
        assert torch.equal(x, apart[f"kl{direction}_grad"])
    x, beta, scale = policy.clone(), torch.linspace(0, 3, 6), torch.tensor(0.125)
    options = (-100, False, 0.0, 1.0, 0.0)
    op("constrained_loss_fused", dtype)(x, target, beta, ref, None, scale, *options, x)
    assert torch.equal(x, apart["fused_grad"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("of", ["fp32 logits", "16-bit logits"])
@pytest.mark.parametrize("rows,vocab", [(6, 45), (6, 4099), (600, 4093)])
def test_half_gradient_is_the_fp32_one_rounded_to_nearest(dtype, of, rows, vocab):
    """600 rows: streaming stores."""
    problem = make(rows, vocab, torch.float32 if of == "fp32 logits" else dtype)
    full, half = (
        everything(*problem, gradients=torch.empty(1, rows, vocab, dtype=d))
        for d in (torch.float32, dtype)
    )
    for name in full:
        assert torch.equal(half[name], full[name].to(half[name].dtype)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,vocab", [(6, 999), (6, 1), (600, 4093)])
def test_strides_and_alignment_change_no_bit(dtype, rows, vocab):
    """Last column cut off, rows apart, an odd start, and (600 rows) streaming stores."""
    policy, ref, target, grad = make(rows, vocab, dtype)
    plain = everything(policy, ref, target, grad)

    def spread(x):
        wide = torch.full((1, rows, vocab + 8), torch.nan, dtype=dtype)
        wide[..., 3 : 3 + vocab] = x
        return wide[..., 3 : 3 + vocab]

    _, norm = op("token_logp_fwd", dtype)(spread(policy), target, *PLAIN)
    out = spread(torch.zeros_like(policy))
    op("token_logp_bwd", dtype)(grad, spread(policy), target, norm, *PLAIN, out)
    assert torch.equal(out, plain["logp_grad"])
    outside = out.as_strided((rows, 8), (vocab + 8, 1), 3 + vocab - 3)[:-1, 3:]
    assert outside.isnan().all(), "wrote beyond the row"
    valid, options = target != -100, (0, 0.5, 1.0, 0.0)
    kl, *saved = op("token_kl_fwd", dtype)(spread(policy), spread(ref), valid, *options)
    op("token_kl_bwd", dtype)(grad, spread(policy), spread(ref), valid, *saved, *options, out)
    assert torch.equal(kl, plain["kl0"]) and torch.equal(out, plain["kl0_grad"])


def test_upstream_gradient_of_stride_0_and_other_dtypes():
    policy, _, target, _ = make(6, 45)
    _, norm = op("token_logp_fwd")(policy, target, *PLAIN)
    outs = []
    for grad in (
        torch.full((6,), 0.5),
        torch.tensor([0.5]).expand(6),
        torch.full((6,), 0.5).half(),
    ):
        outs.append(torch.empty_like(policy))
        op("token_logp_bwd")(grad, policy, target, norm, *PLAIN, outs[-1])
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_odd_nan_payloads_stay_nan():
    """Rounding to bf16 must not carry a NaN of all ones over into a zero."""
    odd = torch.tensor([-1, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    for grad in odd:
        x, target = torch.randn(1, 1, 70).bfloat16(), torch.tensor([3])
        _, norm = op("token_logp_fwd", x.dtype)(x, target, *PLAIN)
        out = torch.empty_like(x)
        op("token_logp_bwd", x.dtype)(grad[None], x, target, norm, *PLAIN, out)
        assert out.isnan().all()
    x = torch.zeros(1, 1, 70)
    x[0, 0, 5] = odd[0]
    _, norm = op("token_logp_fwd")(x, target, *PLAIN)
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    op("token_logp_bwd")(torch.ones(1), x, target, norm, *PLAIN, out)
    assert out.isnan().all()


@pytest.mark.clean_memory
def test_offsets_beyond_2_to_the_31():
    """Rows 2^30 + 64 elements apart in one bf16 buffer of 4.3 GB, of which few rows are touched."""
    vocab, apart = 1000, 2**30 + 64
    buffer = torch.empty(2 * apart + vocab, dtype=torch.bfloat16)  # untouched pages cost nothing
    far = buffer.as_strided((1, 3, vocab), (0, apart, 1))
    policy, ref, target, grad = make(3, vocab, torch.bfloat16)
    far.copy_(policy)
    logp, norm = op("token_logp_fwd", far.dtype)(far, target, *PLAIN)
    near_logp, near_norm = op("token_logp_fwd", far.dtype)(policy, target, *PLAIN)
    assert torch.equal(logp, near_logp) and torch.equal(norm, near_norm)
    kl = op("token_kl_fwd", far.dtype)(far, ref, None, 0, 0.5, 1.0, 0.0)[0]
    assert torch.equal(kl, op("token_kl_fwd", far.dtype)(policy, ref, None, 0, 0.5, 1.0, 0.0)[0])
    out = torch.empty_like(policy)
    op("token_logp_bwd", far.dtype)(grad, policy, target, norm, *PLAIN, out)
    op("token_logp_bwd", far.dtype)(grad, far, target, norm, *PLAIN, far)
    assert torch.equal(far, out)


def test_rows_times_vocab_beyond_2_to_the_31():
    vocab, rows = 2**17, 2**14 + 2
    x = torch.linspace(-3, 3, vocab).bfloat16().expand(1, rows, vocab)
    target = torch.full((rows,), -100)
    target[[0, -1]] = vocab - 1
    logp, _ = op("token_logp_fwd", x.dtype)(x, target, *PLAIN)
    assert logp[0] == logp[-1] != 0 and (logp[1:-1] == 0).all()


def test_vector_exponential():
    """exp over its whole range, as p_1 of rows (0, d): the gradient of the first column's logp."""
    d = -torch.cat([torch.linspace(0, 110, 40001), torch.logspace(-30, 2, 4001)])
    d = torch.cat([d, torch.tensor([-torch.inf, 0.0])])
    x = torch.stack([torch.zeros_like(d), d], -1)[None]
    target = torch.zeros(len(d), dtype=torch.long)
    _, norm = op("token_logp_fwd")(x, target, *PLAIN)
    out = torch.empty_like(x)
    op("token_logp_bwd")(torch.ones(len(d)), x, target, norm, *PLAIN, out)
    p = -out[0, :, 1].double()
    exact = 1 / (1 + (-d.double()).exp())
    smallest = 2.0**-149
    # Two roundings of the normaliser, the polynomial (1.6 eps) and the product; below 2^-126 half
    # of the last place on top. (d - 0) * log2(e) is rounded at magnitude |t|, so eps * |t| too.
    allowed = exact * EPS32 * (4 + d.abs().double().clamp(max=200)) + 1.5 * smallest
    assert ((p - exact).abs() <= allowed).all(), ((p - exact).abs() / allowed).max()
    assert p[-2] == 0 and p[-1] == 0.5


@pytest.mark.parametrize("vocab", [2048, 5003, 17000, 40000])
@pytest.mark.parametrize("name", CASES)
def test_small_terms_beside_a_large_one(name, vocab):
    """One column has nearly all of a row and the others are just under half of fp32's last place
    beside it, as a sum in fp32 would lose them: 128 in a lane were 7e-6 of the sum."""
    policy, ref = torch.zeros(2, 2, vocab)
    policy[:, 7], ref[0, 7], ref[1, 9] = 16.65, 16.0, 16.65
    rows = Rows(policy, ref, torch.tensor([7, 7]), torch.ones(2), torch.ones(2))
    got = values_and_grad(CASES[name].ours, rows)
    gold = values_and_grad(CASES[name].plain, rows.to("cpu", torch.float64))
    for ours, truth in zip(got, gold, strict=True):
        allowed = 16 * EPS32 * truth.abs().clamp(min=1.0)
        assert ((ours - truth).abs() <= allowed).all(), (ours - truth).abs().max()


@pytest.mark.parametrize("temperature", [0.7, 2.5])
@pytest.mark.parametrize("size", [1e9, 1e10])
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_huge_logits(name, size, temperature):
    """Neighbouring fp32 numbers are 64 and 1024 apart there, and the saved maximum, divided by the
    temperature, stands for several of them."""
    g = torch.Generator().manual_seed(1)
    policy, ref = (size * (1 + torch.rand(4, 300, generator=g) * 3e-7) for _ in "qp")
    target = torch.tensor([1, 2, policy[2].argmax(), 3])
    rows = Rows(policy, ref, target, torch.ones(4), torch.ones(4))
    (_, got), (_, gold) = (
        values_and_grad(f, r, temperature=temperature)
        for f, r in (
            (CASES[name].ours, rows),
            (CASES[name].plain, rows.to("cpu", torch.float64)),
        )
    )
    assert (got - gold).abs().max() <= 2e-5 * gold.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("js_beta", [1e-20, 1e-9, 1 - 1e-9])
def test_js_at_the_ends_of_js_beta(js_beta):
    """Two models that share no column: b log(1 / b) + (1 - b) log(1 / (1 - b))."""
    x, y = torch.zeros(2, 1, 1, 8)
    x[..., 0] = y[..., 1] = 200.0
    js = op("token_kl_fwd")(x, y, None, 2, js_beta, 1.0, 0.0)[0].item()
    b = min(js_beta, 1 - js_beta)
    assert js == pytest.approx(-b * math.log(b) - (1 - b) * math.log1p(-b), rel=1e-6)


READ_TO_THE_END = """
import ctypes, mmap, sys, torch, test_native as t
from conftest import instruction_set
page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
memory = mmap.mmap(-1, 8 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert not libc.mprotect(ctypes.c_void_p(start + 7 * page), page, 0), ctypes.get_errno()
with t.use_backend("native"), instruction_set(sys.argv[1]):
    for dtype in t.DTYPES:
        for vocab in (1, 8, 16, 31, 32, 45, 1024, 1056):
            x, ref, target, grad = t.make(2, vocab, dtype)
            ends = torch.frombuffer(memory, dtype=dtype, count=7 * page // dtype.itemsize)
            x = ends[-2 * vocab :].view(1, 2, vocab).copy_(x)
            for value in (0.0, torch.nan, -torch.inf):
                x[0, 1] = x[0, 1] if value == 0 else value
                for softcap in (0.0, 5.0):
                    t.everything(x, ref, target, grad, softcap=softcap)
                    t.everything(ref, x, target, grad, softcap=softcap)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mprotect by its Linux signature")
def test_nothing_beyond_the_logits_is_read():
    """The logits end where a page begins that nobody may read."""
    here = pathlib.Path(__file__).parent
    folders = here, here.parent, here.parent / "support", here.parents[1]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", READ_TO_THE_END, isa_now()]
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_logp_is_never_positive_and_exact_where_one_column_has_everything():
    for dtype in DTYPES:
        for top in (0.0, 1.5, -3.25, 333.0):
            x = torch.full((1, 2, 300), -torch.inf, dtype=dtype)
            x[..., 7] = top
            logp, _ = op("token_logp_fwd", dtype)(x, torch.tensor([7, 8]), *PLAIN)
            assert logp.tolist() == [0.0, -torch.inf]
    x = torch.randn(1, 2000, 1)
    logp, _ = op("token_logp_fwd")(x, torch.zeros(2000, dtype=torch.long), -100, 0.37, 0.0)
    assert (logp <= 0).all() and (logp > -1e-6).all()


def test_the_last_column_and_a_mask_in_every_block_are_seen():
    """A lone -inf, or a new maximum, anywhere: in a whole vector, a later block, the ragged end."""
    vocab = 9001
    policy, ref, *_ = make(1, vocab)
    for column in (0, 31, 1023, 1024, 4095, 4096, 8191, 8192, 8999, 9000):
        masked = ref.clone()
        masked[..., column] = -torch.inf
        kl = op("token_kl_fwd")(policy, masked, None, 0, 0.5, 1.0, 0.0)[0]
        assert kl.item() == torch.inf
        back = op("token_kl_fwd")(policy, masked, None, 1, 0.5, 1.0, 0.0)[0]
        gold = spec_kl.token_kl_fwd(policy.double(), masked.double(), None, 1, 0.5, 1.0, 0.0)[0]
        torch.testing.assert_close(back.double(), gold, rtol=1e-6, atol=2e-6)
        peak = policy.clone()
        peak[..., column] += 60
        logp, norm = op("token_logp_fwd")(peak, torch.tensor([column]), *PLAIN)
        gold = spec_logp.token_logp_fwd(peak.double(), torch.tensor([column]), *PLAIN)
        torch.testing.assert_close(logp.double(), gold[0], rtol=0, atol=2e-6)
        assert norm[0, 0] == peak.max()
