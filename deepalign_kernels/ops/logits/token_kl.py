from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from deepalign_kernels import check
from deepalign_kernels.ops._register import (
    accumulator,
    autograd,
    backward_body,
    call,
    define,
    define_plain,
    fake_grad,
    fake_rows,
    no_double_backward,
)
from deepalign_kernels.ops.shard import merge
from deepalign_kernels.ops.shard.group import Shard, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Direction = Literal["policy_ref", "ref_policy", "js"]
"""Which divergence: KL(policy || ref), KL(ref || policy), or the generalized Jensen-Shannon."""
DIRECTIONS = get_args(Direction)  # their indices are the op's `direction`


def token_kl(
    policy_logits: Tensor,
    ref_logits: Tensor,
    *,
    direction: Direction = "policy_ref",
    js_beta: float = 0.5,
    valid: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Full-vocabulary divergence between two models at each position, without a [..., V] temporary.

    With q = softmax of the policy and p = softmax of the reference (both after softcap and
    temperature):

        "policy_ref"   KL(q || p) = sum_v q_v (log q_v - log p_v)
        "ref_policy"   KL(p || q) = sum_v p_v (log p_v - log q_v)
        "js"           b KL(p || m) + (1 - b) KL(q || m),   m = b p + (1 - b) q,   b = js_beta

    Args:
        policy_logits: [..., V] bf16, fp16 or fp32 (fp64 on the eager backend), last stride 1, any
            row stride. Receives the gradient.
        ref_logits: same shape, dtype and device. Frozen: must not require grad.
        direction: "policy_ref", "ref_policy" or "js".
        js_beta: weight of the reference in the mixture, strictly between 0 and 1 and at least
            1.2e-38 (used by "js" only). At the ends the divergence is 0; JS / js_beta tends to KL(p
            || q) there, JS / (1 - js_beta) to KL(q || p), so ask for that direction instead.
        valid: [...] bool, or None for all. False rows give 0 and gradient 0; their logits are never
            used, so padding may hold NaN.
        temperature: divides both models' scores, > 0.
        softcap: tanh cap applied before the temperature, > 0, or None.
        process_group: the ranks that hold the vocabulary between them, as in `token_logp`; both
            models' shards have the same columns. No start is needed: no column is named.

    Returns:
        [...] fp32 (fp64 for fp64 logits), in nats. Unreduced. Exactly 0, with gradient exactly 0,
        for equal logits; rounding can make it as low as about -1e-6 for nearly equal ones. +inf
        where a column is possible for the first model and masked (-inf) for the second.

    Raises:
        ValueError: a wrong shape, dtype, device or stride, a reference that requires grad, an
            unknown direction, a group this rank is not in; the message names the argument.

    Communication (`process_group`): one all-gather, 20 bytes per row from every other rank (40 for
    fp64), and none in backward. "js" needs both normalisers first: 28 bytes in two all-gathers,
    and the shards are read once more.

    Memory: saves the two inputs and five fp32 numbers per row; the gradient is the only [..., V]
    allocation. Formulas, gradients and edge cases: `reference/token_kl.py`.
    """
    policy = check.logits3("policy_logits", policy_logits)
    check.same_kind("ref_logits", ref_logits, "policy_logits", policy_logits)
    ref = check.logits3("ref_logits", ref_logits)
    mode = check.one_of("direction", direction, DIRECTIONS)
    b = check.number("js_beta", js_beta, above=0.0, below=1.0) if direction == "js" else 0.5
    flat = check.mask("valid", valid, policy_logits)
    options = check.score_options(temperature, softcap)
    shard = shard_of(process_group, None, policy.shape[-1])
    if shard is not None:
        kl = _sharded(policy, ref, flat, shard, mode, b, *options)
        return kl.view(policy_logits.shape[:-1])
    return _fwd(policy, ref, flat, mode, b, *options)[0].view(policy_logits.shape[:-1])


_OPTIONS = "int direction, float js_beta, float temperature, float softcap"
_fwd = define(
    f"token_kl_fwd(Tensor policy, Tensor ref, Tensor? valid, {_OPTIONS})"
    " -> (Tensor kl, Tensor norm_policy, Tensor norm_ref, Tensor center)"
)
_bwd = define(
    "token_kl_bwd(Tensor grad, Tensor policy, Tensor ref, Tensor? valid, Tensor norm_policy,"
    f" Tensor norm_ref, Tensor center, {_OPTIONS}) -> Tensor",
    backward_body,
)
no_double_backward("token_kl_bwd")


@torch.library.register_fake("deepalign::token_kl_fwd")
def _(policy: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = fake_rows(policy, pair=True), fake_rows(policy, pair=True)
    return fake_rows(policy), *pairs, fake_rows(policy)


@torch.library.register_fake("deepalign::token_kl_bwd")
def _(grad: Tensor, policy: Tensor, *rest: Any) -> Tensor:
    return fake_grad(policy)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    policy, ref, valid, *ctx.options = inputs
    _, norm_policy, norm_ref, center = output
    ctx.save_for_backward(policy, ref, valid, norm_policy, norm_ref, center)
    ctx.mark_non_differentiable(norm_policy, norm_ref, center)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_unused: Any) -> dict[str, Tensor]:
    return {} if grad is None else {"policy": _bwd(grad, *ctx.saved_tensors, *ctx.options)}


autograd("token_kl_fwd", _backward, _setup)


# Over a process group

_js_parts = define(
    "token_js_parts(Tensor policy, Tensor ref, Tensor? valid, Tensor norm_policy, Tensor norm_ref,"
    " float js_beta, float temperature, float softcap) -> (Tensor policy_part, Tensor ref_part)"
)


@torch.library.register_fake("deepalign::token_js_parts")
def _(policy: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return fake_rows(policy), fake_rows(policy)


def _sharded(
    policy: Tensor,
    ref: Tensor,
    valid: Tensor | None,
    shard: Shard,
    direction: int,
    js_beta: float,
    *options: float,
) -> Tensor:
    rows = policy.shape[0] * policy.shape[1]
    everywhere = torch.ones((), dtype=torch.bool, device=policy.device).expand(rows)
    shard.compare("valid", (everywhere if valid is None else valid).long())
    acc = accumulator(policy.dtype)
    with torch.no_grad():
        x, y = policy.detach(), ref.detach()
        swept = merge.POLICY_REF if direction == merge.JS else direction
        *norms, within = shard.exchange(*merge.kl_rows(call, x, y, valid, swept, *options))
        q, p = merge.models(*norms)
        if direction == merge.JS:
            norms = merge.zeroed(valid, acc, q.norm(acc), p.norm(acc))
            parts = _js_parts(x, y, valid, *norms, js_beta, *options)
            value, center = merge.js_of(q, p, shard.exchange(*parts), js_beta)
        else:
            own, other = (q, p) if direction == merge.POLICY_REF else (p, q)
            value = center = merge.kl_of(own, other, within)
        state = merge.kl_state(q, p, value, center, direction, acc)
        value, *state = merge.zeroed(valid, acc, value, *state)
    return _attached(policy, ref, valid, value, *state, direction, js_beta, *options)


def _attached_body(
    policy: Tensor, ref: Tensor, valid: Tensor | None, value: Tensor, *rest: Any
) -> Tensor:
    return value.clone()


# `value` [N], which the other ranks' shards have a part in, with the gradient of this one
_attached = define_plain(
    "token_kl_shard(Tensor policy, Tensor ref, Tensor? valid, Tensor value, Tensor norm_policy,"
    f" Tensor norm_ref, Tensor center, {_OPTIONS}) -> Tensor",
    _attached_body,
)


@torch.library.register_fake("deepalign::token_kl_shard")
def _(policy: Tensor, *rest: Any) -> Tensor:
    return fake_rows(policy)


def _setup_attached(ctx: Any, inputs: tuple, output: Tensor) -> None:
    policy, ref, valid, _value, norm_policy, norm_ref, center, *ctx.options = inputs
    ctx.save_for_backward(policy, ref, valid, norm_policy, norm_ref, center)
    ctx.set_materialize_grads(False)


def _backward_attached(ctx: Any, grad: Tensor | None) -> dict[str, Tensor]:
    return {} if grad is None else {"policy": _bwd(grad, *ctx.saved_tensors, *ctx.options)}


autograd("token_kl_shard", _backward_attached, _setup_attached)
