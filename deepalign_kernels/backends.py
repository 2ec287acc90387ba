"""The one place that decides which implementation of an op runs, and says why another cannot.

    eager   reference/<stem>.py        always there; the specification; the only one for fp64, and
                                       for an op that has no kernels yet
    triton  triton_kernels/<stem>.py   CUDA and ROCm tensors (CPU ones under TRITON_INTERPRET=1)
    native  csrc/{cpu,cuda}/<stem>     what setup.py could build, as torch.ops.deepalign_native.<op>

Forced, a backend runs or raises; only "auto" moves on to the next one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import pathlib
import threading
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

BACKENDS = ("native", "triton", "eager")
ORDER = {"cuda": ("native", "triton", "eager"), "cpu": ("native", "eager")}  # best first
# Ops whose CUDA C++ was run and checked on a GPU *and* won there (benchmarks/results/). Until an op
# stands here, its CUDA C++ runs only when forced.
CUDA_CPP_VERIFIED: frozenset[str] = frozenset()

STEMS = {  # internal op -> file name in every room
    "token_logp_fwd": "token_logp",
    "token_logp_bwd": "token_logp",
    "token_logp_fused": "token_logp",
    "token_kl_fwd": "token_kl",
    "token_kl_bwd": "token_kl",
    "token_js_parts": "token_kl",
    "token_kl_fused": "token_kl",
    "constrained_loss_fwd": "constrained_loss",
    "constrained_loss_fused": "constrained_loss",
    "token_stats_fwd": "token_stats",
    "token_entropy_fwd": "token_entropy",
    "token_entropy_bwd": "token_entropy",
    "scale_grad": "scale_grad",
}
OPS = tuple(STEMS)

LARGE = 4 << 20  # bytes from which `fresh_pages` asks for large pages
_PACKAGE = {"eager": "reference", "triton": "triton_kernels"}
_HERE = pathlib.Path(__file__).parent
_forced = os.environ.get("DEEPALIGN_BACKEND", "auto")


@functools.cache
def native_library(device: str) -> str | None:
    """Load the native library for "cpu" or "cuda" once; why it is not there, or None if it is."""
    path = _HERE / f"_native_{device}.so"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not path.exists():
        return f"{path.name} {_build_note(device)}"
    if device == "cuda" and (why := native_library("cpu")):
        return f"{path.name} needs the schemas of the CPU library: {why}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


def _build_note(device: str) -> str:
    """What setup.py wrote about this device's library: one line "cpu: ..." or "cuda: ..." each."""
    note = _HERE / "_native_build.txt"
    for line in note.read_text().splitlines() if note.exists() else ():
        if line.startswith(f"{device}: "):
            return line.removeprefix(f"{device}: ")
    return "is not there: the package was not built with it"


def unavailable(
    backend: str, op: str, device: str, dtype: torch.dtype = torch.float32
) -> str | None:
    """Why `backend` cannot run `op` on "cpu" or "cuda" for logits of `dtype`; None if it can."""
    if backend not in BACKENDS:
        return f"there is no backend {backend!r}; choose one of {', '.join(BACKENDS)}"
    if backend == "eager":
        return None
    if dtype == torch.float64:
        return "fp64 logits run on the eager backend only"
    if backend == "native":
        if why := native_library(device):
            return why
        name = f"deepalign_native::{op}"
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        if torch._C._dispatch_has_kernel(name) and has_kernel(name, device.upper()):
            return None
        return f"no native kernel for {device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "Triton runs CPU tensors only in its interpreter, TRITON_INTERPRET=1 (slow; for tests)"
        )
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None if module_of("triton", op) else f"no Triton kernel for {op}"


@functools.cache
def module_of(backend: str, op: str) -> ModuleType | None:
    """The file of `op` in a backend's package; None where that does not define it."""
    package = f"{__package__}.{_PACKAGE[backend]}"
    if importlib.util.find_spec(f"{package}.{STEMS[op]}") is None:
        return None
    module = importlib.import_module(f"{package}.{STEMS[op]}")
    return module if hasattr(module, op) else None


def _held_back(backend: str, op: str, device: str) -> str | None:
    """Why auto passes over a backend that could run."""
    if backend == "native" and device == "cuda" and op not in CUDA_CPP_VERIFIED:
        return "CUDA C++ not verified on a GPU yet: runs only when forced"
    return None


def reason(backend: str, op: str, device: str) -> str | None:
    """What the backend table says: why auto cannot or does not take `backend`, or None."""
    if why := unavailable(backend, op, device):
        return why
    if backend not in ORDER[device]:
        return "runs only when forced"
    return _held_back(backend, op, device)


