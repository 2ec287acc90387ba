from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from deepalign_kernels import check
from deepalign_kernels.ops._reduce import scale_of_sum, scaled_sum
from deepalign_kernels.ops._register import accumulator
from deepalign_kernels.ops.linear import sharded
from deepalign_kernels.ops.linear.options import Head, call
from deepalign_kernels.ops.linear.torch_ops import per_token, summed
from deepalign_kernels.ops.linear.types import KINDS, Options, RowFunction, Rows
from deepalign_kernels.ops.logits.constrained_loss import OBJECTIVES
from deepalign_kernels.ops.logits.token_kl import DIRECTIONS
from deepalign_kernels.ops.shard.group import shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LinearConstrainedParts(NamedTuple):
    """Per-token by-products of `linear_constrained_loss(..., return_parts=True)`: [...], detached,
    0 where ignored."""

    logp: Tensor  # log-probability of the target under the policy, nats
    ref_logp: Tensor  # the same under the reference, nats
    weight: Tensor  # what the token's cross-entropy gradient is multiplied by, in [0, 2]
    kl: Tensor | None  # the divergence in `kl_direction`, nats, before kl_coef; None for kl_coef=0


def linear_constrained_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    beta: float | Tensor,
    ref_logp: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_direction: str = "policy_ref",
    js_beta: float = 0.5,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    max_workspace_bytes: int | None = None,
    objective: str = "exact",
    min_weight: float = 0.0,
    return_parts: bool = False,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    compact: bool = True,
    grad_weight_dtype: torch.dtype = torch.float32,
    logits_dtype: torch.dtype | None = None,
    process_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> Tensor | tuple[Tensor, LinearConstrainedParts]:
    """`constrained_loss` (arXiv 2406.05946, equation 3) from hidden states, plus a KL if wanted.

        loss[t] = (2 / beta[t]) * softplus(beta[t] * (log p_ref - log p_policy)) + kl_coef * KL[t]

    The logits exist chunk by chunk only. hidden, weight, target, bias, softcap, logit_scale,
    temperature, LoRA, max_workspace_bytes, compact and the dtype options: see `linear_token_logp`.
    beta, objective, min_weight, reduction and normalizer: see `constrained_loss`.

    Args:
        ref_logp: [...] float, frozen: log-probabilities of the targets under the reference; or
        ref_hidden, ref_weight, ref_bias: [..., R], [V, R], [V], frozen: the reference's own head,
            with its own hidden size and dtype; softcap, logit_scale and temperature are those of
            the policy. If ref_weight is the very tensor `weight` (or its .detach()), both models'
            rows go through one GEMM. Exactly one of the two ways must be given.
        kl_coef: >= 0, what the divergence is multiplied by; above 0 it needs ref_hidden, and takes
            its scores from the same chunk of logits. kl_direction, js_beta: as `direction`,
            `js_beta` of `token_kl`.
        return_parts: also return logp, ref_logp, weight and kl of every token.
        process_group, vocab_start: as in `linear_token_logp`; ref_weight and ref_bias are shards
            too.

    Returns:
        0-d for "mean" and "sum", else [...]; fp32 (fp64 for fp64), in nats. With return_parts:
        (loss, LinearConstrainedParts).

    Raises:
        ValueError: as in `linear_token_logp` and `constrained_loss`. RuntimeError: a scalar
            reduction backpropagated twice, or a second derivative.

    Memory: a scalar reduction makes all gradients in the forward, in 3 GEMMs (one less with a
        frozen head, one more for a reference head), and keeps only them; so it can be
        backpropagated once. "none" keeps the gradient of the policy's logits where all tokens are
        one chunk, else makes the logits again in backward; with a frozen head it keeps the gradient
        of every row of hidden. See `linear_token_logp`.
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
    acc = accumulator(options.logits)
    _one_reference(ref_logp, ref_hidden, kl_coef)
    shard = shard_of(process_group, vocab_start, len(inputs.weight))
    flat = check.targets("target", target, like, ignore_index, shard=shard is not None)
    inputs = inputs._replace(
        target=flat,
        valid=flat != ignore_index,
        beta=check.vector("beta", beta, like, acc, low=0.0),
        ref_logp=None if ref_logp is None else check.vector("ref_logp", ref_logp, like, acc),
    )
    surrogate = check.one_of("objective", objective, OBJECTIVES) == 1
    check.number("min_weight", min_weight, low=0.0, below=2.0 + 1e-6)
    if min_weight > 0 and not surrogate:
        raise ValueError(
            f"min_weight: a floor belongs to objective='surrogate', got {min_weight} with "
            f"{objective!r}"
        )
    options = options._replace(
        ignore_index=ignore_index,
        surrogate=surrogate,
        min_weight=float(min_weight),
        kl_coef=float(kl_coef),
        direction=check.one_of("kl_direction", kl_direction, DIRECTIONS),
        js_beta=check.number("js_beta", js_beta, above=0.0, below=1.0),
    )
    scale = scale_of_sum(flat != ignore_index, reduction, normalizer, acc)
    kind = "constrained"
    if kl_coef > 0:
        kind = "constrained_js" if kl_direction == "js" else "constrained_kl"
    if shard is not None:
        token_loss, *rest = sharded.constrained(inputs, options, shard, target)
        values = torch.stack([token_loss, *rest])
        loss = (
            token_loss.view(target.shape) if reduction == "none" else scaled_sum(token_loss, scale)
        )
    elif reduction == "none":
        values = per_token(kind, inputs, options)
        loss = values[0].view(target.shape)
    else:
        loss, values = summed(kind, inputs, options, scale)
    if not return_parts:
        return loss
    parts = [v.view(target.shape) for v in values[1:].detach()]
    kl = parts[3] if kl_coef > 0 else None
    return loss, LinearConstrainedParts(parts[0], parts[1], parts[2], kl)


def _one_reference(ref_logp: Tensor | None, ref_hidden: Tensor | None, kl_coef: float) -> None:
    if (ref_logp is None) == (ref_hidden is None):
        got = "neither" if ref_logp is None else "both"
        raise ValueError(f"ref_logp, ref_hidden: expected exactly one of the two, got {got}")
    if ref_logp is not None and not isinstance(ref_logp, Tensor):
        raise ValueError(f"ref_logp: expected a float tensor aligned with target, got {ref_logp!r}")
    if check.number("kl_coef", kl_coef, low=0.0) > 0 and ref_hidden is None:
        raise ValueError(
            "kl_coef: a divergence needs the whole distribution of the reference; pass ref_hidden "
            "and ref_weight"
        )


def _rows(r: Rows, o: Options) -> tuple[Tensor, ...]:
    own = (o.ignore_index, o.surrogate, o.min_weight, o.temperature, o.softcap)
    given = (r.policy, r.target, r.beta, r.ref, r.ref_logp)
    if r.upstream is not None and r.upstream.dim() == 0:
        return r.call("constrained_loss_fused", *given, r.upstream, *own, r.out)
    loss, logp, ref_logp, weight, norm = r.call("constrained_loss_fwd", *given, *own)
    if r.upstream is not None:
        grad = -r.upstream * weight
        r.call(
            "token_logp_bwd",
            grad,
            r.policy,
            r.target,
            norm,
            o.ignore_index,
            o.temperature,
            o.softcap,
            r.out,
        )
    return loss, logp, ref_logp, weight


def _rows_kl(r: Rows, o: Options) -> tuple[Tensor, ...]:
    """Both gradients are written where their inputs were: the KL's over the reference's scores,
    then the other."""
    tail = (o.temperature, o.softcap)
    valid = r.target != o.ignore_index if r.valid is not None else None
    given = (r.policy, r.target, r.beta, r.ref, None)
    loss, logp, ref_logp, weight, norm = r.call(
        "constrained_loss_fwd", *given, o.ignore_index, o.surrogate, o.min_weight, *tail
    )
    models = (r.policy, r.ref, valid, o.direction, o.js_beta, *tail)
    if r.upstream is None:
        kl = r.call("token_kl_fwd", *models)[0]
    else:
        assert r.ref is not None and r.out is not None
        grad = r.upstream_rows()
        kl = r.call("token_kl_fused", grad * o.kl_coef, *models, r.ref)
        r.call(
            "token_logp_bwd",
            -grad * weight,
            r.policy,
            r.target,
            norm,
            o.ignore_index,
            *tail,
            r.policy,
        )
        r.policy.add_(r.ref)
        if r.out.dtype != r.policy.dtype:
            r.out.copy_(r.policy)
    return loss + o.kl_coef * kl, logp, ref_logp, weight, kl


_OWN = ("constrained_loss_fwd", "constrained_loss_fused", "token_logp_bwd")
KINDS["constrained"] = RowFunction(_rows, 4, _OWN, (2.0, 4.0))
_BOTH = (*_OWN, "token_kl_fwd", "token_kl_fused")
KINDS["constrained_kl"] = RowFunction(_rows_kl, 5, _BOTH, (5.0, 5.25))
KINDS["constrained_js"] = RowFunction(_rows_kl, 5, _BOTH, (8.5, 8.5))
