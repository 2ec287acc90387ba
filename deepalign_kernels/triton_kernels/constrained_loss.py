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
    LAST_USE,
    NEG_INF,
    block_groups,
    columns,
    exp,
    expm1_neg,
    load_score,
    load_scores,
    load_tile,
    log1p,
    log_prob,
    prob,
    row_offset,
    scores,
    softmax_end,
    softmax_step,
    times_slope,
)


@triton.jit
def token_loss(logp, ref_logp, beta, min_weight, SURROGATE: tl.constexpr):
    """(loss, weight) of one token, as `reference/constrained_loss.py` defines them."""
    delta = tl.where(logp == ref_logp, 0.0, ref_logp - logp)
    u = tl.where(beta == 0.0, 0.0, beta * delta)
    e = exp(-tl.abs(u))
    weight = 2.0 * tl.div_rn(tl.where(u >= 0.0, 1.0, e), 1.0 + e)
    weight = tl.where((beta < 0.0) | (delta != delta), float("nan"), weight)
    if SURROGATE:
        weight = tl.where(weight < min_weight, min_weight, weight)
        return weight * -logp, weight
    else:
        softplus = tl.maximum(u, 0.0) + log1p(e)
        loss = tl.where(beta == 0.0, delta, tl.div_rn(2.0 * softplus, beta))
        return tl.where(beta < 0.0, float("nan"), loss), weight


