"""A PEFT model as its own reference."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

from deepalign_kernels.modes import evaluating


class WithoutAdapters:
    """A PEFT model as it is without its adapters, to be called like any reference.

    Raises:
        ValueError: not a PEFT model, or one that trains more than adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        if not hasattr(model, "disable_adapter"):
            raise ValueError(
                f"reference: 'adapter_off' needs a PEFT model, got a {type(model).__name__}; give"
                " 'precomputed' for one without adapters"
            )
        self._model: Any = model
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        with self._off():
            moving = [name for name, p in trained if p.requires_grad]
        if moving:
            raise ValueError(
                f"reference: 'adapter_off' would move with {moving[0]}, which is trained and no"
                " part of an adapter; give 'precomputed'"
            )

    def __call__(self, **inputs: Any) -> Any:
        with self._off(), evaluating(self._model):
            return self._model(**inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @contextlib.contextmanager
    def _off(self) -> Any:
        """PEFT lets go of the gradients of all adapters, and then takes up those it knows."""
        flags = [(p, p.requires_grad) for p in self._model.parameters()]
        try:
            with self._model.disable_adapter():
                yield
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)
