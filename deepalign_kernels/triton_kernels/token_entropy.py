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
    LOWEST,
    NEG_INF,
    block_groups,
    columns,
    exp,
    lane_max,
    load_scores,
    load_tile,
    prob,
    rescale,
    row_offset,
    scores,
    shift,
    softmax_end,
    times_slope,
)


@kernel
def _token_entropy_fwd(
    logits_ptr,  # [B, T, V] bf16/fp16/fp32
    valid_ptr,  # [N] bool or None
    entropy_ptr,  # [N] fp32, out
    norm_ptr,  # [N, 2] fp32, out: (max z, log sum exp(z - max z))
    T, groups,  # V = groups * VEC
    batch_stride, row_stride,  # in units of VEC elements
    a_hi, a_lo, b_hi, b_lo, slope,  # `_rows.scores`
    MODE: tl.constexpr, VEC: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    # One program per row, one sweep over V.
    # Carried per lane, c = shift(m): m = max z, d = sum e^(z - c), h = sum e^(z - c) (z - c); the
    # entropy is log D - H / D, whose terms do not grow with the logits.
    # Bytes: reads V * itemsize, writes 12. Deterministic.
    row = tl.program_id(0).to(tl.int64)
    keep = True
    if valid_ptr is not None:
        keep = tl.load(valid_ptr + row) != 0
    row_ptr = logits_ptr + row_offset(row, T, batch_stride, row_stride, VEC)
    groups = tl.where(keep, groups, 0)  # a row left out is never read

    m = tl.full([LANES], NEG_INF, tl.float32)
    d = tl.zeros([LANES], tl.float32)
    h = d
    for tile in range(0, tl.cdiv(groups, REPEATS * LANES)):
        z = load_scores(row_ptr, tile, groups, a_hi, a_lo, b_hi, b_lo, MODE, VEC, REPEATS, LANES)
        top = tl.maximum(m, lane_max(z, REPEATS))
        c = shift(top)
        scale = exp(m - c)
        h = rescale(h, d, scale, shift(m) - c)
        d *= scale
        for r in tl.static_range(REPEATS):
            dz = z[r] - c[:, None]
            e = exp(dz)
            h += tl.sum(e * tl.where(dz > LOWEST, dz, LOWEST), 1)  # e is 0 there
            d += tl.sum(e, 1)
        m = top

    c, total = softmax_end(m, d)
    h = tl.sum(rescale(h, d, exp(m - c), shift(m) - c), 0)
    s = tl.log(total)
    tl.store(entropy_ptr + row, tl.where(keep, s - tl.div_rn(h, total), 0.0))
    tl.store(norm_ptr + 2 * row, tl.where(keep, c, 0.0))
    tl.store(norm_ptr + 2 * row + 1, tl.where(keep, s, 0.0))


@kernel
def _token_entropy_bwd(
    logits_ptr,  # [B, T, V] bf16/fp16/fp32
    grad_ptr,  # [N] float: d loss / d entropy
    valid_ptr,  # [N] bool or None
    norm_ptr,  # [N, 2] fp32
    entropy_ptr,  # [N] fp32
    out_ptr,  # [B, T, V], out: d loss / d logits; may be logits_ptr
    T, groups, grad_stride, tiles,
    batch_stride, row_stride, out_batch_stride, out_row_stride,
    a_hi, a_lo, b_hi, b_lo, slope,
    MODE: tl.constexpr, VEC: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    # One program per tile, from the end of the tensor backwards; see `_token_logp_bwd`.
    # Bytes: reads V * itemsize, writes V * itemsize per row; 24 per tile. Deterministic.
    backwards = tl.num_programs(0) - 1 - tl.program_id(0)
    row, tile = (backwards // tiles).to(tl.int64), backwards % tiles
    keep = True
    if valid_ptr is not None:
        keep = tl.load(valid_ptr + row) != 0
    entropy = tl.load(entropy_ptr + row)
    c = tl.load(norm_ptr + 2 * row)
    s = tl.load(norm_ptr + 2 * row + 1)
    g = tl.load(grad_ptr + row * grad_stride).to(tl.float32) * slope
    g = tl.where(entropy == entropy, g, float("nan"))
    g = tl.where(keep, g, 0.0)
    row_ptr = logits_ptr + row_offset(row, T, batch_stride, row_stride, VEC)
    out_ptr += row_offset(row, T, out_batch_stride, out_row_stride, VEC)

    xs = load_tile(row_ptr, tile, tl.where(keep, groups, 0), 0.0, VEC, REPEATS, LANES)
    for r in tl.static_range(REPEATS):
        group = block_groups(tile, r, REPEATS, LANES)
        dz = scores(xs[r], a_hi, a_lo, b_hi, b_lo, MODE) - c
        d = -prob(dz, s) * (tl.where(dz > LOWEST, dz, LOWEST) - s + entropy)
        d = times_slope(d, xs[r], g, b_hi, b_lo, MODE)
        tl.store(out_ptr + columns(group, VEC), d, mask=group < groups, eviction_policy=LAST_USE)


def token_entropy_fwd(
    logits: Tensor, valid: Tensor | None, temperature: float, softcap: float
) -> tuple[Tensor, Tensor]:
    entropy, norm = row_outputs(logits, 1, 2)
    t = tiling("token_entropy_fwd", logits)
    mode, scalars = score_scalars(temperature, softcap)
    launch(
        "token_entropy_fwd", _token_entropy_fwd, t, t.rows,
        logits, valid, entropy, norm, t.T, t.groups, *t.strides, *scalars, MODE=mode,
    )  # fmt: skip
    return entropy, norm


def token_entropy_bwd(
    grad: Tensor,
    logits: Tensor,
    valid: Tensor | None,
    norm: Tensor,
    entropy: Tensor,
    temperature: float,
    softcap: float,
    out: Tensor,
) -> None:
    t = tiling("token_entropy_bwd", logits, out)
    mode, scalars = score_scalars(temperature, softcap)
    launch(
        "token_entropy_bwd", _token_entropy_bwd, t, t.rows * t.tiles,
        logits, grad, valid, norm, entropy, out, t.T, t.groups, grad.stride(0), t.tiles,
        *t.strides, *scalars, MODE=mode,
    )  # fmt: skip
