from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from deepalign_kernels import check, rules
from deepalign_kernels.ops._reduce import Reduction, scale_of_sum, scaled_sum
from deepalign_kernels.ops._register import accumulator
from deepalign_kernels.ops.linear import sharded
from deepalign_kernels.ops.linear.options import LinearOptions, checked_call
from deepalign_kernels.ops.linear.torch_ops import per_token, summed
from deepalign_kernels.ops.linear.types import KINDS, Options, RowFunction, Rows
from deepalign_kernels.ops.logits.constrained_loss import check_floor
from deepalign_kernels.ops.logits.token_kl import DIRECTIONS, Direction

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LinearConstrainedParts(NamedTuple):
    """Per-token by-products of `linear_constrained_loss(..., return_parts=True)`: [...], detached,
    0 where ignored."""

    logp: Tensor  # log-probability of the target under the policy, nats
    ref_logp: Tensor | None  # the same under the reference, nats; None without one
    weight: Tensor  # what the token's cross-entropy gradient is multiplied by; [0, 2] if exact
    kl: Tensor | None  # the divergence in `kl_direction`, nats, before kl_coef; None for kl_coef=0


class _Options(LinearOptions, total=False):
    """The keywords that both forms of `linear_constrained_loss` take, for type checkers."""

    beta: float | Tensor | None
    ref_logp: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    objective: str | rules.Rule
    min_weight: float
    kl_coef: float
    kl_direction: Direction
    js_beta: float
    ignore_index: int
    reduction: Reduction
    normalizer: float | Tensor | None
    vocab_start: int | None


