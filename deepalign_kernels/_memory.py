"""How many bytes a call allocates: for the tests of `estimate_memory` and for the benchmarks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Allocated(NamedTuple):
    """Bytes beyond what was allocated before the call."""

    peak: int  # the most at any time during the call
    kept: int  # when it had returned, its result included
    largest: int  # the largest single allocation (0 where it is unknown: CUDA)


def measure(call: Callable[[], Any]) -> tuple[Any, Allocated]:
    """(call(), what it allocated), from the allocator itself: temporaries inside operators count.

    On the CPU these are the profiler's records of torch's allocator; what BLAS and oneDNN take for
    themselves is not in them. On CUDA it is the caching allocator's peak, rounded up to its blocks.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return result, Allocated(peak, torch.cuda.memory_allocated() - before, 0)
    activities = [torch.profiler.ProfilerActivity.CPU]
    gc.collect()  # what a collection inside the call frees would count as the call's
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            result = call()
    finally:
        if collects:
            gc.enable()
    changes = _changes(profile)
    now = peak = 0
    for size in changes:
        now += size
        peak = max(peak, now)
    return result, Allocated(peak, now, max(changes, default=0))


def _changes(profile: Any) -> list[int]:
    """Sizes of the allocations (positive) and releases (negative), in the order of time."""
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return [size for _, size in sorted(changes, key=lambda change: change[0])]
