from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepalign_kernels import check
from deepalign_kernels.ops._reduce import Reduction, scale_of_sum, scaled_sum
from deepalign_kernels.ops._register import accumulator
from deepalign_kernels.ops.linear import sharded
from deepalign_kernels.ops.linear.options import LinearOptions, checked_call
from deepalign_kernels.ops.linear.torch_ops import per_token, summed
from deepalign_kernels.ops.linear.types import KINDS, Options, RowFunction, Rows
from deepalign_kernels.ops.logits.token_kl import DIRECTIONS, Direction

if TYPE_CHECKING:
    from typing_extensions import Unpack


def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    ref_bias: Tensor | None = None,
    direction: Direction = "policy_ref",
    js_beta: float = 0.5,
    valid: Tensor | None = None,
    reduction: Reduction = "none",
    normalizer: float | Tensor | None = None,
    **options: Unpack[LinearOptions],
) -> Tensor:
    """`token_kl` from the hidden states of both models, whose logits are never whole in memory.

    Args:
        hidden: [..., H], as in `linear_token_logp`. Receives the gradient.
        weight: [V, H], as in `linear_token_logp`. Receives the gradient if it requires one.
        ref_hidden: [..., R], frozen: the reference's, with its own hidden size and dtype.
        ref_weight: [V, R], frozen. If it is the very tensor `weight` (or its .detach()), both
            models' rows go through one GEMM.
        ref_bias: [V], frozen, or None.
        direction: "policy_ref" is KL(policy || ref), "ref_policy" the other, "js": see `token_kl`.
        js_beta: of "js", as in `token_kl`.
        valid: [...] bool, or None for all. False rows give 0 and gradient 0.
        reduction: "none", "sum" or "mean".
        normalizer: what "mean" divides by, a number > 0 or a 0-d tensor; None: the number of valid
            rows.
        options: see `LinearOptions`.

    Returns:
        [...], or 0-d for "sum" and "mean"; fp32 (fp64 for fp64), in nats.

    Raises:
        ValueError: as in `linear_token_logp`; a reference that requires grad; an unknown direction.
        RuntimeError: a scalar reduction backpropagated twice, or a second derivative.

    Memory: "sum" and "mean" make all gradients in the forward (4 GEMMs). "none" keeps the gradient
    of the policy's logits where all tokens are one chunk (4), else makes both models' logits
    again in backward (6); with a frozen head it keeps the gradient of every row of hidden (3).
    See `linear_token_logp`. The chunk holds both models' logits.
    """
    reference = ref_hidden, ref_weight, ref_bias
    x, o, like, shard = checked_call("linear_token_kl", hidden, weight, options, reference)
    if ref_hidden is None:
        raise ValueError("ref_hidden, ref_weight: expected tensors, got None")
    x = x._replace(valid=check.mask("valid", valid, like))
    o = o._replace(
        direction=check.one_of("direction", direction, DIRECTIONS),
        js_beta=check.number("js_beta", js_beta, above=0.0, below=1.0)
        if direction == "js"
        else 0.5,
    )
    counted = x.valid
    if counted is None:
        counted = x.hidden.new_ones(len(x.hidden), dtype=torch.bool)
    scale = scale_of_sum(counted, reduction, normalizer, accumulator(o.logits))
    if shard is not None:
        kl = sharded.kl(x, o, shard)
        return kl.view(hidden.shape[:-1]) if reduction == "none" else scaled_sum(kl, scale)
    kind = "js" if direction == "js" else "kl"
    if reduction == "none":
        return per_token(kind, x, o)[0].view(hidden.shape[:-1])
    return summed(kind, x, o, scale)[0]


def _rows(r: Rows, o: Options) -> tuple[Tensor, ...]:
    tail = (o.direction, o.js_beta, o.temperature, o.softcap)
    if r.upstream is None:
        return (r.call("token_kl_fwd", r.policy, r.ref, r.valid, *tail)[0],)
    return (r.call("token_kl_fused", r.upstream_rows(), r.policy, r.ref, r.valid, *tail, r.out),)


_OWN = ("token_kl_fwd", "token_kl_fused")
KINDS["kl"] = RowFunction(_rows, 1, _OWN, (5.0, 5.25))
KINDS["js"] = RowFunction(_rows, 1, _OWN, (8.5, 8.5))