@overload
def linear_constrained_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def linear_constrained_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_parts: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, LinearConstrainedParts]: ...
def linear_constrained_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    beta: float | Tensor | None = None,
    ref_logp: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    objective: str | rules.Rule = "exact",
    min_weight: float = 0.0,
    kl_coef: float = 0.0,
    kl_direction: Direction = "policy_ref",
    js_beta: float = 0.5,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    return_parts: bool = False,
    vocab_start: int | None = None,
    **options: Unpack[LinearOptions],
) -> Tensor | tuple[Tensor, LinearConstrainedParts]:
    """`constrained_loss` (arXiv 2406.05946, equation 3) from hidden states, plus a KL if wanted.

        loss[t] = (2 / beta[t]) * softplus(beta[t] * (log p_ref - log p_policy)) + kl_coef * KL[t]

    The logits exist chunk by chunk only. Another `objective` takes the place of the first term.

    Args:
        hidden: [..., H], as in `linear_token_logp`. Receives the gradient.
        weight: [V, H], as in `linear_token_logp`. Receives the gradient if it requires one.
        target: [...] int32 or int64. A target outside 0..V-1 gives NaN.
        beta: >= 0, a number or a float tensor [...], as in `constrained_loss`; needed by "exact"
            and "surrogate".
        ref_logp: [...] float, frozen: log-probabilities of the targets under the reference. "exact"
            and "surrogate" need either this or the reference's own head, not both.
        ref_hidden: [..., R], frozen, with its own hidden size and dtype.
        ref_weight: [V, R], frozen; softcap, logit_scale and temperature are those of the policy. If
            it is the very tensor `weight` (or its .detach()), both models' rows go through one
            GEMM.
        ref_bias: [V], frozen, or None.
        objective: "exact" or "surrogate", as in `constrained_loss`; any other name in
            `deepalign_kernels.rules.RULES`; or a function of (logp, ref_logp, beta) that gives
            (loss, weight), see `deepalign_kernels.rules`. Its arguments are fp32 (fp64) vectors of
            some tokens; ref_logp and beta are None where they were not given.
        min_weight: floor of the weight, in [0, 2], with "surrogate" only.
        kl_coef: >= 0, what the divergence is multiplied by; above 0 it needs ref_hidden, and takes
            its scores from the same chunk of logits.
        kl_direction: as `direction` of `token_kl`.
        js_beta: as in `token_kl`.
        ignore_index: rows with this target give 0 and gradient 0.
        reduction: "mean", "sum" or "none", as in `constrained_loss`.
        normalizer: of "mean", as in `constrained_loss`.
        return_parts: also return logp, ref_logp, weight and kl of every token.
        vocab_start: with process_group, as in `token_logp`.
        options: see `LinearOptions`.

    Returns:
        0-d for "mean" and "sum", else [...]; fp32 (fp64 for fp64), in nats. With return_parts:
        (loss, LinearConstrainedParts).

    Raises:
        ValueError: as in `linear_token_logp` and `constrained_loss`.
        RuntimeError: a scalar reduction backpropagated twice, or a second derivative.

    Memory: a scalar reduction makes all gradients in the forward, in 3 GEMMs (one less with a
    frozen head, one more for a reference head), and keeps only them; so it can be
    backpropagated once. "none" keeps the gradient of the policy's logits where all tokens are
    one chunk, else makes the logits again in backward; with a frozen head it keeps the gradient
    of every row of hidden. See `linear_token_logp`.
    """
    reference = ref_hidden, ref_weight, ref_bias
    op = "linear_constrained_loss"
    x, o, like, shard = checked_call(
        op, hidden, weight, options, reference, vocab_start=vocab_start
    )
    acc = accumulator(o.logits)
    rule = rules.objective_of(objective)
    _check_given(rule, objective, beta, ref_logp, ref_hidden, kl_coef)
    flat = check.targets("target", target, like, ignore_index, shard=shard is not None)
    valid = flat != ignore_index
    x = x._replace(
        target=flat,
        valid=valid,
        beta=None if beta is None else check.vector("beta", beta, like, acc, low=0.0),
        ref_logp=None if ref_logp is None else check.vector("ref_logp", ref_logp, like, acc),
    )
    o = o._replace(
        ignore_index=ignore_index,
        rule=rule.name,
        min_weight=check_floor(min_weight, objective),
        kl_coef=float(kl_coef),
        direction=check.one_of("kl_direction", kl_direction, DIRECTIONS),
        js_beta=check.number("js_beta", js_beta, above=0.0, below=1.0),
    )
    scale = scale_of_sum(valid, reduction, normalizer, acc)
    kind = "constrained"
    if kl_coef > 0:
        kind = "constrained_js" if kl_direction == "js" else "constrained_kl"
    if shard is not None:
        values = torch.stack(sharded.constrained(x, o, shard, target))
        loss = values[0] if reduction == "none" else scaled_sum(values[0], scale)
    elif reduction == "none":
        values = per_token(kind, x, o)
        loss = values[0]
    else:
        loss, values = summed(kind, x, o, scale)
    loss = loss.view(target.shape) if reduction == "none" else loss
    rules.keep_alive(objective, loss)
    if not return_parts:
        return loss
    logp, ref, weights, *kl = (v.view(target.shape) for v in values[1:].detach())
    referenced = ref_logp is not None or ref_hidden is not None
    return loss, LinearConstrainedParts(
        logp, ref if referenced else None, weights, kl[0] if kl else None
    )


def _check_given(
    rule: rules.Objective,
    objective: object,
    beta: object,
    ref_logp: object,
    ref_hidden: object,
    kl_coef: float,
) -> None:
    """What the rule needs is there."""
    both = ref_logp is not None and ref_hidden is not None
    if both or (rule.needs_reference and ref_logp is None and ref_hidden is None):
        got = "both" if both else "neither"
        raise ValueError(f"ref_logp, ref_hidden: expected exactly one of the two, got {got}")
    if rule.needs_beta and beta is None:
        raise ValueError(
            f"beta: expected a number or a tensor for objective={objective!r}, got None"
        )
    if ref_logp is not None and not isinstance(ref_logp, Tensor):
        raise ValueError(f"ref_logp: expected a float tensor aligned with target, got {ref_logp!r}")
    if check.number("kl_coef", kl_coef, low=0.0) > 0 and ref_hidden is None:
        raise ValueError(
            "kl_coef: a divergence needs the whole distribution of the reference; pass ref_hidden "
            "and ref_weight"
        )


