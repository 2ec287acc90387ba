"""Bytes that each Triton kernel loads and stores, counted in the interpreter, against
traffic.IDEAL."""

import contextlib
from unittest import mock

import pytest
import torch

from deepalign_kernels import backends
from deepalign_kernels.traffic import IDEAL, ideal_bytes

if backends.unavailable("triton", "token_kl_fwd", "cpu"):
    pytest.skip("counts in Triton's interpreter", allow_module_level=True)

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder

from deepalign_kernels.triton_kernels import (
    constrained_loss,
    scale_grad,
    token_entropy,
    token_kl,
    token_logp,
    token_stats,
)

B, T, V = 2, 2, 2048
ROWS, IGNORED = B * T, (1, 2)
# Scalars of a row are loaded and stored by each of its programs, of which there are at most V /
# 256.
SLACK = ROWS * (V // 256) * 64


class Count:
    read = written = 0


@contextlib.contextmanager
def counting():
    """Count the bytes of all elements that are loaded and stored, not of those masked out."""
    count = Count()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def size(ptrs, mask):
        elements = np.count_nonzero(np.broadcast_to(mask.data, np.shape(ptrs.data)))
        return elements * max(1, ptrs.get_element_ty().primitive_bitwidth // 8)

    def counted_load(self, ptrs, mask, *rest, **kwargs):
        count.read += size(ptrs, mask)
        return load(self, ptrs, mask, *rest, **kwargs)

    def counted_store(self, ptrs, value, mask, *rest, **kwargs):
        count.written += size(ptrs, mask)
        return store(self, ptrs, value, mask, *rest, **kwargs)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
    ):
        yield count


def calls(dtype, ignored, vocab=V):
    """Key of IDEAL -> a call of that op; the rows in `ignored` are left out, and hold NaN."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(B, T, vocab, generator=g).to(dtype) for _ in range(2))
    target = torch.randint(0, vocab, (ROWS,), generator=g)
    valid = torch.ones(ROWS, dtype=torch.bool)
    for row in ignored:
        x.view(ROWS, vocab)[row] = y.view(ROWS, vocab)[row] = float("nan")
        target[row], valid[row] = -100, False
    row, pair = torch.ones(ROWS), torch.zeros(ROWS, 2)
    out, scale = torch.empty_like(x), torch.tensor(0.5)
    plain, loss = (1.0, 0.0), (-100, False, 0.0, 1.0, 0.0)

    def kl_bwd(direction):
        token_kl.token_kl_bwd(row, x, y, valid, pair, pair, row, direction, 0.5, *plain, out)

    def kl_fused(direction):
        token_kl.token_kl_fused(row, x, y, valid, direction, 0.5, *plain, out)

    def loss_fwd(ref, given):
        constrained_loss.constrained_loss_fwd(x, target, row, ref, given, *loss)

    def loss_fused(ref, given):
        constrained_loss.constrained_loss_fused(x, target, row, ref, given, scale, *loss, out)

    return {
        "token_logp_fwd": lambda: token_logp.token_logp_fwd(x, target, -100, *plain),
        "token_logp_bwd": lambda: token_logp.token_logp_bwd(
            row, x, target, pair, -100, *plain, out
        ),
        "token_logp_fused": lambda: token_logp.token_logp_fused(row, x, target, -100, *plain, out),
        "token_kl_fwd": lambda: token_kl.token_kl_fwd(x, y, valid, 0, 0.5, *plain),
        "token_kl_fwd_js": lambda: token_kl.token_kl_fwd(x, y, valid, 2, 0.5, *plain),
        "token_kl_bwd": lambda: [kl_bwd(direction) for direction in (0, 1, 2)],
        "token_kl_fused": lambda: kl_fused(0),
        "token_kl_fused_js": lambda: kl_fused(2),
        "constrained_loss_fwd": lambda: loss_fwd(None, row),
        "constrained_loss_fwd_ref_logits": lambda: loss_fwd(y, None),
        "constrained_loss_fused": lambda: loss_fused(None, row),
        "constrained_loss_fused_ref_logits": lambda: loss_fused(y, None),
        "token_stats_fwd": lambda: token_stats.token_stats_fwd(
            x, y, target, valid, -100, 0.0, *plain
        ),
        "token_stats_fwd_js": lambda: token_stats.token_stats_fwd(
            x, y, target, valid, -100, 0.5, *plain
        ),
        "token_entropy_fwd": lambda: token_entropy.token_entropy_fwd(x, valid, *plain),
        "token_entropy_bwd": lambda: token_entropy.token_entropy_bwd(
            row, x, valid, pair, row, *plain, out
        ),
        "scale_grad": lambda: scale_grad.scale_grad(out, scale),
    }


def assert_ideal(op, call, itemsize, ignored=0, vocab=V):
    repeats = 3 if op == "token_kl_bwd" else 1
    with counting() as count:
        call()
    read, written = ideal_bytes(op, ROWS, vocab, itemsize, ignored=ignored)
    for name, counted, ideal in (("read", count.read, read), ("written", count.written, written)):
        extra = counted - repeats * ideal
        assert 0 <= extra <= repeats * SLACK, f"{op}: {counted} bytes {name}, ideal {ideal}"


def test_every_op_has_an_ideal():
    assert IDEAL.keys() == calls(torch.float32, ()).keys()


@pytest.mark.parametrize("op", IDEAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bytes_moved_are_the_ideal(op, dtype):
    assert_ideal(op, calls(dtype, ())[op], dtype.itemsize)


@pytest.mark.parametrize("op", [op for op in IDEAL if op != "scale_grad"])
def test_rows_left_out_are_not_read(op):
    assert_ideal(op, calls(torch.float32, IGNORED)[op], 4, ignored=len(IGNORED))


@pytest.mark.parametrize("op", ["token_kl_fwd", "token_logp_bwd"])
def test_a_vocabulary_that_fits_no_tile_reads_no_column_twice(op):
    assert_ideal(op, calls(torch.float32, (), V - 1)[op], 4, vocab=V - 1)


def test_scaling_by_one_touches_nothing():
    grad = torch.ones(B, T, V)
    with counting() as count:
        scale_grad.scale_grad(grad, torch.tensor(1.0))
    assert count.written == 0 and count.read <= SLACK


def test_no_rows_launch_nothing():
    x, empty = torch.empty(0, 3, 8), torch.empty(0, dtype=torch.int64)
    with counting() as count:
        token_logp.token_logp_fwd(x, empty, -100, 1.0, 0.0)
    assert count.read == count.written == 0