def selected(op: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend that runs `op` now, in `auto` or as forced (see `choose`)."""
    if _forced != "auto":
        if why := unavailable(_forced, op, device, dtype):
            raise RuntimeError(f"{op}: backend {_forced!r} was asked for but cannot run: {why}")
        return _forced
    for name in ORDER.get(device, ("eager",)):
        if not unavailable(name, op, device, dtype) and not _held_back(name, op, device):
            return name
    raise AssertionError("eager ends every list")


def runs_eagerly(op: str, device: str, dtype: torch.dtype) -> bool:
    """Whether `op` has no kernel here. Kept, because the linear ops ask at every call: 43 us for
    the four ops of a loss, of 1.2 ms (Zen 3)."""
    return _runs_eagerly(op, device, dtype, _forced)


@functools.cache
def _runs_eagerly(op: str, device: str, dtype: torch.dtype, forced: str) -> bool:
    name = selected(op, device, dtype)
    _warn_if_slow(name, device, dtype, forced)
    return name == "eager"


def _warn_if_slow(name: str, device: str, dtype: torch.dtype, forced: str) -> None:
    """Say once what an installation lacks whose ops run eagerly unasked."""
    if name == "eager" and forced == "auto" and dtype != torch.float64 and device in ORDER:
        _warn_of_device(device)


@functools.cache
def _warn_of_device(device: str) -> None:
    if device == "cuda":
        what = "several times slower than Triton"
        why = None if importlib.util.find_spec("triton") else "triton is not installed"
        cure = "`pip install triton`"
    else:
        # 256 x 49152 fp32, forward and backward: 0.78 s against 0.031 s of processor time (Zen 3)
        what, why = "up to 25 times slower than native code", native_library(device)
        cure = (
            "`pip install --force-reinstall --no-deps .` in the source folder of deepalign_kernels"
        )
    if why:
        warnings.warn(
            f"deepalign_kernels runs {device} tensors in plain torch, {what}: {why}. The cure:"
            f" {cure}. `python -m deepalign_kernels` shows what runs; DEEPALIGN_BACKEND=eager"
            " asks for it.",
            RuntimeWarning,
            stacklevel=2,
        )


def choose(op: str, device: str, dtype: torch.dtype) -> Callable[..., object]:
    """Implementation of `op` (such as "token_kl_fwd") for tensors on `device` ("cpu" or "cuda").

    Raises:
        RuntimeError: when a backend was forced and cannot run. Only "auto" moves down ORDER.
    """
    for seen in _watching:
        seen[op] = selected(op, device, dtype)
    return _choose(op, device, dtype, _forced)


@functools.cache  # `forced` makes an entry for every backend that was ever forced
def _choose(op: str, device: str, dtype: torch.dtype, forced: str) -> Callable[..., object]:
    # `forced` is only a part of the cache's key: `selected` reads the same value from `_forced`.
    name = selected(op, device, dtype)
    _warn_if_slow(name, device, dtype, forced)
    if name == "native":
        return getattr(torch.ops.deepalign_native, op).default
    return getattr(module_of(name, op), op)


_watching: list[dict[str, str]] = []


@contextlib.contextmanager
def watched() -> Iterator[dict[str, str]]:
    """{op: backend} of the ops that run in the block, filled as they do, in any thread."""
    seen: dict[str, str] = {}
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching[:] = [one for one in _watching if one is not seen]


def native_gemm(device: str) -> bool:
    """Whether the linear ops may take the native library's GEMM of 16-bit operands: on a CPU with
    AVX2 or more, unless another backend is forced.
    """
    if device != "cpu" or _forced not in ("auto", "native") or native_library("cpu"):
        return False
    return torch.ops.deepalign_native.has_gemm.default()


def fresh_pages(x: torch.Tensor) -> torch.Tensor:
    """`x`, which nobody has written to yet, in large pages where the native CPU library can ask for
    them: one page fault per 2 MiB instead of 512. `benchmarks/studies/pieces.py` times it.
    """
    large = x.device.type == "cpu" and x.numel() * x.element_size() > LARGE
    if large and _forced in ("auto", "native") and not native_library("cpu"):
        torch.ops.deepalign_native.large_pages.default(x)
    return x


_lock = threading.Lock()


@contextlib.contextmanager
def overlapping(blocks: list[list[Any]], value: Any, assign: Callable[[Any], None]) -> Iterator:
    """`assign(value)` in the block, for the whole process. Blocks of several threads may overlap:
    the youngest one that is open counts, and after the last one what was there before the first.

    Args:
        blocks: [[what holds outside of all blocks]], and [value] of each one that is open.
        value: what holds in this block.
        assign: makes a value the one that holds.
    """
    mine = [value]
    with _lock:
        blocks.append(mine)
        assign(value)
    try:
        yield
    finally:
        with _lock:
            blocks[:] = [block for block in blocks if block is not mine]
            assign(blocks[-1][0])


_blocks: list[list[Any]] = [[_forced]]


def _force(name: str) -> None:
    global _forced
    _forced = name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend ("native", "triton", "eager"; "auto" undoes it) inside the block.

    It holds for all threads; of blocks that overlap the youngest counts. An op that this backend
    cannot run raises RuntimeError with the reason; nothing falls back. DEEPALIGN_BACKEND in the
    environment does it for a whole process.

    Raises:
        ValueError: an unknown name.
    """
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"name: expected one of {', '.join((*BACKENDS, 'auto'))}, got {name!r}")
    with overlapping(_blocks, name, _force):
        yield
