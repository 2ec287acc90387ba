"""Gradients that a forward launch already wrote, handed over in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepalign_kernels.ops._register import define

_scale = define("scale_grad(Tensor(a!) grad, Tensor factor) -> ()")


@torch.library.register_fake("deepalign::scale_grad")
def _(grad: Tensor, factor: Tensor) -> None:
    return None


def hand_over(ctx: Any, op: str, factor: Tensor) -> list[Tensor | None]:
    """factor * the saved gradients, in place; for the backward of a scalar loss that wrote them.

    Args:
        ctx: the autograd context: its saved tensors (or None) are the gradients of the loss.
        factor: 0-d, the upstream gradient of the scalar loss.

    Raises:
        RuntimeError: at the second time; the first one may have scaled the only copy.
    """
    if getattr(ctx, "spent", False):
        raise RuntimeError(
            f"{op} with a scalar reduction computes its gradient in the forward and hands it over "
            "once; to backpropagate again (retain_graph=True), use reduction='none' and sum outside"
        )
    ctx.spent = True
    grads = ctx.saved_tensors
    if type(factor) is not Tensor or any(g is not None and type(g) is not Tensor for g in grads):
        # Traced: the compiler may fuse a product, but must not see a mutation of a saved tensor.
        return [None if g is None else g * factor for g in grads]
    for g in grads:
        if g is not None:
            _scale(g, factor)
    return list(grads)
