"""Learns what a model does to its head's output, by feeding known numbers as that output.

No configuration name is read: families spell the same scale and cap in a dozen ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepalign_kernels.hf.head import computing_module, read_weights, swapped_forward
from deepalign_kernels.modes import evaluating

# Where tanh is linear and where it is saturated; powers of two, so that scaling them is exact.
_SMALL, _LARGE = 2.0**-12, 2.0**40

uncompiled: Any = torch.compiler.disable  # whose annotations lose the signature


class Transform(NamedTuple):
    """logits = softcap * tanh(logit_scale * z / softcap) of the head's first `vocab` outputs z."""

    logit_scale: float
    softcap: float | None
    vocab: int


@uncompiled
@torch.no_grad()
def probe(model: Any, forward: Callable[..., Any], device: torch.device | str) -> Transform:
    """One forward of one token through `forward`, the model's plain one, with its head replaced.

    Raises:
        NotImplementedError: the logits are not a scale or a tanh cap of the head's output.
    """
    module = computing_module(model.get_output_embeddings())
    fed = []

    def known(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        vocab = read_weights(module).weight.shape[0]
        fed.append(_grid(vocab).to(hidden.device))
        return fed[0].expand(*hidden.shape[:-1], vocab).clone()

    with (
        evaluating(model),
        swapped_forward(module, known),
        torch.autocast(torch.device(device).type, enabled=False),
    ):
        out = forward(
            input_ids=torch.ones((1, 1), dtype=torch.long, device=device),
            use_cache=False,
            return_dict=True,
        )
    if len(fed) != 1:
        copied = "forward" in vars(model) and not fed
        why = (
            "; its forward was replaced, in a model of which this is a copy (trl's trainer does"
            " that): make the copy before"
        )
        raise NotImplementedError(
            f"a forward of {type(model).__name__} calls its output head {len(fed)} times, not once"
            + (why if copied else "")
        )
    return fit(fed[0], out.logits.reshape(-1))


def _grid(vocab: int) -> Tensor:
    """[vocab] fp32: the numbers that tell scale and cap, then usual logits to check the guess."""
    usual = torch.linspace(-200.0, 200.0, 97)
    grid = torch.cat([torch.tensor([_SMALL, _LARGE, -_LARGE, -1.0, 1.0]), usual])
    return grid.repeat(-(-vocab // len(grid)))[:vocab]


def fit(z: Tensor, logits: Tensor) -> Transform:
    """z [V], logits [at most V] -> the Transform between them, or NotImplementedError."""
    z, y = z[: len(logits)].double().cpu(), logits.double().cpu()
    if len(y) < 2:
        raise NotImplementedError("fewer than two logits")
    scale, cap = (y[0] / _SMALL).item(), y[1].abs().item()
    linear = scale * z
    if torch.allclose(y, linear, rtol=1e-5, atol=1e-6):
        return Transform(scale, None, len(y))
    if (
        scale > 0
        and 0 < cap < _LARGE * scale
        and torch.allclose(y, cap * torch.tanh(linear / cap), rtol=1e-4, atol=1e-5)
    ):
        return Transform(scale, cap, len(y))
    raise NotImplementedError(
        "the logits are neither a scale nor a tanh cap of the head's output, so no loss inside the"
        " head can be right: compute this model's loss from its logits instead"
    )
