from __future__ import annotations

import triton
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
    INF,
    LAST_USE,
    NAN,
    NEG_INF,
    columns,
    js_terms,
    kl_terms,
    lane_max,
    lane_sum,
    load_scores,
    rescale,
    row_offset,
    scores,
    shift,
    slopes,
    softmax_end,
    softmax_step,
    spread,
    tile_groups,
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
    # and, with cx, cy, ct = shift(mx), shift(my), shift(t),
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
        group = tile_groups(tile, REPEATS, LANES)
        x = load_scores(own_ptr, group, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC)
        y = load_scores(other_ptr, group, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC)
        top_x = tl.maximum(mx, lane_max(x))
        top_y = tl.maximum(my, lane_max(y))
        top_t = tl.where(top_x > mx, lane_max(tl.where(x == spread(top_x), y, NEG_INF)), t)
        cx, cy, ct = shift(top_x), shift(top_y), shift(top_t)
        dx = x - spread(cx)
        ex = tl.exp(dx)
        scale = tl.exp(mx - cx)
        a = rescale(a, d, scale, (shift(mx) - cx) - (shift(t) - ct))
        a += lane_sum(kl_terms(dx, y - spread(ct), ex))
        d = tl.fma(d, scale, lane_sum(ex))
        e = tl.fma(e, tl.exp(my - cy), lane_sum(tl.exp(y - spread(cy))))
        mx, my, t = top_x, top_y, top_t

    cx, total_x = softmax_end(mx, d)
    cy, total_y = softmax_end(my, e)
    anchor = tl.max(tl.where(mx == cx, t, NEG_INF), 0)
    a = rescale(a, d, tl.exp(mx - cx), (shift(mx) - cx) - (shift(t) - shift(anchor)))
    log_ratio = tl.log(tl.div_rn(total_y, total_x)) - (anchor - cy)
    kl = tl.div_rn(tl.sum(a, 0), total_x) + log_ratio
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
    MODE: tl.constexpr, VEC: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """Sums over a row, backwards, of KL(policy || mixture) and KL(ref || mixture), under the
    normalisers (cx, sx) and (cy, sy). Carried per lane: the two sums. EVICT: `load_scores`."""
    tiles = tl.cdiv(groups, REPEATS * LANES)
    policy_part = tl.zeros([LANES], tl.float32)
    ref_part = tl.zeros([LANES], tl.float32)
    for i in range(0, tiles):
        group = tile_groups(tiles - 1 - i, REPEATS, LANES)
        x = load_scores(policy_ptr, group, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC, EVICT)
        y = load_scores(ref_ptr, group, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC, EVICT)
        lq, lp = (x - cx) - sx, (y - cy) - sy
        q, p, log_mq, log_mp = js_terms(lq, lp, js_beta, rest)
        policy_part += lane_sum(tl.where(lq == NEG_INF, 0.0, -q * log_mq))
        ref_part += lane_sum(tl.where(lp == NEG_INF, 0.0, -p * log_mp))
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
        group = tile_groups(tile, REPEATS, LANES)
        x = load_scores(policy_ptr, group, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC)
        y = load_scores(ref_ptr, group, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC)
        mx, d = softmax_step(x, mx, d)
        my, e = softmax_step(y, my, e)
    cx, total_x = softmax_end(mx, d)
    cy, total_y = softmax_end(my, e)
    sx, sy = tl.log(total_x), tl.log(total_y)

    center, ref_part = _js_sums(
        policy_ptr, ref_ptr, groups, cx, sx, cy, sy, js_beta, rest, a_hi, a_lo, b_hi, b_lo,
        MODE, VEC, REPEATS, LANES, LAST_USE,
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
        MODE, VEC, REPEATS, LANES, EVICT="",
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
    MODE: tl.constexpr, VEC: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    # One program per tile, backwards from the end of the tensor: see `_token_logp_bwd`.
    # Bytes: reads 2 V * itemsize, writes V * itemsize per row; 25 per tile. Deterministic.
    backwards = tl.num_programs(0) - 1 - tl.program_id(0)
    row, tile = (backwards // tiles).to(tl.int64), backwards % tiles
    keep = True
    if valid_ptr is not None:
        keep = tl.load(valid_ptr + row) != 0
    g = tl.load(grad_ptr + row * grad_stride).to(tl.float32)
    cx, sx = tl.load(policy_norm_ptr + 2 * row), tl.load(policy_norm_ptr + 2 * row + 1)
    cy, sy = tl.load(ref_norm_ptr + 2 * row), tl.load(ref_norm_ptr + 2 * row + 1)
    center = tl.load(center_ptr + row)

    group = tile_groups(tile, REPEATS, LANES)
    column = columns(group, VEC)
    wanted = keep & (group < groups)
    policy_ptr += row_offset(row, T, policy_batch_stride, policy_row_stride, VEC)
    ref_ptr += row_offset(row, T, ref_batch_stride, ref_row_stride, VEC)
    x = tl.load(policy_ptr + column, mask=wanted, other=0.0).to(tl.float32)
    y = tl.load(ref_ptr + column, mask=wanted, other=0.0).to(tl.float32)
    lq = (scores(x, a_hi, a_lo, b_hi, b_lo, MODE) - cx) - sx
    lp = (scores(y, a_hi, a_lo, b_hi, b_lo, MODE) - cy) - sy
    if DIRECTION == _POLICY_REF:
        d = tl.where(lq == NEG_INF, 0.0, tl.exp(lq) * ((lq - lp) - center))
        g = tl.where(center == INF, NAN, g)
    elif DIRECTION == _JS:
        q, _, log_mq, _ = js_terms(lq, lp, js_beta, rest)
        d = tl.where(lq == NEG_INF, 0.0, rest * q * (-log_mq - center))
    else:
        d = tl.exp(lq) - tl.exp(lp)
    d = g * (d * slopes(x, b_hi, b_lo, slope, MODE))
    out_ptr += row_offset(row, T, out_batch_stride, out_row_stride, VEC)
    d = tl.where(keep, d, 0.0)
    tl.store(out_ptr + column, d, mask=group < groups, eviction_policy=LAST_USE)


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
            js_beta, 1.0 - js_beta, *scalars, MODE=mode,
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
        *t.strides, js_beta, 1.0 - js_beta, *scalars, MODE=mode,
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
        t.tiles, *t.strides, js_beta, 1.0 - js_beta, *scalars, DIRECTION=direction, MODE=mode,
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
