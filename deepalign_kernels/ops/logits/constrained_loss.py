from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from deepalign_kernels import check, rules
from deepalign_kernels.ops._reduce import Reduction, scale_of_sum, scaled_sum
from deepalign_kernels.ops._register import (
    accumulator,
    autograd,
    call,
    define,
    fake_grad,
    fake_rows,
)
from deepalign_kernels.ops.logits.scale_grad import hand_over
from deepalign_kernels.ops.logits.token_logp import _bwd as _logp_bwd
from deepalign_kernels.ops.logits.token_logp import settled, with_gradient
from deepalign_kernels.ops.shard import merge
from deepalign_kernels.ops.shard.group import IGNORED, Shard, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


class ConstrainedParts(NamedTuple):
    """By-products of `constrained_loss(..., return_parts=True)`: [...], detached, 0 if ignored."""

    logp: Tensor  # log-probability of the target under the policy, nats
    ref_logp: Tensor  # the same under the reference, nats
    weight: Tensor  # what the token's cross-entropy gradient is multiplied by, in [0, 2]


class _Options(TypedDict, total=False):
    """The keywords that both forms of `constrained_loss` take, for type checkers."""

    ref_logits: Tensor | None
    ref_logp: Tensor | None
    ignore_index: int
    reduction: Reduction
    normalizer: float | Tensor | None
    objective: rules.KernelRule
    min_weight: float
    temperature: float
    softcap: float | None
    process_group: ProcessGroup | None
    vocab_start: int | None


