"""Gradients that a forward launch already wrote, handed over in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepalign_kernels import backends
from deepalign_kernels.ops._register import define, define_plain, no_double_backward

_scale = define("scale_grad(Tensor(a!) grad, Tensor factor) -> ()")


def _scaled_body(grad: Tensor, factor: Tensor) -> Tensor:
    out = grad.clone()
    backends.choose("scale_grad", grad.device.type, grad.dtype)(out, factor)
    return out


_scaled = define_plain("scaled_grad(Tensor grad, Tensor factor) -> Tensor", _scaled_body)
no_double_backward("scaled_grad")


@torch.library.register_fake("deepalign::scale_grad")
def _(grad: Tensor, factor: Tensor) -> None:
    return None


@torch.library.register_fake("deepalign::scaled_grad")
def _(grad: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(grad)


def hand_over(ctx: Any, op: str, factor: Tensor) -> list[Tensor | None]:
    """factor * the saved gradients, in place; for the backward of a scalar loss that wrote them.

    With create_graph=True a copy instead, whose own derivative raises: a gradient that was written
    as a number has none. For that the op's outputs that are saved must be differentiable to
    autograd: then the copy depends on what the loss depends on.

    Args:
        ctx: the autograd context: its saved tensors (or None) are the gradients of the loss.
        op: name of the op that the error message names.
        factor: 0-d, the upstream gradient of the scalar loss.

    Raises:
        RuntimeError: at the second time; the first one may have scaled the only copy.
    """
    if getattr(ctx, "spent", False):
        raise RuntimeError(
            f"{op} with a scalar reduction computes its gradient in the forward and hands it over "
            "once; to backpropagate again (retain_graph=True), use reduction='none' and sum outside"
        )
    grads = ctx.saved_tensors
    if torch.is_grad_enabled():
        return [None if g is None else _scaled(g, factor) for g in grads]
    ctx.spent = True
    if type(factor) is not Tensor or any(g is not None and type(g) is not Tensor for g in grads):
        # Traced: the compiler may fuse a product, but must not see a mutation of a saved tensor.
        return [None if g is None else g * factor for g in grads]
    # `.data`, not detach(): a view would hold the memory a second time, and autograd, which adds
    # the two gradients of a tied head in place where nobody else holds one, would take a third.
    plain = [None if g is None else g.data for g in grads]
    for g in plain:
        if g is not None:
            _scale(g, factor)
    return plain
