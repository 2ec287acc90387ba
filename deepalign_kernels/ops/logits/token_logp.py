from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepalign_kernels import backends, check
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
from deepalign_kernels.ops.shard.group import IGNORED, Shard, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def token_logp(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    process_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> Tensor:
    """Log-probability of each target token, without a [..., V] log-softmax.

        logp[t] = z[t, target[t]] - log sum_v exp(z[t, v])
        z       = softcap * tanh(logits / softcap) / temperature

    Args:
        logits: [..., V] bf16, fp16 or fp32 (fp64 on the eager backend), last stride 1, any row
            stride. Receives the gradient onehot(target) - softmax(z), times dz/dlogits.
        target: [...] int32 or int64 column indices. `ignore_index` marks rows to leave out: they
            give 0 and gradient 0, and their logits are never used. A target outside 0..V-1 gives
            NaN in that row and in its gradient row, without a device sync; inside `checked()` it
            raises.
        ignore_index: the target value that marks a row to leave out.
        temperature: divides the scores, > 0.
        softcap: tanh cap applied before the temperature, > 0, or None.
        process_group: the ranks that hold the vocabulary between them, [..., V_r] each: shards of
            any width, the rows and the global targets alike on all. Every rank must make the call.
            It returns the same values on all of them and the gradient of its own shard, which is
            that of the whole vocabulary's loss as every rank computes it (not the sum over ranks).
        vocab_start: the first column of this rank's shard. None: the shards lie in the order of the
            ranks, which costs an all-gather of one number per rank and call. A target that two
            shards claim, or none, gives NaN on all ranks.

    Returns:
        [...] fp32 (fp64 for fp64 logits), in nats, never above 0. Unreduced.

    Raises:
        ValueError: a wrong shape, dtype, device or stride, a group this rank is not in; the message
            names the argument.

    Communication (`process_group`): one all-gather, 12 bytes per row from every other rank (24 for
    fp64), and none in backward.

    Memory: saves the logits and two fp32 numbers per row for backward; the gradient is the only
    [..., V] allocation. Numerics, gradient and edge cases: `reference/token_logp.py`.
    """
    x = check.logits3("logits", logits)
    shard = shard_of(process_group, vocab_start, x.shape[-1])
    flat = check.targets("target", target, logits, ignore_index, shard=shard is not None)
    options = check.score_options(temperature, softcap)
    if shard is not None:
        shard.compare_targets(flat, ignore_index, target)
        column = shard.column(flat, ignore_index, shard.starts_at(x.device))
        return sharded(x, column, shard, *options).view(target.shape)
    return _fwd(x, flat, ignore_index, *options)[0].view(target.shape)


_fwd = define(
    "token_logp_fwd(Tensor logits, Tensor target, int ignore_index, float temperature,"
    " float softcap) -> (Tensor logp, Tensor norm)"
)
_bwd = define(
    "token_logp_bwd(Tensor grad, Tensor logits, Tensor target, Tensor norm, int ignore_index,"
    " float temperature, float softcap) -> Tensor",
    backward_body,
)
no_double_backward("token_logp_bwd")


@torch.library.register_fake("deepalign::token_logp_fwd")
def _(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return fake_rows(logits), fake_rows(logits, pair=True)


@torch.library.register_fake("deepalign::token_logp_bwd")
def _(grad: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return fake_grad(logits)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, target, *ctx.options = inputs
    ctx.save_for_backward(logits, target, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _norm: Any) -> dict[str, Tensor]:
    return {} if grad is None else {"logits": _bwd(grad, *ctx.saved_tensors, *ctx.options)}


autograd("token_logp_fwd", _backward, _setup)


# Over a process group


def sharded(logits: Tensor, column: Tensor, shard: Shard, *options: float) -> Tensor:
    """[N] log-probabilities under the whole vocabulary; `column` as `Shard.column` gives it."""
    with torch.no_grad():
        rows = merge.logp_rows(call, logits.detach(), column, *options)
        logp, norm = settled(shard.exchange(*rows), column, logits.dtype)
    return with_gradient(logits, column, logp, torch.ones_like(logp), norm, *options)


def settled(rows: Sequence[Tensor], column: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(logp [N], normaliser [N, 2]) from the `merge.logp_rows` of all ranks."""
    m, s, picked = rows
    row = merge.joined(m, s)
    logp, acc = merge.logp_of(row, picked), accumulator(dtype)
    # A target in no shard: the kernel of the gradient learns it from the normaliser.
    norm = torch.where(logp.isnan()[:, None], torch.nan, row.norm(acc))
    logp, norm = merge.zeroed(column != IGNORED, acc, logp, norm)
    return logp, norm


def _with_gradient_body(
    logits: Tensor, column: Tensor, value: Tensor, slope: Tensor, norm: Tensor, *options: float
) -> Tensor:
    return value.clone()


def _sharded_bwd_body(
    grad: Tensor,
    logits: Tensor,
    column: Tensor,
    norm: Tensor,
    temperature: float,
    softcap: float,
) -> Tensor:
    def run(op: str, *inputs: Any) -> Any:
        return backends.choose(op, logits.device.type, logits.dtype)(*inputs)

    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    merge.logp_grad(run, grad, logits, column, norm, temperature, softcap, out)
    return out


# `value` [N] of a loss that the other ranks' shards have a part in, and its derivative by logp
with_gradient = define_plain(
    "token_logp_shard(Tensor logits, Tensor column, Tensor value, Tensor slope, Tensor norm,"
    " float temperature, float softcap) -> Tensor",
    _with_gradient_body,
)
_sharded_bwd = define_plain(
    "token_logp_shard_bwd(Tensor grad, Tensor logits, Tensor column, Tensor norm,"
    " float temperature, float softcap) -> Tensor",
    _sharded_bwd_body,
)
no_double_backward("token_logp_shard_bwd")


@torch.library.register_fake("deepalign::token_logp_shard")
def _(logits: Tensor, *rest: Any) -> Tensor:
    return fake_rows(logits)


@torch.library.register_fake("deepalign::token_logp_shard_bwd")
def _(grad: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return fake_grad(logits)


def _setup_attached(ctx: Any, inputs: tuple, output: Tensor) -> None:
    logits, column, _value, slope, norm, *ctx.options = inputs
    ctx.save_for_backward(logits, column, slope, norm)
    ctx.set_materialize_grads(False)


def _backward_attached(ctx: Any, grad: Tensor | None) -> dict[str, Tensor]:
    if grad is None:
        return {}
    logits, column, slope, norm = ctx.saved_tensors
    return {"logits": _sharded_bwd(grad * slope, logits, column, norm, *ctx.options)}


autograd("token_logp_shard", _backward_attached, _setup_attached)
