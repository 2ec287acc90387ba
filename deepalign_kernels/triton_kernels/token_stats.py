from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepalign_kernels.triton_kernels._launch import (
    js_modes,
    kernel,
    launch,
    score_scalars,
    tiling,
)
from deepalign_kernels.triton_kernels._rows import (
    LAST_USE,
    LOWEST,
    NEG_INF,
    block_groups,
    columns,
    exp,
    js_series,
    js_terms,
    lane_max,
    load_score,
    load_scores,
    log_prob,
    log_ratio,
    rescale,
    row_offset,
    shift,
    softmax_end,
    sum_end,
)

_NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def _argmax(
    row_ptr, m, tile, groups, a_hi, a_lo, b_hi, b_lo, MODE: tl.constexpr,
    VEC: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """First column that holds the maximum of the row, 0 for a row of only -inf, as torch has it.

    m: maximum per lane; tile: the first tile that held it. Only lanes whose maximum is the row's
    read that tile again: looking for columns in every tile costs 3 instructions per column.
    """
    top = tl.max(m, 0)
    read = tl.where(m == top, groups, 0)[:, None]
    zs = load_scores(
        row_ptr, tile[:, None], read, a_hi, a_lo, b_hi, b_lo, MODE, VEC, REPEATS, LANES
    )
    first = tl.full([LANES], _NO_COLUMN, tl.int32)
    for r in tl.static_range(REPEATS):
        column = columns(block_groups(tile[:, None], r, REPEATS, LANES), VEC)
        found = tl.where((m == top)[:, None] & (zs[r] == top), column, _NO_COLUMN)
        first = tl.minimum(first, tl.min(found, 1))
    return tl.min(first, 0)


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
    AT_END: tl.constexpr, LG2: tl.constexpr,  # `_rows.js_terms`
    MODE: tl.constexpr, VEC: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    # One program per row. Sweep 1: all but js. Sweep 2, only WITH_JS, backwards: js, which needs
    # both normalisers.
    # Carried per lane, x policy and y reference, shifts c = shift(max):
    #   dx, dy  sum e^(z - c);      hx, hy  sum e^(z - c) (z - c), for the entropies log D - H/D;
    #   axy, ayx  the cross sums of KL(x || y) and KL(y || x) as in `_token_kl_fwd`;  ix, iy  the
    #   first tile that holds the maximum.
    # Bytes: reads 2 V * itemsize and 2 tiles at most, 4 V WITH_JS (as far as L2 does not hold the
    # row), writes 32.
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
    ix = tl.zeros([LANES], tl.int32)
    iy = ix
    for tile in range(0, tiles):
        x = load_scores(policy_ptr, tile, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC, REPEATS, LANES)
        y = load_scores(ref_ptr, tile, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC, REPEATS, LANES)
        top_x = tl.maximum(mx, lane_max(x, REPEATS))
        top_y = tl.maximum(my, lane_max(y, REPEATS))
        ix, iy = tl.where(top_x > mx, tile, ix), tl.where(top_y > my, tile, iy)
        cx, cy = shift(top_x), shift(top_y)
        move_x, move_y = shift(mx) - cx, shift(my) - cy
        scale_x, scale_y = exp(mx - cx), exp(my - cy)
        axy = rescale(axy, dx, scale_x, move_x - move_y)
        ayx = rescale(ayx, dy, scale_y, move_y - move_x)
        hx, hy = rescale(hx, dx, scale_x, move_x), rescale(hy, dy, scale_y, move_y)
        dx *= scale_x
        dy *= scale_y
        for r in tl.static_range(REPEATS):
            zx, zy = x[r] - cx[:, None], y[r] - cy[:, None]
            ex, ey = exp(zx), exp(zy)
            axy += tl.sum(ex * log_ratio(zx, zy), 1)
            ayx += tl.sum(ey * log_ratio(zy, zx), 1)
            hx += tl.sum(ex * tl.where(zx > LOWEST, zx, LOWEST), 1)
            hy += tl.sum(ey * tl.where(zy > LOWEST, zy, LOWEST), 1)
            dx += tl.sum(ex, 1)
            dy += tl.sum(ey, 1)
        mx, my = top_x, top_y

    cx, total_x = softmax_end(mx, dx)
    cy, total_y = softmax_end(my, dy)
    sx, sy = tl.log(total_x), tl.log(total_y)
    move_x, move_y = shift(mx) - cx, shift(my) - cy
    scale_x, scale_y = exp(mx - cx), exp(my - cy)
    axy = sum_end(tl.sum(rescale(axy, dx, scale_x, move_x - move_y), 0))
    ayx = sum_end(tl.sum(rescale(ayx, dy, scale_y, move_y - move_x), 0))
    hx = tl.sum(rescale(hx, dx, scale_x, move_x), 0)
    hy = tl.sum(rescale(hy, dy, scale_y, move_y), 0)
    kl_xy = tl.div_rn(axy, total_x) + tl.log(tl.div_rn(total_y, total_x))
    kl_yx = tl.div_rn(ayx, total_y) + tl.log(tl.div_rn(total_x, total_y))
    top_column = _argmax(
        policy_ptr, mx, ix, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC, REPEATS, LANES
    )
    ref_top_column = _argmax(
        ref_ptr, my, iy, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC, REPEATS, LANES
    )
    agree = tl.where(top_column == ref_top_column, 1.0, 0.0)
    if target_ptr is not None:
        picked = load_score(policy_ptr, target, inside, a_hi, a_lo, b_hi, b_lo, MODE)
        ref_picked = load_score(ref_ptr, target, inside, a_hi, a_lo, b_hi, b_lo, MODE)
        logp = tl.where(inside, log_prob(picked, cx, sx), float("nan"))
        ref_logp = tl.where(inside, log_prob(ref_picked, cy, sy), float("nan"))

    js = 0.0
    if WITH_JS:
        # One sum; the two of `token_kl._js_sums` would cost this kernel registers.
        part = tl.zeros([LANES], tl.float32)
        k2, k3, k4, k5, k6 = js_series(js_beta, rest)
        for i in range(0, tiles):
            tile = tiles - 1 - i
            x = load_scores(
                policy_ptr, tile, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC, REPEATS, LANES,
                LAST_USE,
            )  # fmt: skip
            y = load_scores(
                ref_ptr, tile, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC, REPEATS, LANES,
                LAST_USE,
            )  # fmt: skip
            for r in tl.static_range(REPEATS):
                q, p, log_mq, log_mp = js_terms(
                    x[r] - cx, y[r] - cy, sx, sy, js_beta, rest, k2, k3, k4, k5, k6, AT_END, LG2
                )
                part -= tl.sum(rest * (q * log_mq) + js_beta * (p * log_mp), 1)
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
        ignore_index, js_beta, 1.0 - js_beta, *scalars, WITH_JS=js_beta > 0,
        **js_modes(js_beta or 0.5, t), MODE=mode,
    )  # fmt: skip
    return stats
