from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepalign_kernels.ops import _check
from deepalign_kernels.ops._register import (
    backward_body,
    define,
    fake_grad,
    fake_rows,
    no_double_backward,
)


def token_logp(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
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
        temperature: divides the scores, > 0. softcap: tanh cap applied first, > 0, or None.

    Returns:
        [...] fp32 (fp64 for fp64 logits), in nats, never above 0. Unreduced.

    Raises:
        ValueError: a wrong shape, dtype, device or stride; the message names the argument.

    Memory: saves the logits and two fp32 numbers per row for backward; the gradient is the only
        [..., V] allocation. Numerics, gradient and edge cases: `reference/token_logp.py`.
    """
    x = _check.logits3("logits", logits)
    flat = _check.targets("target", target, logits, ignore_index)
    options = _check.score_options(temperature, softcap)
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


def _backward(ctx: Any, grad: Tensor | None, _norm: Any) -> tuple:
    out = None if grad is None else _bwd(grad, *ctx.saved_tensors, *ctx.options)
    return out, None, None, None, None


torch.library.register_autograd("deepalign::token_logp_fwd", _backward, setup_context=_setup)
