"""What holds around a run and is put back after it; which models it can train."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from deepalign_kernels.data.packing import derived_seed
from deepalign_kernels.modes import kept_modes
from deepalign_kernels.train.adapters import WithoutAdapters
from deepalign_kernels.train.config import TrainConfig
from deepalign_kernels.train.economy import compiled_layers, layers_of
from deepalign_kernels.train.ranks import is_sharded


def check_models(
    model: nn.Module,
    ref_model: nn.Module | None,
    config: TrainConfig,
    device: torch.device,
) -> None:
    """Refuse models that this configuration cannot train.

    Raises:
        ValueError: naming the argument.
    """
    marks = ("require_backward_grad_sync", "reshard", "allreduce_gradients")
    if any(hasattr(model, mark) for mark in marks) or is_sharded(model):
        raise ValueError(
            f"model: {type(model).__name__} is distributed already; hand over the bare model, each"
            " process its own, and choose with `parallel`"
        )
    if config.gradient_checkpointing and not hasattr(model, "gradient_checkpointing_enable"):
        raise ValueError(
            f"gradient_checkpointing: {type(model).__name__} has no gradient_checkpointing_enable"
        )
    if config.compile_layers and not layers_of(model):
        raise ValueError(f"compile_layers: {type(model).__name__} does not name its layers")
    if any(p.dtype == torch.float16 for p in model.parameters() if p.requires_grad):
        raise ValueError(
            "model: fp16 weights cannot be trained without a loss scaler; load it in fp32 or bf16"
        )
    if config.reference == "adapter_off" and config.needs_reference:
        WithoutAdapters(model)
    if ref_model is None:
        if config.reference == "model" and config.needs_reference:
            raise ValueError("reference: 'model' needs a ref_model, which runs along")
        return
    if config.reference == "adapter_off":
        raise ValueError("ref_model: reference='adapter_off' is the model itself; leave it out")
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
    models: Sequence[nn.Module], config: TrainConfig, device: torch.device, rank: int = 0
) -> Iterator[None]:
    """Settings of `models`, the trained one and perhaps its reference, and of torch's generators
    that hold while training; all are put back, whatever ends the block. `rank`: of this process;
    each draws random numbers of its own.

    A model that comes in train mode keeps the modules that are in eval mode as they are (frozen
    statistics, no dropout there). One that comes in eval mode, as from_pretrained gives it, is put
    into train mode whole.
    """
    model = models[0]
    with contextlib.ExitStack() as stack:
        for each in models:
            stack.enter_context(kept_modes(each))
            stack.enter_context(no_cache(each))
        stack.enter_context(_own_random_numbers(seed_of(config.seed, rank), device))
        if config.gradient_checkpointing and not getattr(model, "is_gradient_checkpointing", False):
            stack.enter_context(_checkpointed(model))
        if config.compile_layers:
            stack.enter_context(compiled_layers(model))
        if not model.training:
            model.train()
        yield


def seed_of(seed: int, rank: int, *more: object) -> int:
    """Of a process's random numbers; the first one has the seed itself."""
    return derived_seed(seed, "rank", rank, *more) if rank or more else seed


@contextlib.contextmanager
def _own_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Only dropout draws from torch's global generators (data order has its own). They are seeded
    inside the fork and put back after it, so the caller's random numbers are the same with and
    without a run."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextlib.contextmanager
def no_cache(model: nn.Module) -> Iterator[None]:
    """Its config asks for no key-value cache: in training only a cost, and with one, a model of
    transformers would take packed conversations for one."""
    about: Any = getattr(model, "config", None)
    before = getattr(about, "use_cache", None)
    if before is not None:
        about.use_cache = False
    try:
        yield
    finally:
        if before is not None:
            about.use_cache = before


@contextlib.contextmanager
def _checkpointed(model: Any) -> Iterator[None]:
    """Activation checkpointing in the block.

    What switching it on changed is put back attribute by attribute and hook by hook: transformers'
    own way back leaves a hook on the embeddings and a function in every layer.
    """
    before = [(module, _attributes(module)) for module in model.modules()]
    changed: list[tuple[nn.Module, Attributes, Attributes]] = []
    try:
        try:
            options = {"use_reentrant": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        finally:
            changed += [(module, was, _attributes(module)) for module, was in before]
        yield
    finally:
        if hasattr(model, "gradient_checkpointing_disable"):
            model.gradient_checkpointing_disable()
        for module, was, became in changed:
            for place in was.keys() | became.keys():
                if was.get(place, _ABSENT) is not became.get(place, _ABSENT):
                    _put(module, place, was.get(place, _ABSENT))


# (attribute, key): the key is None, or for a dictionary of hooks the hook's.
Attributes = dict[tuple[str, Any], object]
_ABSENT = object()


def _attributes(module: nn.Module) -> Attributes:
    """Of the instance itself, each hook by its own."""
    out: Attributes = {}
    for name, value in vars(module).items():
        if name.endswith("_hooks") and isinstance(value, dict):
            out |= {(name, key): hook for key, hook in value.items()}
        else:
            out[name, None] = value
    return out


def _put(module: nn.Module, place: tuple[str, Any], value: object) -> None:
    """_ABSENT takes out what is there."""
    name, key = place
    held, name = (vars(module), name) if key is None else (vars(module)[name], key)
    if value is _ABSENT:
        held.pop(name, None)
    else:
        held[name] = value


class Terminated(KeyboardInterrupt):
    """A run ended by SIGTERM, as a batch system or a container sends it: its checkpoint written, or
    before its first step what the reference has said so far."""


STOPS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@contextlib.contextmanager
def prompt_stops() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated` at once, as Ctrl-C raises KeyboardInterrupt, instead of
    ending the process without a word: for what comes before the first step.

    Outside the main thread, and where SIGTERM has a handler already, nothing changes.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def handle(*_: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def deferred_stops(patient: bool = False) -> Iterator[Callable[[], int]]:
    """Inside, the first Ctrl-C or SIGTERM only makes the yielded function give its number, else 0;
    a second one acts at once, unless `patient`: launchers send them twice.

    Outside the main thread, which alone may handle signals, they stay as they are.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {number: signal.getsignal(number) for number in STOPS}

    def put_back() -> None:
        for number, handler in before.items():
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, handler or default)

    def handle(number: int, *_: object) -> None:
        asked.append(number)
        if not patient:
            put_back()

    for number in STOPS:
        signal.signal(number, handle)
    try:
        yield lambda: asked[0] if asked else 0
    finally:
        put_back()
