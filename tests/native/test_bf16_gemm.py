"""The native GEMM of 16-bit operands, against fp64, at every instruction set; who takes it; and the
linear ops where nothing multiplies 16-bit numbers fast."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from conftest import ISAS, instruction_set, lesser_isas
from linear_cases import CASES, TRAINED, assert_right, make, reductions

from deepalign_kernels import backends, use_backend
from deepalign_kernels.ops.linear import gemm

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
missing = backends.native_library("cpu")
needed = pytest.mark.skipif(missing is not None, reason=str(missing))
HERE = ISAS[: len(lesser_isas()) + 1]
SIZES = [(1, 1, 1), (1, 40, 3), (6, 16, 2), (15, 33, 31), (29, 16, 65), (4, 3, 0)]
SIZES += [(40, 129, 64), (45, 70, 600)]  # groups of panels, and more than one step inside
DEEP = (70, 90, 2100)  # of AVX512-BF16 too


@pytest.fixture(params=HERE)
def isa(request):
    with instruction_set(request.param):
        yield request.param


def product(a, b, out, scratch, add=False):
    return torch.ops.deepalign_native.mm(a, b, out, scratch, add)


def laid(x, how):
    """`x` with rows side by side, columns side by side, or neither."""
    if how < 2:
        return x.t().contiguous().t() if how else x
    apart = torch.zeros(2 * x.shape[0], 3 * x.shape[1], dtype=x.dtype)[::2, ::3]
    return apart.copy_(x)


def bytes_(n):
    return torch.empty(n, dtype=torch.uint8)


def assert_product(size, dtypes, how, add, memory):
    """Bounds: a sum in fp32, and half a last place of a 16-bit result."""
    m, n, inner = size
    g = torch.Generator().manual_seed(sum(size))
    a, b, old = (torch.randn(*s, generator=g) for s in ((m, inner), (inner, n), (m, n + 3)))
    a, b, old = (x.to(d) for x, d in zip((a, b, old), dtypes, strict=True))
    gold = a.double() @ b.double() + (old[:, :n].double() if add else 0)
    bound = (a.double().abs() @ b.double().abs() + 1) * max(1, inner) ** 0.5 * 2e-7
    if old.dtype != F32:
        bound = bound + gold.abs() * torch.finfo(old.dtype).eps / 2
    out = old.clone() if add else torch.full_like(old, float("nan"))
    done = product(laid(a, how[0]), laid(b, how[1]), out[:, :n], bytes_(memory), add)
    assert done or memory < 1 << 20
    if done:
        assert ((out[:, :n].double() - gold).abs() <= bound).all()
        beyond = out[:, n:]  # not the product's to write
        assert beyond.equal(old[:, n:]) if add else beyond.isnan().all()
    return done


@needed
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("add", [False, True])
def test_against_fp64(isa, size, add):
    ways = itertools.cycle(itertools.product((0, 1, 2), (0, 1)))
    ways = itertools.islice(ways, SIZES.index(size), None)
    for dtypes, how in zip(itertools.product((F32, BF16, F16), repeat=3), ways, strict=False):
        assert_product(size, dtypes, how, add, 1 << 20)


@needed
def test_with_less_memory_it_goes_step_by_step(isa):
    """Depth by depth into fp32, some rows of an operand after the other into 16 bits; too little
    for that is said, and nothing written."""
    for dtypes in ((F32, BF16, F32), (BF16, BF16, F32), (F32, F16, BF16)):
        done = [assert_product(DEEP, dtypes, (0, 1), True, 1 << k) for k in range(4, 24)]
        assert done == sorted(done) and not done[0]
        assert done[13]  # 128 KiB: a panel of 32 x 512 words, avx512's, or 16 x 2100 for 16 bits


@needed
@pytest.mark.parametrize("dtypes", [(BF16, BF16, F32), (F32, BF16, BF16)], ids=str)
def test_same_bits_whatever_the_threads(isa, dtypes):
    m, n, inner = 200, 500, 1500
    a, b = torch.randn(m, inner).to(dtypes[0]), torch.randn(inner, n).to(dtypes[1])
    outs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outs.append(torch.empty(m, n, dtype=dtypes[2]))
            assert product(a, b, outs[-1], bytes_(1 << 22))
    finally:
        torch.set_num_threads(threads)
    assert outs[0].equal(outs[1]) and outs[0].equal(outs[2])


@needed
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_inf_and_nan_stay_in_their_row(isa, dtype):
    a, b = torch.ones(20, 70, dtype=BF16), torch.ones(70, 40, dtype=dtype)
    a[3, 69], a[5, 0] = float("inf"), float("nan")
    out = torch.empty(20, 40, dtype=dtype)
    assert product(a, b, out, bytes_(1 << 16))
    assert out[3].eq(float("inf")).all() and out[5].isnan().all()
    assert out[[0, 1, 2, 4, *range(6, 20)]].eq(70).all()


@needed
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"a": torch.ones(4, 6).double()}, "a: expected bf16, fp16 or fp32"),
        ({"a": torch.ones(6)}, "a: expected a matrix"),
        ({"b": torch.ones(7, 5)}, "b: expected 6 rows, got 7"),
        ({"out": torch.empty(4, 6)}, r"out: expected \[4, 5\]"),
        ({"out": torch.empty(5, 4).t()}, "out: expected .*side by side"),
    ],
)
def test_bad_input(change, named):
    good = {
        "a": torch.ones(4, 6, dtype=BF16),
        "b": torch.ones(6, 5, dtype=BF16),
        "out": torch.empty(4, 5),
        "scratch": bytes_(1 << 12),
    }
    assert product(**good)
    with pytest.raises(RuntimeError, match=named):
        product(**{**good, **change})


@needed
def test_who_takes_it(isa, monkeypatch):
    here = gemm.Route.TILES if isa == "portable" else gemm.Route.NATIVE
    for half, fast in itertools.product((BF16, F16), (True, False)):
        monkeypatch.setattr(gemm, "fast_16bit", lambda *_, fast=fast: fast)
        assert gemm.score_route("cpu", half, F32) == here
        assert gemm.score_route("cpu", half, half) == (gemm.Route.SAME if fast else here)
        with use_backend("eager"):
            assert gemm.score_route("cpu", half, F32) == gemm.Route.TILES
    assert gemm.score_route("cpu", F32, F32) == gemm.Route.SAME


@pytest.mark.slow
@needed
def test_the_environment_can_ask_for_portable_code():
    code = "from deepalign_kernels import backends; print(backends.native_gemm('cpu'))"
    env = {**os.environ, "DEEPALIGN_CPU_ISA": "portable"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("scores", ["fp32", "16-bit"])
@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_linear_ops_without_16_bit_products(name, dtype, native, scores, monkeypatch):
    """A CPU without AVX-512: fp32 products of converted operands, fp32 gradients of whatever
    scores, rounded once. Hidden size and vocabulary are odd, and so is a tile's number of rows."""
    if native and not backends.native_gemm("cpu"):
        pytest.skip("no native GEMM")
    slow = []
    mm, addmm = torch.mm, torch.addmm

    def spied(f):
        def call(*args, **kw):
            slow.extend(x.shape for x in args if x.dtype != F32 and 67 in x.shape)
            return f(*args, **kw)

        return call

    monkeypatch.setattr(torch, "mm", spied(mm))
    monkeypatch.setattr(torch, "addmm", spied(addmm))
    monkeypatch.setattr(gemm, "fast_16bit", lambda *_: False)
    if not native:
        monkeypatch.setattr(backends, "native_gemm", lambda _: False)
    logits = F32 if scores == "fp32" else dtype
    p = make(H=17, V=67, dtype=dtype, full=scores == "fp32")  # bias in 16 bit: one rounding more
    ways = [(TRAINED, None), (("hidden",), None), (TRAINED, 9000)]
    for (only, room), reduction in itertools.product(ways, reductions(name)[:2]):
        assert_right(name, p, reduction, only, logits_dtype=logits, max_workspace_bytes=room)
    assert not slow  # torch multiplied nothing of the vocabulary's size in 16 bits
