"""Train and eval mode of a model, module by module: a model may hold modules in either."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """After the block each module is in the mode in which it was before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """eval() in the block, so no random number is used up; then each module as it was."""
    with kept_modes(model):
        model.eval()
        yield
