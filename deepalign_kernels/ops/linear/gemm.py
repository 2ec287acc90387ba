"""The three products of a linear head, written into memory the caller owns.

    forward          scores[c, V]      = rows[c, K] @ head[V, K].T
    gradient, rows   grad_rows[c, K]   = dz[c, V] @ head[V, K]
    gradient, head   grad_head[V, K]  += dz[c, V].T @ rows[c, K]

Products with 16-bit operands must not round the scores: 8 bits of a bf16 score of 20 are an error
of 0.06 in a log-probability. A GEMM with an fp32 result does it on CUDA. Torch has none for the CPU
(2.13). There csrc/cpu/gemm multiplies operands and results of any of the three dtypes, widening
them as it packs them, at the rate of torch's fp32 product (AVX2: 0.9 to 1.05 of it, 1.5 at 128
rows) or, for bf16 with AVX512-BF16, at that of a plain bf16 one. Without the native library, or
AVX2, the head is widened tile by tile and multiplied by torch in fp32 (`Route.TILES`): 0.4-0.8 of
the rate of plain fp32.
"""

from __future__ import annotations

import enum
import functools
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from deepalign_kernels import backends

TILE_BYTES = (
    8 << 20
)  # 512, 1024 and 2048 rows of 2048 fp32 run at one rate; the smallest costs least
_HALVES = (torch.bfloat16, torch.float16)


class Route(enum.IntEnum):
    """How a product of two operands of one dtype gives a result of another."""

    SAME = 0  # the dtypes are equal, and products of it are fast
    WIDE_GEMM = 1  # 16-bit operands, fp32 result out of one GEMM
    TILES = 2  # the head is converted tile by tile in scratch memory
    NATIVE = 3  # out of the native library's GEMM, which packs into scratch memory


@functools.cache
def has_wide_gemm(device_type: str, dtype: torch.dtype) -> bool:
    """Whether `torch.mm(..., out_dtype=torch.float32)` exists for operands of `dtype`. Out of
    memory is no answer: it is raised, and the next call asks again."""
    if device_type == "cuda" and not torch.cuda.is_available():
        return True  # an estimate for another machine
    with _disable_current_modes():  # a fake tensor would say yes
        a = torch.zeros(16, 16, dtype=dtype, device=device_type)
        wide = a.float()
        try:
            torch.mm(a, a, out_dtype=torch.float32, out=wide)
            torch.addmm(wide, a, a, out_dtype=torch.float32, out=wide)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            # What cuBLAS could not allocate for itself comes as a plain RuntimeError.
            if isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error):
                raise
            if device_type != "cpu":
                why = f"{type(error).__name__}: {error}"
                warnings.warn(_NO_WIDE_GEMM.format(torch.__version__, dtype, why), stacklevel=2)
            return False
    return True


_NO_WIDE_GEMM = (
    "torch {} gave no matrix product of {} with an fp32 result on this GPU: {}. For the rest of "
    "this process the linear ops widen the head and multiply in fp32, about 10 times slower"
)


@functools.cache
def fast_16bit(device_type: str, dtype: torch.dtype) -> bool:
    """Whether GEMMs in `dtype` run at full rate; without oneDNN's kernels the CPU takes 100 times
    longer."""
    if device_type != "cpu":
        return True
    mkldnn = torch.ops.mkldnn
    probe = (
        mkldnn._is_mkldnn_bf16_supported
        if dtype == torch.bfloat16
        else mkldnn._is_mkldnn_fp16_supported
    )
    with _disable_current_modes():
        known = bool(probe())
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and known


def tiled(device_type: str, operand: torch.dtype, result: torch.dtype) -> bool:
    """Whether products of `operand` into `result` need scratch memory (see Scratch)."""
    return score_route(device_type, operand, result) in (Route.TILES, Route.NATIVE)


def score_route(device_type: str, operand: torch.dtype, scores: torch.dtype) -> Route:
    if operand not in _HALVES or (operand == scores and fast_16bit(device_type, operand)):
        return Route.SAME
    if operand != scores and has_wide_gemm(device_type, operand):
        return Route.WIDE_GEMM
    return Route.NATIVE if _native(device_type, operand, scores) else Route.TILES


def _native(device_type: str, *dtypes: torch.dtype) -> bool:
    known = all(d in (torch.float32, *_HALVES) for d in dtypes)
    return known and backends.native_gemm(device_type)


def _native_mm(out: Tensor, a: Tensor, b: Tensor, memory: Tensor, add: bool) -> bool:
    """out (+)= a @ b by the native GEMM; False, and nothing done, where `memory` is too small for
    it (some rows of a toy)."""
    return torch.ops.deepalign_native.mm.default(a, b, out, memory, add)


def gradient_dtype(device_type: str, operand: torch.dtype) -> torch.dtype:
    """dtype in which the two gradient products are multiplied, and so that of the gradient of the
    scores."""
    return operand if operand not in _HALVES or fast_16bit(device_type, operand) else torch.float32


class Scratch(NamedTuple):
    """Memory the products may use: flat bytes, none where no product needs them."""

    whole: Tensor  # both of these, for what the native GEMM packs
    rows: Tensor  # >= 4 c K: rows, converted, or a wide accumulator of grad_rows
    tile: Tensor  # >= 8 K: a tile of the head, converted


def scratch_of(memory: Tensor, tile_bytes: int) -> Scratch:
    """`memory`, of which the last `tile_bytes` are for the tile."""
    cut = memory.numel() - tile_bytes
    return Scratch(memory, memory[:cut], memory[cut:])


