"""Peak memory of one call beyond what its caller already holds, results and gradients included.

CUDA: the caching allocator's peak. CPU, two independent readings:
  allocated  every allocation and release of torch's CPU allocator, from torch.profiler: exact to
             the byte, and inside custom ops too, C++ ones as well, as they allocate through torch;
  resident   growth of the process's peak resident set (VmHWM, reset before the call): sees any
             allocator, also plain malloc, but only pages that are touched and were not in the
             heap's free lists already.
The two agree to a few MiB where nothing hides; `Peak.extra` is the first, the second checks it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

R = TypeVar("R")
_STATUS = "/proc/self/status"


@dataclass(frozen=True)
class Peak:
    """Bytes beyond the inputs at the worst moment; None where a reading does not exist on this
    system.
    """

    allocated: int | None
    resident: int | None = None

    @property
    def extra(self) -> int | None:
        return self.resident if self.allocated is None else self.allocated


def measured(fn: Callable[[], R], device: str) -> tuple[R, Peak]:
    """Run `fn` once on "cpu" or "cuda"; its result and its peak."""
    collecting = gc.isenabled()
    gc.disable()  # older garbage that is freed meanwhile would count against this call's memory
    try:
        return _measured(fn, device)
    finally:
        if collecting:
            gc.enable()


def _measured(fn: Callable[[], R], device: str) -> tuple[R, Peak]:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        result = fn()
        torch.cuda.synchronize()
        return result, Peak(torch.cuda.max_memory_allocated() - held)
    _load_profiler()
    _trim_heap()
    watching = _reset_peak_resident()
    before = _status("VmRSS")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = fn()
        after = _status("VmHWM")
    known = watching and before is not None and after is not None
    resident = max(0, after - before) if known else None  # type: ignore[operator]
    return result, Peak(_peak_of(prof), resident)


@functools.cache
def _load_profiler() -> None:
    """Its first use brings 150 MB of libraries into memory, which are not the call's."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True):
        pass


def _peak_of(prof: profile) -> int | None:
    """Largest running sum over the profile's allocations and releases, in the order they
    happened.
    """
    recorded = prof.profiler
    if recorded is None or recorded.kineto_results is None:
        return None
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()  # type: ignore[attr-defined]
        peak = max(peak, live)
    return peak


def _status(key: str) -> int | None:
    """A size of /proc/self/status in bytes; None where there is no such file (not Linux)."""
    with contextlib.suppress(OSError), open(_STATUS) as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return None


def _reset_peak_resident() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _trim_heap() -> None:
    """Give free heap pages back, so that using them again counts as growth (glibc only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
