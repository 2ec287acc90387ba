"""Keys and values of a transformers model: `past_key_values`, which later versions call `cache`."""

from __future__ import annotations

import functools
import inspect
from typing import Any


def takes(model: Any) -> frozenset[str]:
    """Names of what a model's forward takes, with adapters of PEFT around it or without."""
    base = getattr(model, "get_base_model", None)
    return _parameters(type(base() if base else model))


@functools.cache
def _parameters(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def given(model: Any, cache: Any) -> dict[str, Any]:
    """The argument of a call of `model` that hands it `cache`, under the name its version knows."""
    return {"cache" if "cache" in takes(model) else "past_key_values": cache}


def of(output: Any) -> Any:
    """The cache of what a model returned; None where it has none."""
    found = getattr(output, "cache", None)
    return getattr(output, "past_key_values", None) if found is None else found
