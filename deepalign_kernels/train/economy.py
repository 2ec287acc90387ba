"""Ways to run the layers of a model with less memory or in less time, as blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALL = 4096  # elements; what is smaller is not worth the way
COMPILER: dict[str, Any] = {"dynamic": True}  # one program for all lengths


@contextlib.contextmanager
def activations_on_host(model: nn.Module) -> Iterator[None]:
    """What the forwards in the block keep for their backward lies in host memory meanwhile.

    With activation checkpointing that is the input of every layer. Weights stay where they are: as
    such, cast to the dtype of autocast, or as the gradient of the head that a loss makes at once.
    """
    # Of a share, as ZeRO-3 makes them, the shape of the whole.
    shapes = {_sizes(getattr(p, "ds_shape", p.shape)) for p in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}

    def pack(x: Tensor) -> Any:
        if not x.is_floating_point() or x.numel() < SMALL or _sizes(x.shape) in shapes:
            return x
        return x.device, to_host(x)

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else from_host(kept[1], kept[0])

    with saved_tensors_hooks(pack, unpack):
        yield


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """Without those of 1: the loss has a gradient of the head for each group of heads."""
    return tuple(size for size in shape if size != 1)


def to_host(x: Tensor) -> Any:
    """A copy in host memory; of a GPU's tensor pinned, so that the device need not wait."""
    if x.device.type != "cuda":
        return x.cpu()
    out = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return out.copy_(x, non_blocking=True)


def from_host(kept: Any, device: torch.device) -> Tensor:
    return kept.to(device, non_blocking=True)


def layers_of(model: Any) -> list[nn.Module]:
    """The decoder layers: transformers names their classes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(getattr(base, "_no_split_modules", None) or ())
    return [m for m in model.modules() if type(m).__name__ in names]


@contextlib.contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """In the block each decoder layer is compiled by itself: all of them are one program."""
    layers = layers_of(model)
    for layer in layers:
        layer.compile(**COMPILER)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("_compiled_call_impl", None)
