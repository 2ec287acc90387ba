"""What this machine can do at best, measured in the same process as the kernels: the rulers of the
report.

read   bytes read per second, nothing written           the ceiling of a forward pass
copy   bytes read plus bytes written per second         the ceiling of what also writes a gradient
gemm   floating-point operations per second per dtype   the ceiling of the linear ops

A ceiling is the best of several ways of doing the same thing, by the median over its laps, so that
one slow routine (torch.sum on some dtypes) does not flatter the kernels. Under `ways` the report
lists them all.

The bandwidth of a machine that others share swings by a factor of two within minutes, so the
fastest way of reading and of copying is a `Ruler` that takes turns with the providers of a cell.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.harness.measure import laps_of


@dataclass
class Ceilings:
    """Bytes per second, and operations per second by dtype name; 0 where not measured."""

    read: float = 0.0
    copy: float = 0.0
    gemm: dict[str, float] = field(default_factory=dict)
    ways: dict[str, float] = field(default_factory=dict)

    def of_phase(self, writes: bool) -> float:
        return self.copy if writes else self.read

    def take(self, kind: str, name: str, rate: float) -> None:
        """Keep the best rate seen, of each way and of each kind."""
        self.ways[name] = max(rate, self.ways.get(name, 0.0))
        if kind in ("read", "copy"):
            setattr(self, kind, max(rate, getattr(self, kind)))
        else:
            self.gemm[kind] = max(rate, self.gemm.get(kind, 0.0))


@dataclass(frozen=True)
class Ruler:
    """A call that moves `size` bytes through memory, and nothing else."""

    size: int
    call: Callable[[], object]


def bandwidth(ceilings: Ceilings, device: str, size: int, laps: int = 5) -> dict[str, Ruler]:
    """Measure read and copy bandwidth over buffers of `size` bytes and keep what is better than
    before. Returns the fastest way of each, by kind.
    """
    a = torch.ones(size // 4, dtype=torch.int32, device=device)
    b = torch.ones_like(a)  # touched, so that no copy pays for page faults
    ways = {
        "read": {**_torch_reads(a), **_libc_reads(a)},
        "copy": {"torch copy_": lambda: b.copy_(a), **_libc_copies(a, b)},
    }
    fastest = {}
    for kind, moved in (("read", size), ("copy", 2 * size)):
        rates = {n: moved / _median(way, device, laps) for n, way in ways[kind].items()}
        for name, rate in rates.items():
            ceilings.take(kind, f"{kind}: {name}", rate)
        fastest[kind] = Ruler(moved, ways[kind][max(rates, key=lambda n: rates[n])])
    return fastest


def gemm(ceilings: Ceilings, device: str, dtypes: dict[str, torch.dtype]) -> None:
    """Measure square matrix products of random numbers (zeros would run faster)."""
    for n in (4096, 8192) if device == "cuda" else (1024, 2048):
        for name, dtype in dtypes.items():
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            out = torch.empty(n, n, dtype=dtype, device=device)
            seconds = _median(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, 7)
            ceilings.take(name, f"gemm: {name} {n}^3", 2 * n**3 / seconds)


def _median(fn: Callable[[], object], device: str, laps: int) -> float:
    laps_of(fn, device, 2)
    return statistics.median(laps_of(fn, device, laps))


def _torch_reads(a: Tensor) -> dict[str, Callable[[], object]]:
    """Reductions of the same bytes under several dtypes, and a matrix-vector product that streams
    them.
    """
    ways: dict[str, Callable[[], object]] = {
        "torch.sum fp32": lambda: a.view(torch.float32).sum(),
        "torch.sum int64": lambda: a.view(torch.int64).sum(),
        "torch.amax int32": lambda: a.amax(),
        "torch.amax fp32": lambda: a.view(torch.float32).amax(),
    }
    columns = 4096
    if a.numel() % columns == 0:
        matrix = a.view(torch.float32).view(-1, columns)
        vector = torch.ones(columns, device=a.device)
        ways["torch.mv fp32"] = lambda: torch.mv(matrix, vector)
    return ways


def _parts(size: int) -> list[tuple[int, int]]:
    """(offset, bytes) of one contiguous part per torch thread, on page borders."""
    n = torch.get_num_threads()
    step = (-(-size // n) + 4095) // 4096 * 4096
    return [(at, min(step, size - at)) for at in range(0, size, step)]


def _libc_reads(a: Tensor) -> dict[str, Callable[[], object]]:
    """memchr for a byte that is not there: vectorised in glibc, and ctypes lets all threads run."""
    libc = _libc() if a.device.type == "cpu" else None
    if libc is None:
        return {}
    jobs, pool = _parts(a.numel() * 4), ThreadPoolExecutor(torch.get_num_threads())

    def read() -> None:
        found = pool.map(lambda job: libc.memchr(a.data_ptr() + job[0], 0xFF, job[1]), jobs)
        assert not any(found)

    return {"libc memchr, all threads": read}


def _libc_copies(a: Tensor, b: Tensor) -> dict[str, Callable[[], object]]:
    libc = _libc() if a.device.type == "cpu" else None
    if libc is None:
        return {}
    jobs, pool = _parts(a.numel() * 4), ThreadPoolExecutor(torch.get_num_threads())

    def copy() -> None:  # asks for the addresses itself, so that it keeps the memory
        src, dst = a.data_ptr(), b.data_ptr()
        list(pool.map(lambda job: libc.memmove(dst + job[0], src + job[0], job[1]), jobs))

    return {"libc memmove, all threads": copy}


def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        libc.memchr.restype = libc.memmove.restype = ctypes.c_void_p
        libc.memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
        libc.memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    except (OSError, TypeError, AttributeError):
        return None
    return libc
