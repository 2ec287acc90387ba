from __future__ import annotations

import triton.language as tl
from torch import Tensor

from deepalign_kernels.triton_kernels._launch import (
    kernel,
    launch,
    row_outputs,
    score_scalars,
    tiling,
)
from deepalign_kernels.triton_kernels._rows import (
    LAST_USE,
    NEG_INF,
    block_groups,
    columns,
    expm1_neg,
    load_score,
    load_scores,
    load_tile,
    log_prob,
    prob,
    row_offset,
    scores,
    softmax_end,
    softmax_step,
    times_slope,
)


@kernel
def _token_logp_fwd(
    logits_ptr,  # [B, T, V] bf16/fp16/fp32
    target_ptr,  # [N] int64
    logp_ptr,  # [N] fp32, out
    norm_ptr,  # [N, 2] fp32, out: (max z, log sum exp(z - max z))
    T, groups,  # V = groups * VEC
    batch_stride, row_stride,  # in units of VEC elements
    ignore_index,
    a_hi, a_lo, b_hi, b_lo, slope,  # `_rows.scores`
    MODE: tl.constexpr, VEC: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    # One program per row, one sweep over V.
    # Carried per lane: m = max z, d = sum exp(z - m) over the columns this lane has seen.
    # Bytes: reads V * itemsize, writes 12. Deterministic: fixed order, no atomics.
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    keep = target != ignore_index
    row_ptr = logits_ptr + row_offset(row, T, batch_stride, row_stride, VEC)
    inside = keep & (target >= 0) & (target < groups * VEC)
    picked = load_score(row_ptr, target, inside, a_hi, a_lo, b_hi, b_lo, MODE)
    groups = tl.where(keep, groups, 0)  # an ignored row is never read

    m = tl.full([LANES], NEG_INF, tl.float32)
    d = tl.zeros([LANES], tl.float32)
    for tile in range(0, tl.cdiv(groups, REPEATS * LANES)):
        z = load_scores(row_ptr, tile, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC, REPEATS, LANES)
        m, d = softmax_step(z, m, d, REPEATS)

    c, total = softmax_end(m, d)
    s = tl.log(total)
    logp = tl.where(inside, log_prob(picked, c, s), float("nan"))
    tl.store(logp_ptr + row, tl.where(keep, logp, 0.0))
    tl.store(norm_ptr + 2 * row, tl.where(keep, c, 0.0))
    tl.store(norm_ptr + 2 * row + 1, tl.where(keep, s, 0.0))


@kernel
def _token_logp_bwd(
    logits_ptr,  # [B, T, V] bf16/fp16/fp32
    grad_ptr,  # [N] float: d loss / d logp
    target_ptr,  # [N] int64
    norm_ptr,  # [N, 2] fp32
    out_ptr,  # [B, T, V], out: d loss / d logits; may be logits_ptr
    T, groups, grad_stride, tiles,
    batch_stride, row_stride, out_batch_stride, out_row_stride,
    ignore_index,
    a_hi, a_lo, b_hi, b_lo, slope,
    MODE: tl.constexpr, VEC: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    # One program per tile, nothing carried. A gradient needs no sum over the row, so a row per
    # program would only take parallelism away: tiles fill the GPU from a single row on, all loads
    # of a program are in flight at once, and short programs hide each other's waiting for target
    # and norm. Tiles run from the end of the tensor backwards: what the forward (or the GEMM of a
    # linear op) touched last is in L2. In place: a program reads its own tile only, every column
    # before it is overwritten.
    # Bytes: reads V * itemsize, writes V * itemsize per row; 24 per tile. Deterministic.
    backwards = tl.num_programs(0) - 1 - tl.program_id(0)
    row, tile = (backwards // tiles).to(tl.int64), backwards % tiles
    target = tl.load(target_ptr + row)
    keep = target != ignore_index
    g = tl.load(grad_ptr + row * grad_stride).to(tl.float32) * slope
    g = tl.where((target >= 0) & (target < groups * VEC), g, float("nan"))
    g = tl.where(keep, g, 0.0)
    c = tl.load(norm_ptr + 2 * row)
    s = tl.load(norm_ptr + 2 * row + 1)
    row_ptr = logits_ptr + row_offset(row, T, batch_stride, row_stride, VEC)
    out_ptr += row_offset(row, T, out_batch_stride, out_row_stride, VEC)

    start, width = tile * (REPEATS * LANES * VEC), REPEATS * LANES * VEC
    here = keep & (target >= start) & (target < start + width)
    read = tl.where(keep, groups, 0)
    xs = load_tile(row_ptr, tile, read, 0.0, VEC, REPEATS, LANES)
    own = 0.0
    if here:
        # 1 - p would lose the digits of a confident token. Never above 0 is log_prob's; NaN stays
        # NaN, which `tl.minimum` would lose.
        picked = load_score(row_ptr, target, here, a_hi, a_lo, b_hi, b_lo, MODE) - c
        lp = picked - s
        own = -expm1_neg(tl.where(lp > 0.0, 0.0, -lp), prob(picked, s))
    tl.debug_barrier()  # in place: all threads have read the target's logit, now it may go
    for r in tl.static_range(REPEATS):
        group = block_groups(tile, r, REPEATS, LANES)
        column = columns(group, VEC)
        d = -prob(scores(xs[r], a_hi, a_lo, b_hi, b_lo, MODE) - c, s)
        if here:
            d = tl.where(column == target, own, d)
        d = times_slope(d, xs[r], g, b_hi, b_lo, MODE)
        tl.store(out_ptr + column, d, mask=group < groups, eviction_policy=LAST_USE)


def token_logp_fwd(
    logits: Tensor, target: Tensor, ignore_index: int, temperature: float, softcap: float
) -> tuple[Tensor, Tensor]:
    logp, norm = row_outputs(logits, 1, 2)
    t = tiling("token_logp_fwd", logits)
    mode, scalars = score_scalars(temperature, softcap)
    launch(
        "token_logp_fwd", _token_logp_fwd, t, t.rows,
        logits, target, logp, norm, t.T, t.groups, *t.strides, ignore_index, *scalars, MODE=mode,
    )  # fmt: skip
    return logp, norm


def token_logp_bwd(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    norm: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float,
    out: Tensor,
) -> None:
    t = tiling("token_logp_bwd", logits, out)
    mode, scalars = score_scalars(temperature, softcap)
    launch(
        "token_logp_bwd", _token_logp_bwd, t, t.rows * t.tiles,
        logits, grad, target, norm, out, t.T, t.groups, grad.stride(0), t.tiles, *t.strides,
        ignore_index, *scalars, MODE=mode,
    )  # fmt: skip


def token_logp_fused(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float,
    out: Tensor,
) -> Tensor:
    """Two launches: a program holds no row, so the gradient reads it again."""
    tail = (ignore_index, temperature, softcap)
    logp, norm = token_logp_fwd(logits, target, *tail)
    token_logp_bwd(grad, logits, target, norm, *tail, out)
    return logp
