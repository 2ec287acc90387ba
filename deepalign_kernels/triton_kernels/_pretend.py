"""A GPU that is not there: Triton's own launch path, up to the driver.

Inside `gpu(arch)` a launch binds its arguments, specialises, looks into the cache, compiles, checks
the globals and calls a launcher that does nothing. The tests find there what neither the
interpreter nor an offline compilation sees; `python -m benchmarks host` times it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton

from deepalign_kernels.triton_kernels import _launch
from deepalign_kernels.triton_kernels._offline import TARGETS


class _Driver:
    """What `triton.runtime` asks a driver for."""

    def __init__(self, target: Any, device: int) -> None:
        self._target = target
        self._device = device  # Triton keeps what it compiled by this number
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 64 << 10},
            load_binary=lambda *_: (None, 0, 0, 0, 1024),
        )

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *_: None


@contextlib.contextmanager
def gpu(arch: str) -> Iterator[None]:
    """Launch on a pretended GPU of `arch`, a key of `_launch.TABLE`, for CPU and meta tensors
    alike."""
    driver = _Driver(TARGETS[arch], list(TARGETS).index(arch))
    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(_launch, "_arch", lambda device: arch),
    ):
        yield


def compiled(kernel: Any) -> int:
    """How many variants of a kernel the launcher has in its cache."""
    return sum(len(caches[0]) for caches in kernel.device_caches.values())