def _paper(r: Rows) -> tuple[Any, ...]:
    """What the kernels of the paper's rule take. One launch instead of some 30 small ones per
    chunk, which are 2 % of a step on an H100 (8192 tokens, 4096 x 128256)."""
    return r.policy, r.target, r.beta, r.ref, r.ref_logp


def _numbers(o: Options) -> tuple[Any, ...]:
    return o.ignore_index, o.rule == "surrogate", o.min_weight, o.temperature, o.softcap


def values_of(r: Rows, o: Options) -> tuple[Tensor, ...]:
    """(loss, logp, ref_logp, weight) [n], 0 in ignored rows, and the policy's normaliser [n, 2]."""
    if o.rule in rules.KERNELS:
        return r.call("constrained_loss_fwd", *_paper(r), *_numbers(o))
    assert r.target is not None
    tail = (o.ignore_index, o.temperature, o.softcap)
    logp, norm = r.call("token_logp_fwd", r.policy, r.target, *tail)
    ref_logp = r.ref_logp
    if r.ref is not None:
        ref_logp = r.call("token_logp_fwd", r.ref, r.target, *tail)[0]
    loss, weight = rules.run(o.rule, o.min_weight, logp, ref_logp, r.beta)
    shown = torch.zeros_like(logp) if ref_logp is None else ref_logp
    trained = r.target != o.ignore_index
    loss, shown, weight = (torch.where(trained, v, 0.0) for v in (loss, shown, weight))
    return loss, logp, shown, weight, norm


def _rows(r: Rows, o: Options) -> tuple[Tensor, ...]:
    if o.rule in rules.KERNELS and r.upstream is not None and r.upstream.dim() == 0:
        return r.call("constrained_loss_fused", *_paper(r), r.upstream, *_numbers(o), r.out)
    *values, norm = values_of(r, o)
    if r.upstream is not None:
        tail = (o.ignore_index, o.temperature, o.softcap, r.out)
        r.call("token_logp_bwd", -r.upstream * values[3], r.policy, r.target, norm, *tail)
    return tuple(values)


def _rows_kl(r: Rows, o: Options) -> tuple[Tensor, ...]:
    """Both gradients are written where their inputs were: the KL's over the reference's scores,
    then the other."""
    tail = (o.temperature, o.softcap)
    valid = r.target != o.ignore_index if r.valid is not None else None
    models = (r.policy, r.ref, valid, o.direction, o.js_beta, *tail)
    loss, *rest, norm = values_of(r, o)
    if r.upstream is None:
        kl = r.call("token_kl_fwd", *models)[0]
    else:
        assert r.ref is not None and r.out is not None
        grad = r.upstream_rows()
        kl = r.call("token_kl_fused", grad * o.kl_coef, *models, r.ref)
        given = (-grad * rest[2], r.policy, r.target, norm, o.ignore_index)
        r.call("token_logp_bwd", *given, *tail, r.policy)
        r.policy.add_(r.ref)
        if r.out.dtype != r.policy.dtype:
            r.out.copy_(r.policy)
    return loss + o.kl_coef * kl, *rest, kl


_OWN = ("constrained_loss_fwd", "constrained_loss_fused", "token_logp_fwd", "token_logp_bwd")
KINDS["constrained"] = RowFunction(_rows, 4, _OWN, (2.0, 4.0))
_BOTH = (*_OWN, "token_kl_fwd", "token_kl_fused")
KINDS["constrained_kl"] = RowFunction(_rows_kl, 5, _BOTH, (5.0, 5.25))
KINDS["constrained_js"] = RowFunction(_rows_kl, 5, _BOTH, (8.5, 8.5))
