"""An append-only file that a killed process leaves whole up to the last unit it finished."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from deepalign_kernels.runs.record import Record, canonical

MARK = b'{"unit":'  # begins the line that ends a unit; the keys of records are sorted: {"cell":


class Journal:
    """JSONL in units: all lines of a unit count, or none.

    A unit is what is computed and lost together, such as the replies to one batch of prompts. Its
    lines are written at once, and a last line names it. Opening the file again cuts off whatever
    stands behind the last such line, so a run that was killed and goes on writes the same bytes as
    one that never stopped. The file is made readable by its owner alone (0600).

    Raises:
        ValueError: another process has the file open.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise ValueError(f"{self.path}: another process is writing this run") from error
        self.units: set[str] = set()
        at = end = 0
        with self.path.open("rb") as file:
            for line in file:
                at += len(line)
                if (unit := _ends(line)) is not None:
                    self.units.add(unit)
                    end = at
        os.ftruncate(self._file, end)
        os.lseek(self._file, end, os.SEEK_SET)

    def commit(self, unit: str, records: Iterable[Record]) -> None:
        """Append the records of a unit that is not there yet.

        Raises:
            ValueError: the unit is there.
            OSError: the disk is full; what was written of the unit is cut off at the next start.
        """
        if unit in self.units:
            raise ValueError(f"unit: {unit!r} is in {self.path} already")
        lines = [*(record.line for record in records), canonical({"unit": unit})]
        data = "".join(f"{line}\n" for line in lines).encode()
        while data:  # a signal may leave a rest
            data = data[os.write(self._file, data) :]
        self.units.add(unit)

    def close(self) -> None:
        """Write through to the disk and let others open the file."""
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1


def _ends(line: bytes) -> str | None:
    """Name of the unit that this line ends."""
    if not (line.startswith(MARK) and line.endswith(b"\n")):
        return None
    try:
        return json.loads(line)["unit"]
    except ValueError:  # torn, and something else behind
        return None


def read_journal(path: str | Path) -> Iterator[Record]:
    """The records of finished units, in order; also of a run that is being written.

    Raises:
        ValueError: no such file; a broken line, or a record there twice, before a finished unit.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    waiting: list[tuple[int, bytes]] = []
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if _ends(line) is None:
                waiting.append((number, line))
                continue
            for at, each in waiting:
                try:
                    record = Record.of_line(each)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{path}:{at}: not a record: {error}") from error
                if record.key in seen:
                    raise ValueError(f"{path}:{at}: this record is there twice")
                seen.add(record.key)
                yield record
            waiting.clear()