@overload
def constrained_loss(
    policy_logits: Tensor,
    target: Tensor,
    *,
    beta: float | Tensor,
    return_parts: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def constrained_loss(
    policy_logits: Tensor,
    target: Tensor,
    *,
    beta: float | Tensor,
    return_parts: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, ConstrainedParts]: ...
def constrained_loss(
    policy_logits: Tensor,
    target: Tensor,
    *,
    beta: float | Tensor,
    ref_logits: Tensor | None = None,
    ref_logp: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    objective: rules.KernelRule = "exact",
    min_weight: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_parts: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> Tensor | tuple[Tensor, ConstrainedParts]:
    """Token-wise constrained fine-tuning loss (arXiv 2406.05946, equation 3), in one launch.

    With Delta = log p_ref(target) - log p_policy(target):

        loss[t] = (2 / beta[t]) * softplus(beta[t] * Delta[t])
        d loss[t] = -w[t] * d log p_policy,   w[t] = 2 * sigmoid(beta[t] * Delta[t])  (equation 5)

    beta = 0 means the limit: w = 1 and the value Delta. A large beta pulls the gradient to 0 as
    soon as the policy makes the token likelier than the reference does. NaN in either model's row
    (or nothing but -inf) gives NaN in loss, weight and gradient of that row, for beta = 0 too.

    Args:
        policy_logits: [..., V] bf16, fp16 or fp32 (fp64 on the eager backend), last stride 1, any
            row stride. Receives the gradient.
        target: [...] int32 or int64. Rows with `ignore_index` give 0 and are never used. A target
            outside 0..V-1 gives NaN (in a scalar reduction: a NaN loss), without a device sync;
            inside `checked()` it raises.
        beta: >= 0. A number, or a float tensor [...] aligned with target, usually
            `BetaSchedule()(response_positions(target))`. A negative entry gives NaN in its row.
        ref_logits: [..., V], frozen, same dtype and device: both models are read in one launch; or
        ref_logp: [...] float, frozen: log-probabilities of the target under the reference, computed
            before (at the same temperature and softcap). Exactly one of the two must be given.
        ignore_index: the target value that marks a row to leave out.
        reduction: "mean" divides the sum by the number of targets that are not ignored, or by
            `normalizer`; "sum"; or "none".
        normalizer: for "mean": a number > 0 or a 0-d tensor, such as the token count of all
            accumulation steps and ranks. With no trained token loss and gradients are 0, not NaN;
            a 0 in the tensor does the same where every token's loss is finite. A tensor that holds
            a negative number, inf or NaN gives NaN, without a device sync; in `checked()` it
            raises.
        objective: "exact", or "surrogate" (value w * NLL with w held fixed: what the authors' code
            computes, with min_weight=1e-3). The gradients are equal but for the floor.
        min_weight: floor of w, in [0, 2], with "surrogate" only.
        temperature: divides both models' scores, > 0.
        softcap: tanh cap applied before the temperature, > 0, or None.
        return_parts: also return logp, ref_logp and weight of every token.
        process_group: the ranks that hold [..., V_r] shards of both models' logits, as in
            `token_logp`; everything but the logits is alike on all ranks, ref_logp too.
        vocab_start: the first column of this rank's shard, as in `token_logp`.

    Returns:
        0-d for "mean" and "sum", else [...]; fp32 (fp64 for fp64 logits), in nats. With
        return_parts: (loss, ConstrainedParts).

    Raises:
        ValueError: a wrong shape, dtype, device or stride, a missing or doubled reference, one that
            requires grad, a negative beta; the message names the argument.
        RuntimeError: a scalar reduction backpropagated twice, or a second derivative.

    Communication (`process_group`): one all-gather, 24 bytes per row from every other rank (12 with
    ref_logp; double for fp64), and none in backward.

    Memory: a scalar reduction of bf16 and fp32 logits writes the gradient in the forward launch and
    keeps nothing else, neither policy nor reference logits; so it can be backpropagated once.
    fp16 logits (whose gradient must be scaled before it is rounded) and reduction="none" keep
    the policy logits and two fp32 numbers per row and compute the gradient in backward; so does
    a process group, where nobody knows the normaliser during the launch.
    Formulas and edge cases: `reference/constrained_loss.py`.
    """
    policy = check.logits3("policy_logits", policy_logits)
    shard = shard_of(process_group, vocab_start, policy.shape[-1])
    flat = check.targets("target", target, policy_logits, ignore_index, shard=shard is not None)
    acc = accumulator(policy.dtype)
    betas = check.vector("beta", beta, policy_logits, acc, low=0.0)
    ref, given = _reference(policy_logits, ref_logits, ref_logp, acc)
    surrogate = check.one_of("objective", objective, rules.KERNELS) == 1
    check_floor(min_weight, objective)
    options = (
        ignore_index,
        surrogate,
        float(min_weight),
        *check.score_options(temperature, softcap),
    )
    scale = scale_of_sum(flat != ignore_index, reduction, normalizer, acc)

    if shard is not None:
        shard.compare_targets(flat, ignore_index, target)
        column = shard.column(flat, ignore_index, shard.starts_at(policy.device))
        loss, *rows = _sharded(policy, column, betas, ref, given, shard, *options[1:])
        loss = loss.view(target.shape) if reduction == "none" else scaled_sum(loss, scale)
        return _with_parts(loss, rows, target) if return_parts else loss
    wants_grad = torch.is_grad_enabled() and policy.requires_grad
    if reduction != "none" and wants_grad and policy.dtype != torch.float16:
        loss, *rows = _fused(policy, flat, betas, ref, given, scale, *options)[:4]
    else:
        loss, *rows = _fwd(policy, flat, betas, ref, given, *options)[:4]
        loss = loss.view(target.shape) if reduction == "none" else scaled_sum(loss, scale)
    if not return_parts:
        return loss
    return _with_parts(loss, rows, target)


def _with_parts(
    loss: Tensor, rows: Sequence[Tensor], target: Tensor
) -> tuple[Tensor, ConstrainedParts]:
    return loss, ConstrainedParts(*(x.detach().view(target.shape) for x in rows))


def check_floor(min_weight: float, objective: object) -> float:
    """`min_weight` as a float.

    Raises:
        ValueError: outside of [0, 2], the range of a weight, or with an objective that has none.
    """
    check.number("min_weight", min_weight, low=0.0, below=2.0 + 1e-6)
    if min_weight > 0 and objective != "surrogate":
        raise ValueError(
            f"min_weight: a floor belongs to objective='surrogate', got {min_weight} with "
            f"{objective!r}"
        )
    return float(min_weight)


def _reference(
    policy: Tensor, ref_logits: Tensor | None, ref_logp: Tensor | None, acc: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    if (ref_logits is None) == (ref_logp is None):
        got = "neither" if ref_logits is None else "both"
        raise ValueError(f"ref_logits, ref_logp: expected exactly one of the two, got {got}")
    if ref_logits is not None:
        check.same_kind("ref_logits", ref_logits, "policy_logits", policy)
        return check.logits3("ref_logits", ref_logits), None
    if not isinstance(ref_logp, Tensor):
        raise ValueError(
            f"ref_logp: expected a float tensor {tuple(policy.shape[:-1])}, got {ref_logp!r}"
        )
    return None, check.vector("ref_logp", ref_logp, policy, acc)


_INPUTS = "Tensor policy, Tensor target, Tensor beta, Tensor? ref_logits, Tensor? ref_logp"
_OPTIONS = "int ignore_index, bool surrogate, float min_weight, float temperature, float softcap"
_fwd = define(
    f"constrained_loss_fwd({_INPUTS}, {_OPTIONS})"
    " -> (Tensor loss, Tensor logp, Tensor ref_logp_out, Tensor weight, Tensor norm)"
)


def _fused_body(implementation: Any, policy: Tensor, *rest: Any) -> tuple:
    grad = torch.empty(policy.shape, dtype=policy.dtype, device=policy.device)
    loss, *parts = implementation(policy, *rest, grad)
    scale = rest[4]
    return scaled_sum(loss, scale), *parts, grad


_fused = define(
    f"constrained_loss_fused({_INPUTS}, Tensor scale, {_OPTIONS})"
    " -> (Tensor total, Tensor logp, Tensor ref_logp_out, Tensor weight, Tensor grad)",
    _fused_body,
)


@torch.library.register_fake("deepalign::constrained_loss_fwd")
def _(policy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return *(fake_rows(policy) for _ in range(4)), fake_rows(policy, pair=True)


@torch.library.register_fake("deepalign::constrained_loss_fused")
def _(policy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    total = policy.new_empty((), dtype=accumulator(policy.dtype))
    return total, *(fake_rows(policy) for _ in range(3)), fake_grad(policy)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    policy, target, _beta, _ref, _ref_logp, ctx.ignore_index, _surrogate, _floor, *ctx.options = (
        inputs
    )
    ctx.save_for_backward(policy, target, output[3], output[4])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_unused: Any) -> dict[str, Tensor]:
    if grad is None:
        return {}
    policy, target, weight, norm = ctx.saved_tensors
    # 0 * NaN: an ignored row's upstream gradient must not leak; token_logp_bwd never uses it.
    out = _logp_bwd(-grad * weight, policy, target, norm, ctx.ignore_index, *ctx.options)
    return {"policy": out}


autograd("constrained_loss_fwd", _backward, _setup)


def _setup_fused(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(output[4])  # differentiable: see hand_over
    ctx.mark_non_differentiable(*output[1:4])
    ctx.set_materialize_grads(False)


def _backward_fused(ctx: Any, grad: Tensor | None, *_unused: Any) -> dict[str, Tensor | None]:
    if grad is None:
        return {}
    (out,) = hand_over(ctx, "constrained_loss", grad)
    return {"policy": out}


autograd("constrained_loss_fused", _backward_fused, _setup_fused)


def _sharded(
    policy: Tensor,
    column: Tensor,
    beta: Tensor,
    ref: Tensor | None,
    ref_logp: Tensor | None,
    shard: Shard,
    surrogate: bool,
    min_weight: float,
    *options: float,
) -> tuple[Tensor, ...]:
    """(loss, logp, ref_logp, weight) [N]; the first has a gradient."""
    with torch.no_grad():
        rows = merge.logp_rows(call, policy.detach(), column, *options)
        if ref is not None:
            rows += merge.logp_rows(call, ref.detach(), column, *options)
        everyone = shard.exchange(*rows)
        logp, norm = settled(everyone[:3], column, policy.dtype)
        if ref is not None:
            ref_logp, _ = settled(everyone[3:], column, policy.dtype)
        assert ref_logp is not None
        name = "surrogate" if surrogate else "exact"
        loss, weight = rules.run(name, min_weight, logp, ref_logp, beta)
        keep = column != IGNORED
        loss, ref_logp, weight = merge.zeroed(keep, logp.dtype, loss, ref_logp, weight)
    return with_gradient(policy, column, loss, -weight, norm, *options), logp, ref_logp, weight