def _carve(memory: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    rows, columns = shape
    return memory[: rows * columns * dtype.itemsize].view(dtype).view(rows, columns)


def _tiles(
    scratch: Scratch, shape: Sequence[int], itemsize: int, step: int | None = None
) -> list[tuple[int, int]]:
    vocab, columns = shape
    step = step or scratch.tile.numel() // (columns * itemsize)
    return [(a, min(a + step, vocab)) for a in range(0, vocab, step)]


def scores_into(
    scores: Tensor, rows: Tensor, head: Tensor, scratch: Scratch, *, add: bool = False
) -> None:
    """scores[c, V] = rows @ head.T, or += with `add`."""
    beta = 1 if add else 0
    route = score_route(scores.device.type, rows.dtype, scores.dtype)
    if route == Route.SAME:
        torch.addmm(scores, rows, head.t(), beta=beta, out=scores) if add else torch.mm(
            rows, head.t(), out=scores
        )
    elif route == Route.WIDE_GEMM:
        if add:
            torch.addmm(scores, rows, head.t(), out_dtype=scores.dtype, out=scores)
        else:
            torch.mm(rows, head.t(), out_dtype=scores.dtype, out=scores)
    elif route == Route.TILES or not _native_mm(scores, rows, head.t(), scratch.whole, add):
        _scores_by_tiles(scores, rows, head, scratch, beta)


def _scores_by_tiles(
    scores: Tensor, rows: Tensor, head: Tensor, scratch: Scratch, beta: int
) -> None:
    """scores = rows @ head.T + beta * scores; 16-bit scores are rounded once, out of fp32."""
    narrow = scores.dtype in _HALVES
    dtype = torch.float32 if narrow else scores.dtype
    wide = _carve(scratch.rows, rows.shape, dtype).copy_(rows)
    columns = head.shape[1]
    # Beside each row of the tile a column of its product; fewer rows where that is too long.
    step = max(1, scratch.tile.numel() // (4 * (columns + len(rows)))) if narrow else None
    for a, b in _tiles(scratch, head.shape, dtype.itemsize, step):
        tile = _carve(scratch.tile, head[a:b].shape, dtype).copy_(head[a:b])
        if not narrow:
            part = scores[:, a:b]
            torch.addmm(part, wide, tile.t(), beta=beta, out=part)
            continue
        behind = scratch.tile[tile.numel() * 4 :]
        some = behind.numel() // (4 * (b - a))
        for c in range(0, len(rows), some):
            target = scores[c : c + some, a:b]
            part = _carve(behind, target.shape, dtype)
            if beta:
                part.copy_(target)
            torch.addmm(part, wide[c : c + some], tile.t(), beta=beta, out=part)
            target.copy_(part)


def rows_gradient_into(out: Tensor, dz: Tensor, head: Tensor, scratch: Scratch) -> None:
    """out[c, K] = dz @ head; `out` in the dtype of the head."""
    if dz.dtype == head.dtype:
        torch.mm(dz, head, out=out)
        return
    total = _carve(scratch.rows, out.shape, dz.dtype)
    if _native(dz.device.type, dz.dtype, head.dtype) and _native_mm(
        total, dz, head, scratch.tile, False
    ):
        out.copy_(total)
        return
    for a, b in _tiles(scratch, head.shape, dz.dtype.itemsize):
        tile = _carve(scratch.tile, head[a:b].shape, dz.dtype).copy_(head[a:b])
        torch.addmm(total, dz[:, a:b], tile, beta=1 if a else 0, out=total)
    out.copy_(total)


def head_gradient_add(
    total: Tensor, dz: Tensor, rows: Tensor, scratch: Scratch, *, first: bool
) -> None:
    """total[V, K] = dz.T @ rows where `first`, else += it.

    Where `total` is fp32, the products are 16-bit and no GEMM has an fp32 result, every tile of the
    product is rounded once before it is added: the error of one rounding per chunk, against one per
    addition in a 16-bit total.
    """
    if total.dtype == dz.dtype == rows.dtype:
        torch.mm(dz.t(), rows, out=total) if first else torch.addmm(total, dz.t(), rows, out=total)
    elif (
        dz.dtype == rows.dtype
        and has_wide_gemm(dz.device.type, dz.dtype)
        and total.dtype == torch.float32
    ):
        if first:
            torch.mm(dz.t(), rows, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, dz.t(), rows, out_dtype=total.dtype, out=total)
    elif _native(dz.device.type, dz.dtype, rows.dtype, total.dtype) and _native_mm(
        total, dz.t(), rows, scratch.whole, not first
    ):
        pass
    else:
        if dz.dtype != rows.dtype:
            rows = _carve(scratch.rows, rows.shape, dz.dtype).copy_(rows)
        if dz.dtype == total.dtype:
            head_gradient_add(total, dz, rows, scratch, first=first)
            return
        wide, narrow = sorted((dz.dtype, total.dtype), key=lambda d: -d.itemsize)
        for a, b in _tiles(scratch, total.shape, wide.itemsize + narrow.itemsize):
            size = (b - a, total.shape[1])
            behind = scratch.tile[math.prod(size) * wide.itemsize :]  # aligned for either
            buffers = {d: _carve(m, size, d) for d, m in ((wide, scratch.tile), (narrow, behind))}
            part = torch.mm(dz[:, a:b].t(), rows, out=buffers[dz.dtype])
            if first:
                total[a:b].copy_(part)
            else:  # converted by hand: add_ of another dtype allocates its own copy
                total[a:b].add_(buffers[total.dtype].copy_(part))


def weigh_rows(x: Tensor, factor: Tensor, wide: Tensor | None) -> None:
    """x[c, K] *= factor[c]; through `wide` [c, K], where there is one, and rounded once."""
    if wide is None:
        x.mul_(factor[:, None])
    else:
        x.copy_(wide.copy_(x).mul_(factor[:, None]))
