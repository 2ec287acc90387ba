"""What holds around a run and is put back after it; which models it can train."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from deepalign_kernels.train.config import ConstrainedSFTConfig


def check_models(
    model: nn.Module,
    ref_model: nn.Module | None,
    config: ConstrainedSFTConfig,
    device: torch.device,
) -> None:
    """Refuse models that this configuration cannot train.

    Raises:
        ValueError: naming the argument.
    """
    if config.gradient_checkpointing and not hasattr(model, "gradient_checkpointing_enable"):
        raise ValueError(
            f"gradient_checkpointing: {type(model).__name__} has no gradient_checkpointing_enable"
        )
    if any(p.dtype == torch.float16 for p in model.parameters() if p.requires_grad):
        raise ValueError(
            "model: fp16 weights cannot be trained without a loss scaler; load it in fp32 or bf16"
        )
    if ref_model is None:
        return
    if ref_model is model:
        raise ValueError("ref_model: this is `model` itself, which moves; leave ref_model out")
    there = next(ref_model.parameters()).device
    if there != device:
        raise ValueError(f"ref_model: expected on the device of model, {device}, got {there}")


def embeddings_of(model: nn.Module) -> int | None:
    """How many tokens the model knows; None where it does not say."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        weight = getattr(get() if get else None, "weight", None)
    except NotImplementedError:  # transformers' way to say that it does not know
        return None
    return None if weight is None else weight.shape[0]


def positions_of(model: nn.Module) -> int | None:
    """How many tokens the model takes in one row; None where it does not say."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


@contextlib.contextmanager
def training_session(
    model: nn.Module, config: ConstrainedSFTConfig, device: torch.device
) -> Iterator[None]:
    """Settings of model and torch's generators that hold while training; all are put back."""
    about: Any = getattr(model, "config", None)
    use_cache, was_training = getattr(about, "use_cache", None), model.training
    checkpointed = config.gradient_checkpointing and not getattr(
        model, "is_gradient_checkpointing", False
    )
    switch: Any = model
    # Only dropout draws from torch's global generators (data order has its own). They are seeded
    # inside the fork and put back after it, so the caller's random numbers are the same with and
    # without a run.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(config.seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(config.seed)
        if use_cache is not None:
            about.use_cache = False  # a key-value cache per training forward is only a cost
        if checkpointed:
            options = {"use_reentrant": False}
            switch.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        try:
            yield
        finally:
            if checkpointed:
                switch.gradient_checkpointing_disable()
            if use_cache is not None:
                about.use_cache = use_cache
            model.train(was_training)


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the yielded function true; a second one interrupts at
    once.

    Outside the main thread, which alone may handle signals, interrupts stay as they are.
    """
    asked = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(*_: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before or signal.default_int_handler)

    signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)
