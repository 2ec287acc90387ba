"""Clocks. Providers take turns (A B C A B C ...), so that a machine that slows down slows them all.

Every call gets the next of several input sets, which together are larger than the last-level cache.
Times are seconds; results are dropped outside the clock. CUDA laps are device events: the stream is
first given idle work for longer than the host takes to queue the laps, so that the gaps between
launches are not measured, however slow the host.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

CYCLES_PER_SECOND = 2e9  # of a GPU's clock, about: 1.98 GHz on an H100
FIRST_SLEEP, LONGEST_SLEEP = 1e-3, 0.05  # seconds; a call that waits for the GPU itself gains none


@dataclass(frozen=True)
class Summary:
    """Seconds per call: median, 10th and 90th percentile over `laps` calls."""

    median: float
    p10: float
    p90: float
    laps: int


@dataclass
class Runner:
    """One provider on one case. `call(k)` runs it on input set k; `prepare(k)` runs before, off the
    clock.
    """

    call: Callable[[int], object]
    scope: Callable[[], AbstractContextManager[object]]
    prepare: Callable[[int], None] | None = None
    laps: list[float] = field(default_factory=list)
    turn: int = 0

    def run(self, device: str, n: int) -> None:
        """Time n calls in a row, after one that does not count: it finds caches, clocks and free
        memory as the provider before left them. (A virtual machine that reports free pages to its
        host lost 250 ms on a gradient of 262 MB after two seconds of somebody else's work.)
        """
        with self.scope():
            if self.prepare is None:
                self.laps += laps_of(self._next, device, n + 1)[1:]
                return
            for k in range(n + 1):  # one by one: the copy must be ready, and not be timed
                self.prepare(self.turn)
                self.laps += laps_of(self._next, device, 1)[k == 0 :]

    def _next(self) -> object:
        self.turn += 1
        return self.call(self.turn - 1)

    def summary(self) -> Summary:
        return summarise(self.laps)


def laps_of(fn: Callable[[], object], device: str, n: int) -> list[float]:
    """Seconds of each of n calls."""
    if device != "cuda":
        laps = []
        for _ in range(n):
            start = time.perf_counter()
            result = fn()
            laps.append(time.perf_counter() - start)
            del result
        return laps
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    torch.cuda.synchronize()
    wanted = FIRST_SLEEP
    for k, (start, end) in enumerate(pairs):
        if k < 2:
            torch.cuda._sleep(int(CYCLES_PER_SECOND * wanted))
        began = time.perf_counter()
        start.record()
        fn()
        end.record()
        # The first lap tells how long the host needs for one; the others wait for all of them.
        wanted = min(LONGEST_SLEEP, 1.5 * n * (time.perf_counter() - began))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in pairs]


def interleave(
    runners: Sequence[Runner], device: str, *, seconds: float, rounds: int, most: int = 40
) -> None:
    """Take turns until every runner was asked `rounds` times and `seconds` per runner are spent.

    A runner that is fast against the others runs several times per turn, at most 10 times and for
    about as long as a twentieth of `seconds`.
    """
    for runner in runners:
        runner.run(device, 1)
    share = {id(r): max(1, min(10, int(seconds / 20 / max(r.laps[-1], 1e-9)))) for r in runners}
    stop = time.perf_counter() + seconds * len(runners)
    done = 1
    while done < rounds or (time.perf_counter() < stop and done < most):
        for runner in runners:
            runner.run(device, share[id(runner)])
        done += 1


def summarise(laps: Sequence[float]) -> Summary:
    ordered = sorted(laps)
    last = len(ordered) - 1
    p10, p90 = (ordered[round(q * last)] for q in (0.1, 0.9))
    return Summary(statistics.median(ordered), p10, p90, len(ordered))


def input_sets(set_bytes: int, cache_bytes: int, most_bytes: int) -> int:
    """How many input sets to rotate: together over four caches, at least two, within `most_bytes`
    if they can.
    """
    wanted = max(2, -(-4 * cache_bytes // max(1, set_bytes)))
    return max(1, min(wanted, 64, most_bytes // max(1, set_bytes)))