@kernel
def _constrained_loss(
    policy_ptr,  # [B, T, V] bf16/fp16/fp32
    ref_ptr,  # [B, T, V] same dtype, or None: ref_logp is given
    target_ptr,  # [N] int64
    beta_ptr,  # [N] fp32
    given_ptr,  # [N] fp32 log-probability of the target under the reference, or None
    scale_ptr,  # 0-d fp32, or None: no gradient
    out_ptr,  # [B, T, V], out: d (scale * sum(loss)) / d policy, or None; may be policy_ptr
    loss_ptr, logp_ptr, ref_logp_ptr, weight_ptr,  # [N] fp32, out
    norm_ptr,  # [N, 2] fp32, out, or None
    T, groups,  # V = groups * VEC
    policy_batch_stride, policy_row_stride,  # in units of VEC elements
    ref_batch_stride, ref_row_stride, out_batch_stride, out_row_stride,
    ignore_index, min_weight,
    a_hi, a_lo, b_hi, b_lo, slope,  # `_rows.scores`
    SURROGATE: tl.constexpr,
    MODE: tl.constexpr, VEC: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    # One program per row. Sweep 1 over the policy (and the reference): log-probabilities, hence
    # loss and weight. Sweep 2, only with a scale: the gradient, backwards, beginning with the
    # columns still in cache.
    # Carried per lane in sweep 1: maximum and sum of exponentials for each side.
    # In place: the target's logit is read before the reductions that end sweep 1, whose barriers
    # no thread passes before all have read; after that a thread overwrites only columns that it
    # has just loaded.
    # Bytes: reads V * itemsize (2 V with ref_ptr), writes 24; the gradient adds a read (out of L2
    # as far as it holds the row) and a write of V * itemsize. Deterministic: fixed order, no
    # atomics.
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    keep = target != ignore_index
    inside = keep & (target >= 0) & (target < groups * VEC)
    beta = tl.load(beta_ptr + row)
    policy_ptr += row_offset(row, T, policy_batch_stride, policy_row_stride, VEC)
    picked = load_score(policy_ptr, target, inside, a_hi, a_lo, b_hi, b_lo, MODE)
    read = tl.where(keep, groups, 0)  # an ignored row is never read
    tiles = tl.cdiv(read, REPEATS * LANES)

    m = tl.full([LANES], NEG_INF, tl.float32)
    d = tl.zeros([LANES], tl.float32)
    if ref_ptr is not None:
        ref_ptr += row_offset(row, T, ref_batch_stride, ref_row_stride, VEC)
        ref_picked = load_score(ref_ptr, target, inside, a_hi, a_lo, b_hi, b_lo, MODE)
        ref_m = tl.full([LANES], NEG_INF, tl.float32)
        ref_d = tl.zeros([LANES], tl.float32)
        for tile in range(0, tiles):
            z = load_scores(
                policy_ptr, tile, read, a_hi, a_lo, b_hi, b_lo, MODE, VEC, REPEATS, LANES
            )
            y = load_scores(
                ref_ptr, tile, read, a_hi, a_lo, b_hi, b_lo, MODE, VEC, REPEATS, LANES, LAST_USE
            )
            m, d = softmax_step(z, m, d, REPEATS)
            ref_m, ref_d = softmax_step(y, ref_m, ref_d, REPEATS)
        ref_c, ref_total = softmax_end(ref_m, ref_d)
        ref_logp = tl.where(inside, log_prob(ref_picked, ref_c, tl.log(ref_total)), float("nan"))
    else:
        for tile in range(0, tiles):
            z = load_scores(
                policy_ptr, tile, read, a_hi, a_lo, b_hi, b_lo, MODE, VEC, REPEATS, LANES
            )
            m, d = softmax_step(z, m, d, REPEATS)
        ref_logp = tl.load(given_ptr + row)

    c, total = softmax_end(m, d)
    s = tl.log(total)
    logp = tl.where(inside, log_prob(picked, c, s), float("nan"))
    loss, weight = token_loss(logp, ref_logp, beta, min_weight, SURROGATE)
    tl.store(loss_ptr + row, tl.where(keep, loss, 0.0))
    tl.store(logp_ptr + row, tl.where(keep, logp, 0.0))
    tl.store(ref_logp_ptr + row, tl.where(keep, ref_logp, 0.0))
    tl.store(weight_ptr + row, tl.where(keep, weight, 0.0))
    if norm_ptr is not None:
        tl.store(norm_ptr + 2 * row, tl.where(keep, c, 0.0))
        tl.store(norm_ptr + 2 * row + 1, tl.where(keep, s, 0.0))

    if out_ptr is not None:
        out_ptr += row_offset(row, T, out_batch_stride, out_row_stride, VEC)
        g = tl.where(inside, -(tl.load(scale_ptr).to(tl.float32) * weight * slope), float("nan"))
        g = tl.where(keep, g, 0.0)
        s = tl.where(keep, s, 0.0)
        own = -expm1_neg(-logp, exp(logp))  # 1 - p of the target, in full precision
        tiles = tl.cdiv(groups, REPEATS * LANES)
        for i in range(0, tiles):
            tile = tiles - 1 - i
            xs = load_tile(policy_ptr, tile, read, 0.0, VEC, REPEATS, LANES, LAST_USE)
            for r in tl.static_range(REPEATS):
                group = block_groups(tile, r, REPEATS, LANES)
                column = columns(group, VEC)
                grad = -prob(scores(xs[r], a_hi, a_lo, b_hi, b_lo, MODE) - c, s)
                start = (tile * REPEATS + r) * (LANES * VEC)
                if (target >= start) & (target < start + LANES * VEC):
                    grad = tl.where(column == target, own, grad)
                grad = times_slope(grad, xs[r], g, b_hi, b_lo, MODE)
                tl.store(out_ptr + column, grad, mask=group < groups, eviction_policy=LAST_USE)


def constrained_loss_fwd(
    policy: Tensor,
    target: Tensor,
    beta: Tensor,
    ref_logits: Tensor | None,
    ref_logp: Tensor | None,
    ignore_index: int,
    surrogate: bool,
    min_weight: float,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, logp, ref_out, weight, norm = row_outputs(policy, 1, 1, 1, 1, 2)
    _run(
        policy, target, beta, ref_logits, ref_logp, None, None, (loss, logp, ref_out, weight, norm),
        ignore_index, surrogate, min_weight, temperature, softcap,
    )  # fmt: skip
    return loss, logp, ref_out, weight, norm


def constrained_loss_fused(
    policy: Tensor,
    target: Tensor,
    beta: Tensor,
    ref_logits: Tensor | None,
    ref_logp: Tensor | None,
    scale: Tensor,
    ignore_index: int,
    surrogate: bool,
    min_weight: float,
    temperature: float,
    softcap: float,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, logp, ref_out, weight = row_outputs(policy, 1, 1, 1, 1)
    _run(
        policy, target, beta, ref_logits, ref_logp, scale, out, (loss, logp, ref_out, weight, None),
        ignore_index, surrogate, min_weight, temperature, softcap,
    )  # fmt: skip
    return loss, logp, ref_out, weight


def _run(
    policy: Tensor,
    target: Tensor,
    beta: Tensor,
    ref_logits: Tensor | None,
    ref_logp: Tensor | None,
    scale: Tensor | None,
    out: Tensor | None,
    outputs: tuple[Tensor | None, ...],
    ignore_index: int,
    surrogate: bool,
    min_weight: float,
    temperature: float,
    softcap: float,
) -> None:
    # An absent tensor stands in as the policy for its strides; the kernel sees None and drops the
    # code.
    ref_like = policy if ref_logits is None else ref_logits
    t = tiling("constrained_loss", policy, ref_like, policy if out is None else out)
    mode, scalars = score_scalars(temperature, softcap)
    launch(
        "constrained_loss", _constrained_loss, t, t.rows,
        policy, ref_logits, target, beta, ref_logp, scale, out, *outputs, t.T, t.groups, *t.strides,
        ignore_index, min_weight, *scalars, SURROGATE=surrogate, MODE=mode,
    )  # fmt: skip
