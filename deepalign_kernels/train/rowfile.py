"""Numbers per example in a file: so many records of one width for each, read and written example by
example.

Not memory-mapped: a file that is cut short while a run reads it must be an error, where a mapped
one kills the process (SIGBUS). What is read often lies in the system's page cache all the same.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor


class RowFile:
    """One file, open until nothing refers to it any more; removed, it can be read on.

    Args:
        path: of the file.
        counts: records of each example.
        width: numbers in a record.
        dtype: of the numbers.
        write: make it, or open it to go on writing; else it must be there, and whole.

    Raises:
        ValueError: a file of another size.
    """

    def __init__(
        self, path: Path, counts: Sequence[int], width: int, dtype: torch.dtype, write: bool = False
    ) -> None:
        self.path, self.width, self.dtype = path, width, dtype
        self._counts = counts
        self._ends = torch.tensor(counts, dtype=torch.int64).cumsum(0)
        self._record = width * torch.empty(0, dtype=dtype).element_size()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT if write else os.O_RDONLY)
        if write:
            os.ftruncate(self._file, self.size)
        elif os.fstat(self._file).st_size != self.size:
            found = os.fstat(self._file).st_size
            raise ValueError(f"{path}: expected {self.size} bytes, found {found}")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return int(self._ends[-1]) * self._record

    def put(self, example: int, values: Tensor) -> None:
        """Write the records [n, width] of an example."""
        data = values.to(self.dtype).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        at, length = self._place(example)
        assert len(data) == length, (len(data), length)
        while data:  # a write may take less than all of it
            done = os.pwrite(self._file, data, at)
            data, at = data[done:], at + done

    def get(self, examples: Iterable[int]) -> Tensor:
        """Records [n, width] of these examples, one example after the other.

        Raises:
            OSError: the file was cut short.
        """
        data = bytearray(b"".join([self._bytes(example) for example in examples]))
        if not data:
            return torch.empty(0, self.width, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).view(-1, self.width)

    def all(self) -> Tensor:
        return self.get(range(len(self._counts)))

    def crc(self, examples: Iterable[int]) -> int:
        """Of what the file has for these examples."""
        value = 0
        for example in examples:
            value = zlib.crc32(self._bytes(example), value)
        return value

    def flush(self) -> None:
        """Onto the disk."""
        os.fsync(self._file)

    def _place(self, example: int) -> tuple[int, int]:
        count = self._counts[example]
        return (int(self._ends[example]) - count) * self._record, count * self._record

    def _bytes(self, example: int) -> bytes:
        at, length = self._place(example)
        data = os.pread(self._file, length, at)
        while len(data) < length:
            more = os.pread(self._file, length - len(data), at + len(data))
            if not more:
                raise OSError(
                    f"{self.path} was cut short while it was in use: example {example} has"
                    f" {len(data)} of {length} bytes. What was saved is whole; remove the file's"
                    " folder and begin again, or put the file back and resume"
                )
            data += more
        return data
