"""The reference on disk: made once, kept under a hash of its content, for any number of runs.

    reference-<key>/       about.json   what it was made from, and checksums
                           logp.bin     fp32, log-probability of each trained token
                           hidden.bin   last hidden states, for a divergence over the vocabulary
                           head.pt      the output head that goes with them

While it is made it is `.reference-<key>.part/`, with a line for every forward that is in it:
whoever comes next goes on where a killed process stopped, with the same forwards and so the same
numbers. A lock, which goes with the process that holds it, lets one run at a time make it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepalign_kernels.data.columns import TokenTable
from deepalign_kernels.data.examples import IGNORE
from deepalign_kernels.train import folder as folders
from deepalign_kernels.train.ranks import ALONE, Ranks
from deepalign_kernels.train.rowfile import RowFile

FORMAT = 1
ABOUT, LOGP, HIDDEN, HEAD = "about.json", "logp.bin", "hidden.bin", "head.pt"
NAMES = {  # of what an entry is made from, in messages
    "model": "weights of the reference",
    "data": "tokens than data gives now",
    "anchors": "choice of positions or dtype (kl_positions, reference_dtype, eval_kl)",
}


class Entry(NamedTuple):
    """A whole one, open."""

    logp: Tensor  # fp32, as long as the table's columns; 0 where nothing is trained
    hidden: RowFile | None
    weight: Tensor | None  # [V, R], the head of `hidden`, on the CPU
    bias: Tensor | None
    dtype: torch.dtype | None  # in which the reference computed `hidden`


def key_of(about: dict[str, Any]) -> str:
    """The name of what was made from this."""
    text = json.dumps(about, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def anchored_counts(table: TokenTable, positions: int | None) -> list[int]:
    """Of each example, how many trained tokens stand at position 1 to `positions`; None: all."""
    if positions is None:
        return list(table.trained)
    ends = torch.tensor(list(table.lengths)).cumsum(0)
    at = table.positions
    chosen = (table.targets != IGNORE) & (at >= 1) & (at <= positions)
    total = torch.cat([torch.zeros(1, dtype=torch.int64), chosen.long().cumsum(0)])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
    return (total[ends] - total[starts]).tolist()


class ReferenceCache:
    """Entries in `folder`, for the processes of one run and for other runs."""

    def __init__(self, folder: Path, ranks: Ranks = ALONE) -> None:
        self.folder, self._ranks = folder, ranks

    def path(self, key: str) -> Path:
        return self.folder / f"reference-{key}"

    def load(self, key: str, table: TokenTable, about: dict[str, Any]) -> Entry:
        """The entry of this name.

        Args:
            key: its name.
            table: the data it must speak about.
            about: what it must be made from; None stands for what is not known.

        Raises:
            ValueError: missing, damaged, or made from something else, which is named.
        """
        path = self.path(key)
        if not path.is_dir():
            raise ValueError(
                f"resume: {path} is missing; it holds the reference of this run, which cannot be"
                " computed again from a policy that has moved. Put it back, or begin again"
            )
        try:
            kept = json.loads((path / ABOUT).read_text())
            if kept["format"] != FORMAT:
                raise ValueError(f"format {kept['format']}, expected {FORMAT}")
            self._must_fit(path, kept["about"], about)
            return _opened(path, kept, table)
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not readable: {error}") from error

    def _must_fit(self, path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
        odd = [k for k in now if now[k] is not None and then.get(k) != now[k]]
        if odd:
            named = [NAMES.get(k, f"{k} ({then.get(k)!r}, now {now[k]!r})") for k in odd]
            raise ValueError(f"{path} is stale: made from other {' and other '.join(named)}")

    def whole(self, key: str, table: TokenTable, about: dict[str, Any]) -> bool:
        """Whether it is there; one that is damaged is removed, with a warning, to be made again."""
        if not self.path(key).is_dir():
            return False
        try:
            self.load(key, table, about)
        except ValueError as error:
            warnings.warn(f"{error}; computing the reference again", stacklevel=2)
            shutil.rmtree(self.path(key))
            return False
        return True

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """In the block no other run makes this entry."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / f".reference-{key}.lock")

        def acquire() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                warnings.warn(
                    f"{self.path(key)}: another run is computing it; waiting for it", stacklevel=2
                )
                lock.acquire()

        self._ranks.first(acquire)
        try:
            yield
        finally:
            lock.release()

    def part(
        self, key: str, table: TokenTable, about: dict[str, Any], layout: dict[str, Any]
    ) -> Part:
        """The beginning of this entry, perhaps one that a killed process left; needs the lock.

        Args:
            key: of the entry.
            table: the data.
            about: what the entry is made from.
            layout: what decides which examples go through the model together.
        """
        path = self.folder / f".reference-{key}.part"
        self._ranks.first(lambda: _begun(path, {"format": FORMAT, "layout": layout}))
        return Part(path, self.path(key), table, about, self._ranks)


def _begun(path: Path, how: dict[str, Any]) -> None:
    """The folder of a part; one that was begun otherwise is emptied."""
    note = path / "how.json"
    text = json.dumps(how, sort_keys=True)
    if not note.is_file() or note.read_text() != text:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        note.write_text(text)


