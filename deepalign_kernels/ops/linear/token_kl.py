from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepalign_kernels import check
from deepalign_kernels.ops._reduce import scale_of_sum, scaled_sum
from deepalign_kernels.ops._register import accumulator
from deepalign_kernels.ops.linear import sharded
from deepalign_kernels.ops.linear.options import Head, call
from deepalign_kernels.ops.linear.torch_ops import per_token, summed
from deepalign_kernels.ops.linear.types import KINDS, Options, RowFunction, Rows
from deepalign_kernels.ops.logits.token_kl import DIRECTIONS
from deepalign_kernels.ops.shard.group import shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    direction: str = "policy_ref",
    js_beta: float = 0.5,
    valid: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "none",
    normalizer: float | Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    max_workspace_bytes: int | None = None,
    compact: bool = True,
    grad_weight_dtype: torch.dtype = torch.float32,
    logits_dtype: torch.dtype | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """`token_kl` from the hidden states of both models, whose logits are never whole in memory.

    hidden, weight, bias, softcap, logit_scale, temperature, LoRA, max_workspace_bytes, compact and
    the dtype options: see `linear_token_logp`.

    Args:
        ref_hidden: [..., R], ref_weight: [V, R], ref_bias: [V]: the reference, frozen, with its own
            hidden size and dtype. If ref_weight is the very tensor `weight` (or its .detach()),
            both models' rows go through one GEMM.
        direction, js_beta: as in `token_kl`: "policy_ref" is KL(policy || ref), "ref_policy" the
            other, "js".
        valid: [...] bool, or None for all. False rows give 0 and gradient 0.
        reduction: "none", "sum" or "mean": over the number of valid rows, or `normalizer` (a number
            > 0 or a 0-d tensor).
        process_group: as in `linear_token_logp`; ref_weight and ref_bias are shards too.

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
    head = Head(
        bias=bias,
        lora_a=lora_a,
        lora_b=lora_b,
        lora_scale=lora_scale,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        max_workspace_bytes=max_workspace_bytes,
        compact=compact,
        grad_weight_dtype=grad_weight_dtype,
        logits_dtype=logits_dtype,
    )
    inputs, options, like = call(hidden, weight, head)
    if ref_hidden is None:
        raise ValueError("ref_hidden, ref_weight: expected tensors, got None")
    inputs = inputs._replace(valid=check.mask("valid", valid, like))
    options = options._replace(
        direction=check.one_of("direction", direction, DIRECTIONS),
        js_beta=check.number("js_beta", js_beta, above=0.0, below=1.0)
        if direction == "js"
        else 0.5,
    )
    counted = (
        inputs.hidden.new_ones(len(inputs.hidden), dtype=torch.bool)
        if inputs.valid is None
        else inputs.valid
    )
    scale = scale_of_sum(counted, reduction, normalizer, accumulator(options.logits))
    shard = shard_of(process_group, None, len(inputs.weight))
    if shard is not None:
        kl = sharded.kl(inputs, options, shard)
        return kl.view(hidden.shape[:-1]) if reduction == "none" else scaled_sum(kl, scale)
    kind = "js" if direction == "js" else "kl"
    if reduction == "none":
        return per_token(kind, inputs, options)[0].view(hidden.shape[:-1])
    return summed(kind, inputs, options, scale)[0]


def _rows(r: Rows, o: Options) -> tuple[Tensor, ...]:
    tail = (o.direction, o.js_beta, o.temperature, o.softcap)
    if r.upstream is None:
        return (r.call("token_kl_fwd", r.policy, r.ref, r.valid, *tail)[0],)
    return (r.call("token_kl_fused", r.upstream_rows(), r.policy, r.ref, r.valid, *tail, r.out),)


_OWN = ("token_kl_fwd", "token_kl_fused")
KINDS["kl"] = RowFunction(_rows, 1, _OWN, (5.0, 5.25))
KINDS["js"] = RowFunction(_rows, 1, _OWN, (8.5, 8.5))
