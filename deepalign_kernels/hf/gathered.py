"""Models whose weights DeepSpeed's ZeRO-3 shares out while they are loaded.

transformers loads a model in that way where its training arguments ask for ZeRO-3. Each process
then has a share of every weight, and nothing puts them together before a trainer hands the model
over to DeepSpeed, when training begins. A reference is asked before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


def is_shared_out(model: nn.Module) -> bool:
    """Whether its weights are in shares that no engine of DeepSpeed puts together in a forward."""
    shared = any(hasattr(p, "ds_id") for p in model.parameters())
    return shared and not any(hasattr(m, "ds_id") for m in model.modules())  # the engine's mark


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """In the block each module of `model` has its own weights whole while it computes, one module
    at a time. For forwards without gradient; all processes must make the same number of them.

    A model that is whole, or in DeepSpeed's care, stays as it is.
    """
    if not is_shared_out(model):
        yield
        return
    import deepspeed  # pyright: ignore[reportMissingImports]

    whole: dict[nn.Module, Any] = {}

    def before(module: nn.Module, *_: Any) -> None:
        whole[module] = deepspeed.zero.GatheredParameters(list(module.parameters(recurse=False)))
        whole[module].__enter__()

    def after(module: nn.Module, *_: Any) -> None:
        whole.pop(module).__exit__(None, None, None)

    hooks = []
    for module in model.modules():
        if any(hasattr(p, "ds_id") for p in module.parameters(recurse=False)):
            hooks.append(module.register_forward_pre_hook(before))
            hooks.append(module.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
