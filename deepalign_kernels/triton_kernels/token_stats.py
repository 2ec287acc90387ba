from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepalign_kernels.triton_kernels._launch import kernel, launch, score_scalars, tiling
from deepalign_kernels.triton_kernels._rows import (
    LAST_USE,
    NAN,
    NEG_INF,
    columns,
    js_terms,
    kl_terms,
    lane_max,
    lane_sum,
    load_score,
    load_scores,
    log_prob,
    rescale,
    row_offset,
    shift,
    softmax_end,
    spread,
    tile_groups,
)

_NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def _entropy_terms(dx, ex):
    """e^dx dx, 0 where dx = -inf."""
    return tl.where(dx == NEG_INF, 0.0, ex * dx)


@triton.jit
def _first_top(z, column, top, m, index):
    """First column per lane that holds the maximum so far; earlier tiles win ties."""
    found = tl.where(z == spread(lane_max(z)), column, _NO_COLUMN)
    return tl.where(top > m, tl.min(tl.min(found, 2), 0), index)


@triton.jit
def _argmax(m, index):
    """First maximum of the row; column 0 for a row of only -inf, as torch has it."""
    top = tl.max(m, 0)
    first = tl.min(tl.where(m == top, index, _NO_COLUMN), 0)
    return tl.where(top == NEG_INF, 0, first)


