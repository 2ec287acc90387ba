from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from deepalign_kernels.triton_kernels._launch import (
    js_modes,
    kernel,
    launch,
    row_outputs,
    score_scalars,
    tiling,
)
from deepalign_kernels.triton_kernels._rows import (
    INF,
    LAST_USE,
    NEG_INF,
    anchor_of,
    block_groups,
    columns,
    exp,
    js_series,
    js_terms,
    lane_max,
    load_scores,
    load_tile,
    log_ratio,
    prob,
    rescale,
    row_offset,
    score_at,
    scores,
    shift,
    softmax_end,
    softmax_step,
    sum_end,
    times_slope,
)

POLICY_REF, REF_POLICY, JS = 0, 1, 2
_POLICY_REF, _JS = tl.constexpr(POLICY_REF), tl.constexpr(JS)


@kernel
def _token_kl_fwd(
    own_ptr,  # [B, T, V] bf16/fp16/fp32: the first argument of KL(own || other)
    other_ptr,  # [B, T, V] same dtype
    valid_ptr,  # [N] bool or None
    kl_ptr,  # [N] fp32, out
    own_norm_ptr,  # [N, 2] fp32, out: (max z, log sum exp(z - max z))
    other_norm_ptr,  # [N, 2] fp32, out
    center_ptr,  # [N] fp32, out: KL, or 0 where OWN_IS_REF
    T, groups,  # V = groups * VEC
    own_batch_stride, own_row_stride,  # in units of VEC elements
    other_batch_stride, other_row_stride,
    a_hi, a_lo, b_hi, b_lo, slope,  # `_rows.scores`
    OWN_IS_REF: tl.constexpr,
    MODE: tl.constexpr, VEC: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    # One program per row, one sweep over both rows.
    # Carried per lane: maxima mx, my (own x, other y), the anchor t = y where x has its maximum,
    # and, with cx, cy, ct = shift(mx), shift(my), anchor_of(t, mx),
    #   d = sum e^(x - cx),  e = sum e^(y - cy),  a = sum e^(x - cx) ((x - cx) - (y - ct)).
    # Invariant: they describe exactly the columns this lane has seen. With T the anchor of the row,
    # KL = A/D + (log(E/D) - (T - cy)). The bracket is the log-ratio of the likeliest column,
    # rounded as the gradient rounds it, so that the two cancel for a confident row: a is 0 for
    # that column. Equal rows give exactly 0: every term of a is 0, E = D and T = cy.
    # Bytes: reads 2 V * itemsize, writes 24. Deterministic: fixed order, no atomics.
    row = tl.program_id(0).to(tl.int64)
    keep = True
    if valid_ptr is not None:
        keep = tl.load(valid_ptr + row) != 0
        groups = tl.where(keep, groups, 0)  # a row left out is never read
    own_ptr += row_offset(row, T, own_batch_stride, own_row_stride, VEC)
    other_ptr += row_offset(row, T, other_batch_stride, other_row_stride, VEC)

    mx = tl.full([LANES], NEG_INF, tl.float32)
    my = tl.full([LANES], NEG_INF, tl.float32)
    t = tl.full([LANES], NEG_INF, tl.float32)
    d = tl.zeros([LANES], tl.float32)
    e = tl.zeros([LANES], tl.float32)
    a = tl.zeros([LANES], tl.float32)
    for tile in range(0, tl.cdiv(groups, REPEATS * LANES)):
        x = load_scores(own_ptr, tile, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC, REPEATS, LANES)
        y = load_scores(other_ptr, tile, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC, REPEATS, LANES)
        top_x = tl.maximum(mx, lane_max(x, REPEATS))
        top_y = tl.maximum(my, lane_max(y, REPEATS))
        top_t = tl.where(top_x > mx, score_at(x, y, top_x, REPEATS), t)
        cx, cy, ct = shift(top_x), shift(top_y), anchor_of(top_t, top_x)
        scale = exp(mx - cx)
        a = rescale(a, d, scale, (shift(mx) - cx) - (anchor_of(t, mx) - ct))
        d *= scale
        e *= exp(my - cy)
        for r in tl.static_range(REPEATS):
            dx = x[r] - cx[:, None]
            ex = exp(dx)
            a += tl.sum(ex * log_ratio(dx, y[r] - ct[:, None]), 1)
            d += tl.sum(ex, 1)
            e += tl.sum(exp(y[r] - cy[:, None]), 1)
        mx, my, t = top_x, top_y, top_t

    cx, total_x = softmax_end(mx, d)
    cy, total_y = softmax_end(my, e)
    anchor = anchor_of(tl.max(tl.where(mx == cx, t, NEG_INF), 0), cx)
    a = rescale(a, d, exp(mx - cx), (shift(mx) - cx) - (anchor_of(t, mx) - anchor))
    ratio = tl.log(tl.div_rn(total_y, total_x)) - (anchor - cy)
    kl = tl.div_rn(sum_end(tl.sum(a, 0)), total_x) + ratio
    kl = tl.where(keep, kl, 0.0)
    tl.store(kl_ptr + row, kl)
    tl.store(center_ptr + row, 0.0 if OWN_IS_REF else kl)
    tl.store(own_norm_ptr + 2 * row, tl.where(keep, cx, 0.0))
    tl.store(own_norm_ptr + 2 * row + 1, tl.where(keep, tl.log(total_x), 0.0))
    tl.store(other_norm_ptr + 2 * row, tl.where(keep, cy, 0.0))
    tl.store(other_norm_ptr + 2 * row + 1, tl.where(keep, tl.log(total_y), 0.0))


@triton.jit
def _js_sums(
    policy_ptr, ref_ptr, groups, cx, sx, cy, sy, js_beta, rest, a_hi, a_lo, b_hi, b_lo,
    AT_END: tl.constexpr, LG2: tl.constexpr,
    MODE: tl.constexpr, VEC: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """Sums over a row, backwards, of KL(policy || mixture) and KL(ref || mixture), under the
    normalisers (cx, sx) and (cy, sy). Carried per lane: the two sums. EVICT: `load_tile`."""
    tiles = tl.cdiv(groups, REPEATS * LANES)
    k2, k3, k4, k5, k6 = js_series(js_beta, rest)
    policy_part = tl.zeros([LANES], tl.float32)
    ref_part = tl.zeros([LANES], tl.float32)
    for i in range(0, tiles):
        tile = tiles - 1 - i
        x = load_scores(
            policy_ptr, tile, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC, REPEATS, LANES, EVICT
        )
        y = load_scores(
            ref_ptr, tile, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC, REPEATS, LANES, EVICT
        )
        for r in tl.static_range(REPEATS):
            q, p, log_mq, log_mp = js_terms(
                x[r] - cx, y[r] - cy, sx, sy, js_beta, rest, k2, k3, k4, k5, k6, AT_END, LG2
            )
            policy_part -= tl.sum(q * log_mq, 1)
            ref_part -= tl.sum(p * log_mp, 1)
    return tl.sum(policy_part, 0), tl.sum(ref_part, 0)


@kernel
def _token_js_fwd(
    policy_ptr,  # [B, T, V] bf16/fp16/fp32
    ref_ptr,  # [B, T, V] same dtype
    valid_ptr,  # [N] bool or None
    js_ptr,  # [N] fp32, out
    policy_norm_ptr,  # [N, 2] fp32, out
    ref_norm_ptr,  # [N, 2] fp32, out
    center_ptr,  # [N] fp32, out: KL(policy || mixture)
    T, groups,
    policy_batch_stride, policy_row_stride, ref_batch_stride, ref_row_stride,
    js_beta, rest,  # rest = 1 - js_beta
    a_hi, a_lo, b_hi, b_lo, slope,
    AT_END: tl.constexpr, LG2: tl.constexpr,  # `_rows.js_terms`
    MODE: tl.constexpr, VEC: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    # One program per row, two sweeps over both rows: the mixture needs both normalisers first. The
    # second runs backwards, so that it begins with the columns still in cache.
    # Carried per lane: sweep 1 maxima and sums of exponentials; sweep 2 the sums of KL(policy ||
    # m), KL(ref || m).
    # Bytes: reads 4 V * itemsize (2 V from DRAM where the row stays in L2), writes 24.
    # Deterministic.
    row = tl.program_id(0).to(tl.int64)
    keep = True
    if valid_ptr is not None:
        keep = tl.load(valid_ptr + row) != 0
        groups = tl.where(keep, groups, 0)
    policy_ptr += row_offset(row, T, policy_batch_stride, policy_row_stride, VEC)
    ref_ptr += row_offset(row, T, ref_batch_stride, ref_row_stride, VEC)

    mx = tl.full([LANES], NEG_INF, tl.float32)
    my = tl.full([LANES], NEG_INF, tl.float32)
    d = tl.zeros([LANES], tl.float32)
    e = tl.zeros([LANES], tl.float32)
    for tile in range(0, tl.cdiv(groups, REPEATS * LANES)):
        x = load_scores(policy_ptr, tile, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC, REPEATS, LANES)
        y = load_scores(ref_ptr, tile, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC, REPEATS, LANES)
        mx, d = softmax_step(x, mx, d, REPEATS)
        my, e = softmax_step(y, my, e, REPEATS)
    cx, total_x = softmax_end(mx, d)
    cy, total_y = softmax_end(my, e)
    sx, sy = tl.log(total_x), tl.log(total_y)

    center, ref_part = _js_sums(
        policy_ptr, ref_ptr, groups, cx, sx, cy, sy, js_beta, rest, a_hi, a_lo, b_hi, b_lo,
        AT_END, LG2, MODE, VEC, REPEATS, LANES, LAST_USE,
    )  # fmt: skip
    js = js_beta * ref_part + rest * center
    tl.store(js_ptr + row, tl.where(keep, js, 0.0))
    tl.store(center_ptr + row, tl.where(keep, center, 0.0))
    tl.store(policy_norm_ptr + 2 * row, tl.where(keep, cx, 0.0))
    tl.store(policy_norm_ptr + 2 * row + 1, tl.where(keep, sx, 0.0))
    tl.store(ref_norm_ptr + 2 * row, tl.where(keep, cy, 0.0))
    tl.store(ref_norm_ptr + 2 * row + 1, tl.where(keep, sy, 0.0))


@kernel
def _token_js_parts(
    policy_ptr,  # [B, T, V] bf16/fp16/fp32
    ref_ptr,  # [B, T, V] same dtype
    valid_ptr,  # [N] bool or None
    policy_norm_ptr,  # [N, 2] fp32
    ref_norm_ptr,  # [N, 2] fp32
    policy_part_ptr,  # [N] fp32, out: these columns' share of KL(policy || mixture)
    ref_part_ptr,  # [N] fp32, out: of KL(ref || mixture)
    T, groups,
    policy_batch_stride, policy_row_stride, ref_batch_stride, ref_row_stride,
    js_beta, rest,  # rest = 1 - js_beta
    a_hi, a_lo, b_hi, b_lo, slope,
    AT_END: tl.constexpr, LG2: tl.constexpr,  # `_rows.js_terms`
    MODE: tl.constexpr, VEC: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    # One program per row: the second sweep of `_token_js_fwd`, under normalisers that it is given.
    # Bytes: reads 2 V * itemsize + 16, writes 8. Deterministic.
    row = tl.program_id(0).to(tl.int64)
    keep = True
    if valid_ptr is not None:
        keep = tl.load(valid_ptr + row) != 0
        groups = tl.where(keep, groups, 0)
    policy_ptr += row_offset(row, T, policy_batch_stride, policy_row_stride, VEC)
    ref_ptr += row_offset(row, T, ref_batch_stride, ref_row_stride, VEC)
    cx, sx = tl.load(policy_norm_ptr + 2 * row), tl.load(policy_norm_ptr + 2 * row + 1)
    cy, sy = tl.load(ref_norm_ptr + 2 * row), tl.load(ref_norm_ptr + 2 * row + 1)

    policy_part, ref_part = _js_sums(
        policy_ptr, ref_ptr, groups, cx, sx, cy, sy, js_beta, rest, a_hi, a_lo, b_hi, b_lo,
        AT_END, LG2, MODE, VEC, REPEATS, LANES, EVICT="",
    )  # fmt: skip
    tl.store(policy_part_ptr + row, tl.where(keep, policy_part, 0.0))
    tl.store(ref_part_ptr + row, tl.where(keep, ref_part, 0.0))


@kernel
def _token_kl_bwd(
    policy_ptr,  # [B, T, V] bf16/fp16/fp32
    ref_ptr,  # [B, T, V] same dtype
    grad_ptr,  # [N] float: d loss / d divergence
    valid_ptr,  # [N] bool or None
    policy_norm_ptr,  # [N, 2] fp32
    ref_norm_ptr,  # [N, 2] fp32
    center_ptr,  # [N] fp32
    out_ptr,  # [B, T, V], out: d loss / d policy; may be policy_ptr
    T, groups, grad_stride, tiles,
    policy_batch_stride, policy_row_stride,  # in units of VEC elements
    ref_batch_stride, ref_row_stride, out_batch_stride, out_row_stride,
    js_beta, rest,
    a_hi, a_lo, b_hi, b_lo, slope,
    DIRECTION: tl.constexpr,
    AT_END: tl.constexpr, LG2: tl.constexpr,  # `_rows.js_terms`
    MODE: tl.constexpr, VEC: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    # One program per tile, backwards from the end of the tensor: see `_token_logp_bwd`.
    # Bytes: reads 2 V * itemsize, writes V * itemsize per row; 25 per tile. Deterministic.
    backwards = tl.num_programs(0) - 1 - tl.program_id(0)
    row, tile = (backwards // tiles).to(tl.int64), backwards % tiles
    keep = True
    if valid_ptr is not None:
        keep = tl.load(valid_ptr + row) != 0
    g = tl.where(keep, tl.load(grad_ptr + row * grad_stride).to(tl.float32) * slope, 0.0)
    cx, sx = tl.load(policy_norm_ptr + 2 * row), tl.load(policy_norm_ptr + 2 * row + 1)
    cy, sy = tl.load(ref_norm_ptr + 2 * row), tl.load(ref_norm_ptr + 2 * row + 1)
    center = tl.load(center_ptr + row)
    if DIRECTION == _POLICY_REF:
        g = tl.where(keep & (center == INF), float("nan"), g)
        center += sx - sy
    elif DIRECTION == _JS:
        g *= -rest
        k2, k3, k4, k5, k6 = js_series(js_beta, rest)
    policy_ptr += row_offset(row, T, policy_batch_stride, policy_row_stride, VEC)
    ref_ptr += row_offset(row, T, ref_batch_stride, ref_row_stride, VEC)
    out_ptr += row_offset(row, T, out_batch_stride, out_row_stride, VEC)

    read = tl.where(keep, groups, 0)
    x = load_tile(policy_ptr, tile, read, 0.0, VEC, REPEATS, LANES)
    y = load_tile(ref_ptr, tile, read, 0.0, VEC, REPEATS, LANES)
    for r in tl.static_range(REPEATS):
        dx = scores(x[r], a_hi, a_lo, b_hi, b_lo, MODE) - cx
        dy = scores(y[r], a_hi, a_lo, b_hi, b_lo, MODE) - cy
        if DIRECTION == _POLICY_REF:
            d = prob(dx, sx) * (log_ratio(dx, dy) - center)
        elif DIRECTION == _JS:
            q, _, log_mq, _ = js_terms(
                dx, dy, sx, sy, js_beta, rest, k2, k3, k4, k5, k6, AT_END, LG2
            )
            d = q * (log_mq + center)
        else:
            d = prob(dx, sx) - prob(dy, sy)
        d = times_slope(d, x[r], g, b_hi, b_lo, MODE)
        group = block_groups(tile, r, REPEATS, LANES)
        at = out_ptr + columns(group, VEC)
        tl.store(at, d, mask=group < groups, eviction_policy=LAST_USE)


def token_kl_fwd(
    policy: Tensor,
    ref: Tensor,
    valid: Tensor | None,
    direction: int,
    js_beta: float,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kl, norm_policy, norm_ref, center = row_outputs(policy, 1, 2, 2, 1)
    mode, scalars = score_scalars(temperature, softcap)
    if direction == JS:
        t = tiling("token_js_fwd", policy, ref)
        launch(
            "token_js_fwd", _token_js_fwd, t, t.rows,
            policy, ref, valid, kl, norm_policy, norm_ref, center, t.T, t.groups, *t.strides,
            js_beta, 1.0 - js_beta, *scalars, **js_modes(js_beta, t), MODE=mode,
        )  # fmt: skip
        return kl, norm_policy, norm_ref, center
    sides = [(policy, norm_policy), (ref, norm_ref)]
    if direction == REF_POLICY:
        sides.reverse()
    (own, own_norm), (other, other_norm) = sides
    t = tiling("token_kl_fwd", own, other)
    launch(
        "token_kl_fwd", _token_kl_fwd, t, t.rows,
        own, other, valid, kl, own_norm, other_norm, center, t.T, t.groups, *t.strides,
        *scalars, OWN_IS_REF=direction == REF_POLICY, MODE=mode,
    )  # fmt: skip
    return kl, norm_policy, norm_ref, center


def token_js_parts(
    policy: Tensor,
    ref: Tensor,
    valid: Tensor | None,
    norm_policy: Tensor,
    norm_ref: Tensor,
    js_beta: float,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    policy_part, ref_part = row_outputs(policy, 1, 1)
    t = tiling("token_js_parts", policy, ref)
    mode, scalars = score_scalars(temperature, softcap)
    launch(
        "token_js_parts", _token_js_parts, t, t.rows,
        policy, ref, valid, norm_policy, norm_ref, policy_part, ref_part, t.T, t.groups,
        *t.strides, js_beta, 1.0 - js_beta, *scalars, **js_modes(js_beta, t), MODE=mode,
    )  # fmt: skip
    return policy_part, ref_part


def token_kl_bwd(
    grad: Tensor,
    policy: Tensor,
    ref: Tensor,
    valid: Tensor | None,
    norm_policy: Tensor,
    norm_ref: Tensor,
    center: Tensor,
    direction: int,
    js_beta: float,
    temperature: float,
    softcap: float,
    out: Tensor,
) -> None:
    t = tiling("token_kl_bwd", policy, ref, out)
    mode, scalars = score_scalars(temperature, softcap)
    launch(
        "token_kl_bwd", _token_kl_bwd, t, t.rows * t.tiles,
        policy, ref, grad, valid, norm_policy, norm_ref, center, out, t.T, t.groups, grad.stride(0),
        t.tiles, *t.strides, js_beta, 1.0 - js_beta, *scalars, DIRECTION=direction,
        **js_modes(js_beta if direction == JS else 0.5, t), MODE=mode,
    )  # fmt: skip


def token_kl_fused(
    grad: Tensor,
    policy: Tensor,
    ref: Tensor,
    valid: Tensor | None,
    direction: int,
    js_beta: float,
    temperature: float,
    softcap: float,
    out: Tensor,
) -> Tensor:
    """Two launches: a program holds no row, so the gradient reads both again."""
    tail = (direction, js_beta, temperature, softcap)
    kl, norm_policy, norm_ref, center = token_kl_fwd(policy, ref, valid, *tail)
    token_kl_bwd(grad, policy, ref, valid, norm_policy, norm_ref, center, *tail, out)
    return kl
