"""An append-only file that a killed process leaves whole up to the last unit it finished."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from deepalign_kernels.runs.record import Record, canonical

MARK = b'{"unit":'  # begins the line that ends a unit; the keys of records are sorted: {"cell":


class Journal:
    """JSONL in units: all lines of a unit count, or none.

    A unit is what is computed and lost together, such as the replies to one batch of prompts. Its
    lines are written at once, and a last line names it. Opening the file again cuts off whatever
    stands behind the last such line, so a run that was killed and goes on writes the same bytes as
    one that never stopped. A unit may be written again, and then stands for the first one, in its
    place; the lines of the first stay in the file. The file is made readable by its owner alone
    (0600).

    Raises:
        ValueError: another process has the file open.

    Attributes:
        units: names of units that are done; one with an `unsettled` record is not.
        marks: by unit, what it was made from, where that was told.
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
        self.marks: dict[str, str] = {}
        at = end = 0
        with self.path.open("rb") as file:
            for line in file:
                at += len(line)
                if (last := _ends(line)) is not None:
                    self._note(last)
                    end = at
        os.ftruncate(self._file, end)
        os.lseek(self._file, end, os.SEEK_SET)

    def has(self, unit: str, mark: str = "") -> bool:
        """Whether a unit is done; one that was made from something else is not."""
        return unit in self.units and self.marks.get(unit, mark) == mark

    def _note(self, last: dict[str, Any]) -> None:
        unit = last["unit"]
        (self.units.discard if last.get("unsettled") else self.units.add)(unit)
        if "unit_mark" in last:
            self.marks[unit] = last["unit_mark"]

    def commit(self, unit: str, records: Iterable[Record], mark: str = "") -> int:
        """Append the records of a unit that is not done yet; returns how many are unsettled.

        Args:
            unit: its name.
            records: all of it.
            mark: what it was made from; "" tells nothing.

        Raises:
            ValueError: the unit is done.
            OSError: the disk is full; what was written of the unit is cut off at the next start.
        """
        if self.has(unit, mark):
            raise ValueError(f"unit: {unit!r} is in {self.path} already")
        records = list(records)
        last: dict[str, Any] = {"unit": unit}
        if mark:
            last["unit_mark"] = mark
        if unsettled := sum(record.unsettled for record in records):
            last["unsettled"] = unsettled
        lines = [*(record.line for record in records), canonical(last)]
        data = "".join(f"{line}\n" for line in lines).encode()
        while data:  # a signal may leave a rest
            data = data[os.write(self._file, data) :]
        self._note(last)
        return unsettled

    def close(self) -> None:
        """Write through to the disk and let others open the file."""
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1


def _ends(line: bytes) -> dict[str, Any] | None:
    """What this line says of the unit that it ends."""
    if not (line.startswith(MARK) and line.endswith(b"\n")):
        return None
    try:
        return json.loads(line)
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
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, start, size in _spans(file).values():
            file.seek(start)
            for at, line in enumerate(file.read(size).split(b"\n")[:-2], number):
                try:
                    record = Record.of_line(line)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{path}:{at}: not a record: {error}") from error
                if record.key in seen:
                    raise ValueError(f"{path}:{at}: this record is there twice")
                seen.add(record.key)
                yield record


def _spans(file: BinaryIO) -> dict[str, tuple[int, int, int]]:
    """(number of the first line, where it begins, bytes) of each unit's last version, the units in
    the order of their first."""
    spans: dict[str, tuple[int, int, int]] = {}
    first, start, at = 1, 0, 0
    for number, line in enumerate(file, 1):
        at += len(line)
        if (last := _ends(line)) is not None:
            spans[last["unit"]] = (first, start, at - start)
            first, start = number + 1, at
    return spans