@kernel
def _token_stats(
    policy_ptr,  # [B, T, V] bf16/fp16/fp32
    ref_ptr,  # [B, T, V] same dtype
    target_ptr,  # [N] int64 or None
    valid_ptr,  # [N] bool or None
    stats_ptr,  # [8, N] fp32, out: rows as in `reference/token_stats.py`
    N, T, groups,  # V = groups * VEC
    policy_batch_stride, policy_row_stride,  # in units of VEC elements
    ref_batch_stride, ref_row_stride,
    ignore_index, js_beta, rest,  # rest = 1 - js_beta
    a_hi, a_lo, b_hi, b_lo, slope,  # `_rows.scores`
    WITH_JS: tl.constexpr,
    MODE: tl.constexpr, VEC: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    # One program per row. Sweep 1: all but js. Sweep 2, only WITH_JS, backwards: js, which needs
    # both normalisers.
    # Carried per lane, x policy and y reference, shifts c = shift(max):
    #   dx, dy  sum e^(z - c);      hx, hy  sum e^(z - c) (z - c), for the entropies log D - H/D;
    #   axy, ayx  the cross sums of KL(x || y) and KL(y || x) as in `_token_kl_fwd`;  ix, iy  first
    #   maximum.
    # Bytes: reads 2 V * itemsize, 4 V WITH_JS (as far as L2 does not hold the row), writes 32.
    # Deterministic.
    row = tl.program_id(0).to(tl.int64)
    keep = True
    logp, ref_logp = 0.0, 0.0
    if valid_ptr is not None:
        keep = tl.load(valid_ptr + row) != 0
    if target_ptr is not None:
        target = tl.load(target_ptr + row)
        keep = keep & (target != ignore_index)
        inside = keep & (target >= 0) & (target < groups * VEC)
    policy_ptr += row_offset(row, T, policy_batch_stride, policy_row_stride, VEC)
    ref_ptr += row_offset(row, T, ref_batch_stride, ref_row_stride, VEC)
    groups = tl.where(keep, groups, 0)  # a row left out is never read
    tiles = tl.cdiv(groups, REPEATS * LANES)

    mx = tl.full([LANES], NEG_INF, tl.float32)
    my = tl.full([LANES], NEG_INF, tl.float32)
    dx = tl.zeros([LANES], tl.float32)
    dy, hx, hy, axy, ayx = dx, dx, dx, dx, dx
    ix = tl.full([LANES], _NO_COLUMN, tl.int32)
    iy = ix
    for tile in range(0, tiles):
        group = tile_groups(tile, REPEATS, LANES)
        column = columns(group, VEC)
        x = load_scores(policy_ptr, group, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC)
        y = load_scores(ref_ptr, group, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC)
        top_x, top_y = tl.maximum(mx, lane_max(x)), tl.maximum(my, lane_max(y))
        ix, iy = _first_top(x, column, top_x, mx, ix), _first_top(y, column, top_y, my, iy)
        cx, cy = shift(top_x), shift(top_y)
        move_x, move_y = shift(mx) - cx, shift(my) - cy
        scale_x, scale_y = tl.exp(mx - cx), tl.exp(my - cy)
        zx, zy = x - spread(cx), y - spread(cy)
        ex, ey = tl.exp(zx), tl.exp(zy)
        axy = rescale(axy, dx, scale_x, move_x - move_y) + lane_sum(kl_terms(zx, zy, ex))
        ayx = rescale(ayx, dy, scale_y, move_y - move_x) + lane_sum(kl_terms(zy, zx, ey))
        hx = scale_x * tl.fma(move_x, dx, hx) + lane_sum(_entropy_terms(zx, ex))
        hy = scale_y * tl.fma(move_y, dy, hy) + lane_sum(_entropy_terms(zy, ey))
        dx = tl.fma(dx, scale_x, lane_sum(ex))
        dy = tl.fma(dy, scale_y, lane_sum(ey))
        mx, my = top_x, top_y

    cx, total_x = softmax_end(mx, dx)
    cy, total_y = softmax_end(my, dy)
    sx, sy = tl.log(total_x), tl.log(total_y)
    move_x, move_y = shift(mx) - cx, shift(my) - cy
    scale_x, scale_y = tl.exp(mx - cx), tl.exp(my - cy)
    axy = tl.sum(rescale(axy, dx, scale_x, move_x - move_y), 0)
    ayx = tl.sum(rescale(ayx, dy, scale_y, move_y - move_x), 0)
    hx = tl.sum(scale_x * tl.fma(move_x, dx, hx), 0)
    hy = tl.sum(scale_y * tl.fma(move_y, dy, hy), 0)
    kl_xy = tl.div_rn(axy, total_x) + tl.log(tl.div_rn(total_y, total_x))
    kl_yx = tl.div_rn(ayx, total_y) + tl.log(tl.div_rn(total_x, total_y))
    agree = tl.where(_argmax(mx, ix) == _argmax(my, iy), 1.0, 0.0)
    if target_ptr is not None:
        picked = load_score(policy_ptr, target, inside, a_hi, a_lo, b_hi, b_lo, MODE)
        ref_picked = load_score(ref_ptr, target, inside, a_hi, a_lo, b_hi, b_lo, MODE)
        logp = tl.where(inside, log_prob(picked, cx, sx), NAN)
        ref_logp = tl.where(inside, log_prob(ref_picked, cy, sy), NAN)

    js = 0.0
    if WITH_JS:
        # One sum; the two of `token_kl._js_sums` would cost this kernel registers.
        part = tl.zeros([LANES], tl.float32)
        for i in range(0, tiles):
            group = tile_groups(tiles - 1 - i, REPEATS, LANES)
            x = load_scores(policy_ptr, group, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC, LAST_USE)
            y = load_scores(ref_ptr, group, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC, LAST_USE)
            lq, lp = (x - cx) - sx, (y - cy) - sy
            q, p, log_mq, log_mp = js_terms(lq, lp, js_beta, rest)
            terms = rest * tl.where(lq == NEG_INF, 0.0, -q * log_mq)
            part += lane_sum(terms + js_beta * tl.where(lp == NEG_INF, 0.0, -p * log_mp))
        js = tl.sum(part, 0)

    stats_ptr += row
    step = N.to(tl.int64)
    tl.store(stats_ptr, tl.where(keep, logp, 0.0))
    tl.store(stats_ptr + step, tl.where(keep, ref_logp, 0.0))
    tl.store(stats_ptr + 2 * step, tl.where(keep, kl_xy, 0.0))
    tl.store(stats_ptr + 3 * step, tl.where(keep, kl_yx, 0.0))
    tl.store(stats_ptr + 4 * step, tl.where(keep, js, 0.0))
    tl.store(stats_ptr + 5 * step, tl.where(keep, sx - tl.div_rn(hx, total_x), 0.0))
    tl.store(stats_ptr + 6 * step, tl.where(keep, sy - tl.div_rn(hy, total_y), 0.0))
    tl.store(stats_ptr + 7 * step, tl.where(keep, agree, 0.0))


def token_stats_fwd(
    policy: Tensor,
    ref: Tensor,
    target: Tensor | None,
    valid: Tensor | None,
    ignore_index: int,
    js_beta: float,
    temperature: float,
    softcap: float,
) -> Tensor:
    t = tiling("token_stats", policy, ref)
    stats = torch.empty((8, t.rows), dtype=torch.float32, device=policy.device)
    mode, scalars = score_scalars(temperature, softcap)
    launch(
        "token_stats", _token_stats, t, t.rows,
        policy, ref, target, valid, stats, t.rows, t.T, t.groups, *t.strides,
        ignore_index, js_beta, 1.0 - js_beta, *scalars, WITH_JS=js_beta > 0, MODE=mode,
    )  # fmt: skip
    return stats
