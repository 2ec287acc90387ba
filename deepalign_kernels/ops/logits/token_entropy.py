from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepalign_kernels import check
from deepalign_kernels.ops._register import (
    autograd,
    backward_body,
    define,
    fake_grad,
    fake_rows,
    no_double_backward,
)


def token_entropy(
    logits: Tensor,
    *,
    valid: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Entropy of each position's distribution over the vocabulary, with gradient.

        p       = softmax(softcap * tanh(logits / softcap) / temperature)
                  (without softcap: softmax(logits / temperature))
        entropy = - sum_v p_v log p_v

    Args:
        logits: [..., V] bf16, fp16, fp32 or fp64, last stride 1, any row stride. Receives the
            gradient.
        valid: [...] bool, or None for all. False rows give 0 and gradient 0.
        temperature: > 0, divides the scores.
        softcap: > 0 or None.

    Returns:
        [...] fp32 (fp64 for fp64 logits), in nats, in 0..log V. Unreduced.

    Raises:
        ValueError: a wrong shape, dtype, device or stride; the message names the argument.
        RuntimeError: a second derivative.

    Memory: saves the logits and three fp32 numbers per row for backward. Numerics, gradient and
        edge cases: `reference/token_entropy.py`.
    """
    x = check.logits3("logits", logits)
    keep = check.mask("valid", valid, logits)
    options = check.score_options(temperature, softcap)
    return _fwd(x, keep, *options)[0].view(logits.shape[:-1])


_fwd = define(
    "token_entropy_fwd(Tensor logits, Tensor? valid, float temperature, float softcap)"
    " -> (Tensor entropy, Tensor norm)"
)
_bwd = define(
    "token_entropy_bwd(Tensor grad, Tensor logits, Tensor? valid, Tensor norm, Tensor entropy,"
    " float temperature, float softcap) -> Tensor",
    backward_body,
)
no_double_backward("token_entropy_bwd")


@torch.library.register_fake("deepalign::token_entropy_fwd")
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return fake_rows(logits), fake_rows(logits, pair=True)


@torch.library.register_fake("deepalign::token_entropy_bwd")
def _(grad: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return fake_grad(logits)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, valid, *ctx.options = inputs
    ctx.save_for_backward(logits, valid, output[1], output[0])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _norm: Any) -> dict[str, Tensor]:
    return {} if grad is None else {"logits": _bwd(grad, *ctx.saved_tensors, *ctx.options)}


autograd("token_entropy_fwd", _backward, _setup)
