"""The native bf16 GEMM with an fp32 result, against fp64; who takes it; and the linear ops where
nothing multiplies 16-bit numbers fast."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from linear_cases import CASES, TRAINED, assert_right, make, reductions

from deepalign_kernels import backends, use_backend
from deepalign_kernels.ops.linear import gemm

BF16 = torch.bfloat16
needed = pytest.mark.skipif(
    not backends.native_gemm("cpu"), reason="no native library, or no AVX512-BF16 in this CPU"
)
SIZES = [(1, 1, 1), (1, 40, 3), (14, 32, 2), (15, 33, 31), (29, 16, 65), (113, 17, 32)]
SIZES += [(40, 129, 64), (257, 300, 4097)]  # groups of panels, and more than one step inside


def least(m: int, n: int) -> int:
    return 4 * (min(m, n) + 32) + 64


def product(a, b, out, scratch, add=False):
    torch.ops.deepalign_native.bf16_mm(a, b, out, scratch, add)


def laid(x, transposed):
    return x.t().contiguous().t() if transposed else x


def bytes_(n):
    return torch.empty(n, dtype=torch.uint8)


@needed
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("add", [False, True])
def test_against_fp64(size, add):
    m, n, inner = size
    g = torch.Generator().manual_seed(sum(size))
    a, b, old = (torch.randn(*s, generator=g) for s in ((m, inner), (inner, n), (m, n + 3)))
    a, b = a.to(BF16), b.to(BF16)
    gold = a.double() @ b.double() + (old[:, :n].double() if add else 0)
    bound = (a.double().abs() @ b.double().abs() + 1) * inner**0.5 * 2e-7
    for ta, tb, memory in itertools.product((0, 1), (0, 1), (least(m, n), 1 << 22)):
        out = old.clone() if add else torch.full_like(old, float("nan"))
        product(laid(a, ta), laid(b, tb), out[:, :n], bytes_(memory), add)
        assert ((out[:, :n].double() - gold).abs() <= bound).all()
        beyond = out[:, n:]  # not the product's to write
        assert beyond.equal(old[:, n:]) if add else beyond.isnan().all()


@needed
def test_same_bits_whatever_the_threads():
    a, b = torch.randn(200, 3000).to(BF16), torch.randn(3000, 500).to(BF16)
    outs, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            outs.append(torch.empty(200, 500))
            product(a, b, outs[-1], bytes_(1 << 22))
    finally:
        torch.set_num_threads(threads)
    assert outs[0].equal(outs[1]) and outs[0].equal(outs[2])


@needed
def test_inf_and_nan_stay_in_their_row():
    a, b = torch.ones(20, 70, dtype=BF16), torch.ones(70, 40, dtype=BF16)
    a[3, 69], a[5, 0] = float("inf"), float("nan")
    out = torch.empty(20, 40)
    product(a, b, out, bytes_(1 << 16))
    assert out[3].eq(float("inf")).all() and out[5].isnan().all()
    assert out[[0, 1, 2, 4, *range(6, 20)]].eq(70).all()


@needed
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"a": torch.ones(4, 6)}, "a: expected a bf16"),
        ({"b": torch.ones(12, 10, dtype=BF16)[::2, ::2]}, "b: expected a stride of 1"),
        ({"b": torch.ones(7, 5, dtype=BF16)}, "out: expected fp32"),
        ({"out": torch.empty(4, 6)}, "out: expected fp32"),
        ({"scratch": bytes_(100)}, "scratch: expected"),
    ],
)
def test_bad_input(change, named):
    good = {
        "a": torch.ones(4, 6, dtype=BF16),
        "b": torch.ones(6, 5, dtype=BF16),
        "out": torch.empty(4, 5),
        "scratch": bytes_(1 << 12),
    }
    product(**good)
    with pytest.raises(RuntimeError, match=named):
        product(**{**good, **change})


@needed
def test_who_takes_it():
    assert gemm.score_route("cpu", BF16, torch.float32) == gemm.Route.NATIVE
    assert gemm.score_route("cpu", torch.float16, torch.float32) == gemm.Route.TILES
    assert gemm.score_route("cpu", BF16, BF16) == gemm.Route.SAME
    with use_backend("eager"):
        assert gemm.score_route("cpu", BF16, torch.float32) == gemm.Route.TILES


def test_not_below_avx512():
    code = "from deepalign_kernels import backends; print(backends.native_gemm('cpu'))"
    env = {**os.environ, "DEEPALIGN_CPU_ISA": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("scores", ["fp32", "16-bit"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_linear_ops_without_16_bit_products(name, dtype, scores, monkeypatch):
    """A CPU without AVX-512: fp32 products of converted tiles, fp32 gradients of whatever scores.
    Hidden size and vocabulary are odd, and so is a tile's number of rows."""
    monkeypatch.setattr(gemm, "fast_16bit", lambda *_: False)
    monkeypatch.setattr(backends, "native_gemm", lambda _: False)
    logits = torch.float32 if scores == "fp32" else dtype
    p = make(H=17, V=67, dtype=dtype, full=scores == "fp32")  # bias in 16 bit: one rounding more
    ways = [(TRAINED, None), (("hidden",), None), (TRAINED, 9000)]
    for (only, room), reduction in itertools.product(ways, reductions(name)[:2]):
        assert_right(name, p, reduction, only, logits_dtype=logits, max_workspace_bytes=room)