class Part:
    """An entry in the making: each process writes what it computes, the first one ends it."""

    def __init__(
        self, path: Path, final: Path, table: TokenTable, about: dict[str, Any], ranks: Ranks
    ) -> None:
        self._path, self._final, self._about, self._ranks = path, final, about, ranks
        self._trained = list(table.trained)
        anchors = about["anchors"]
        self._counts = None if anchors is None else anchored_counts(table, anchors["positions"])
        self._stored = None if anchors is None else getattr(torch, anchors["dtype"])
        self._logp = RowFile(path / LOGP, self._trained, 1, torch.float32, write=True)
        self._hidden: RowFile | None = None
        self._done = path / f"done-{ranks.rank}"

    def done(self, rounds: Sequence[list[int]]) -> set[int]:
        """Which of the rounds are in it, in every process; `rounds`: this one's examples of each.

        A round counts if the files hold for it what its line says.
        """
        own = set()
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, OSError):
            if self._counts is not None:
                kept = json.loads((self._path / "hidden.json").read_text())
                folders.read(self._path / HEAD)
                self._open_hidden(kept["width"])
            for line in self._done.read_text().splitlines():
                with contextlib.suppress(ValueError, IndexError):
                    number, crc = map(int, line.split())
                    if crc == self._crc(rounds[number]):
                        own.add(number)
        return set.intersection(*self._ranks.gather(own))

    def begin_hidden(self, width: int, dtype: torch.dtype, weight: Tensor, bias: Any) -> None:
        """Once the first forward has shown what there is to store."""
        if self._hidden is not None:
            return
        name = str(dtype).removeprefix("torch.")

        def save() -> None:
            head = {"weight": weight.cpu(), "bias": None if bias is None else bias.cpu()}
            size = torch.empty(0, dtype=self._stored).element_size()
            _check_room(self._path, sum(self._counts or ()) * width * size + 4 * sum(self._trained))
            folders.write_atomically(self._path / HEAD, head)
            note = {"width": width, "dtype": name}
            (self._path / "hidden.json").write_text(json.dumps(note))

        self._ranks.first(save)
        self._open_hidden(width)

    def put(self, number: int, rows: list[int], logp: Tensor, hidden: Tensor | None) -> None:
        """A round: log-probabilities [n] and hidden states [m, R] of these examples, in order."""
        try:
            _put(self._logp, rows, logp[:, None], self._trained)
            if self._hidden is not None and self._counts is not None:
                assert hidden is not None
                _put(self._hidden, rows, hidden, self._counts)
            with self._done.open("a") as file:
                file.write(f"{number} {self._crc(rows)}\n")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    error.errno,
                    f"no room for the reference in {self._path.parent}. What is there is kept: make"
                    " room and start again, and it goes on from there",
                ) from error
            raise

    def finish(self) -> None:
        """Give it its name; all processes must call."""
        for file in (self._logp, self._hidden):
            if file is not None:
                file.flush()
        self._ranks.gather(None)  # all have written
        self._ranks.first(self._named)

    def _named(self) -> None:
        files = {LOGP: self._logp}
        kept: dict[str, Any] = {"format": FORMAT, "about": self._about}
        if self._hidden is not None:
            files[HIDDEN] = self._hidden
            kept["hidden"] = json.loads((self._path / "hidden.json").read_text())
        kept["crc"] = {name: file.crc(range(len(self._trained))) for name, file in files.items()}
        (self._path / ABOUT).write_text(json.dumps(kept))
        for path in self._path.iterdir():
            if path.name not in (ABOUT, LOGP, HIDDEN, HEAD):
                path.unlink()
        os.replace(self._path, self._final)

    def _open_hidden(self, width: int) -> None:
        assert self._counts is not None and self._stored is not None
        self._hidden = RowFile(self._path / HIDDEN, self._counts, width, self._stored, write=True)

    def _crc(self, rows: list[int]) -> int:
        value = self._logp.crc(rows)
        return value if self._hidden is None else value ^ self._hidden.crc(rows)


def _put(file: RowFile, rows: list[int], values: Tensor, counts: Sequence[int]) -> None:
    values = values.detach().cpu()
    for row, part in zip(rows, values.split([counts[row] for row in rows]), strict=True):
        file.put(row, part)


def _check_room(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(
            errno.ENOSPC,
            f"no room for the reference: {need / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free in"
            f" {folder.parent}; kl_positions keeps fewer tokens, reference_cache names another"
            " folder",
        )


def _opened(path: Path, kept: dict[str, Any], table: TokenTable) -> Entry:
    """Raises ValueError: a file is damaged."""
    every = range(len(table))

    def checked(name: str, file: RowFile) -> RowFile:
        if file.crc(every) != kept["crc"][name]:
            raise ValueError(f"{path / name} is damaged: its checksum is wrong")
        return file

    logp = RowFile(path / LOGP, list(table.trained), 1, torch.float32)
    column = torch.zeros(len(table.ids), dtype=torch.float32)
    column[table.targets != IGNORE] = checked(LOGP, logp).all()[:, 0]
    if "hidden" not in kept:
        return Entry(column, None, None, None, None)
    anchors, about = kept["about"]["anchors"], kept["hidden"]
    counts = anchored_counts(table, anchors["positions"])
    stored = getattr(torch, anchors["dtype"])
    hidden = checked(HIDDEN, RowFile(path / HIDDEN, counts, about["width"], stored))
    head = folders.read(path / HEAD)
    return Entry(column, hidden, head["weight"], head["bias"], getattr(torch, about["dtype"]))
