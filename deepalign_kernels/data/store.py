"""Columns of numbers in files: written once from front to back, then read through memory mapping.

Data larger than memory stay on the disk; of what is read the system keeps what there is room for.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ColumnFile:
    """Numbers of one type, appended.

    Args:
        dtype: numpy's.
        path: None: a file without a name, which is gone when nothing refers to it.
    """

    def __init__(self, dtype: Any, path: Path | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self._file: Any = path.open("w+b") if path else tempfile.TemporaryFile()  # noqa: SIM115
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, values: Sequence[Any] | np.ndarray) -> None:
        block = np.asarray(values, self.dtype)
        self._file.write(block.tobytes())
        self._count += len(block)

    def mapped(self) -> Tensor:
        """All of it; nothing can be appended any more. Writing into it changes no file."""
        self._file.flush()
        return mapped(self._file, self.dtype)


class Watched:
    """A mapped file that others can reach. Cut short, it would kill the process that reads it
    (SIGBUS); removed or given another name, it stays what it was."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("rb")
        self._size = os.fstat(self._file.fileno()).st_size

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def check(self) -> None:
        """Raises OSError: it was cut short."""
        now = os.fstat(self._file.fileno()).st_size
        if now < self._size:
            raise OSError(
                f"{self._path} was cut short while it was in use: {now} of {self._size} bytes. What"
                " was saved is whole; resume, and the data are tokenised again"
            )


def mapped(file: Any, dtype: Any) -> Tensor:
    """The numbers in `file`, a path or an open file."""
    return torch.from_numpy(np.memmap(file, dtype, mode="c"))
