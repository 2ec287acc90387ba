"""A run: a folder with a manifest and journals, filled unit by unit, and gone on with later."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deepalign_kernels import progress
from deepalign_kernels.runs.journal import Journal, read_journal
from deepalign_kernels.runs.record import Record

MANIFEST = "manifest.json"
MEASURED = "measured"  # entry of the manifest for what was found out, not asked for
RECORDS, VERDICTS = "records.jsonl", "verdicts.jsonl"
TIMES = "times.jsonl"  # seconds of units and searches; apart, as a run that went on has others
PACKAGES = ("deepalign_kernels", "torch", "transformers", "tokenizers", "numpy", "scipy")


class Unit(NamedTuple):
    """What is computed and written together."""

    name: str  # unique in the run
    make: Callable[[], Iterable[Record]]
    size: int = 1  # how many records are expected; for the progress alone
    mark: str = ""  # what it is made from; a unit made from something else is made again
    after: Callable[[], None] | None = None  # called once it is written


class Run:
    """The folder of one run, open for writing.

    Args:
        folder: made if it is not there (0700).
        manifest: plain values that say what is computed: hash of the weights, rendered template,
            sampling, judges, hash of the data, system prompts, seeds. A run that goes on must have
            the same. Versions and hardware are added under "environment" and may differ then, as
            may what `measured` adds.
        may_lack: entries that a run of an earlier version has not; there they are not compared.

    Raises:
        ValueError: the folder holds a run with another manifest (the entries are named), or is in
            use.
    """

    def __init__(
        self, folder: str | Path, manifest: Mapping[str, Any], *, may_lack: Collection[str] = ()
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.folder / MANIFEST
        about = json.loads(json.dumps(dict(manifest)))  # tuples as lists, as they will be read
        if path.is_file():
            then = read_manifest(self.folder)
            lacking = {name for name in may_lack if name not in then}
            names = sorted((about.keys() | then.keys()) - {"environment", MEASURED} - lacking)
            if changed := [name for name in names if then.get(name) != about.get(name)]:
                raise ValueError(
                    f"{self.folder}: holds a run with another {', '.join(changed)};"
                    f" choose another folder, or go on with the settings in its {MANIFEST}"
                )
        else:
            write_private(path, json.dumps(about | {"environment": environment()}, indent=1) + "\n")
        self.records, self._verdicts = Journal(self.folder / RECORDS), None

    def measured(self, name: str, value: Any) -> None:
        """Keep in the manifest what was measured of the engine, such as a check before the run. It
        is no part of what the run was asked for, so it may be told later, and again."""
        about = read_manifest(self.folder)
        about[MEASURED] = {**about.get(MEASURED, {}), name: value}
        write_private(self.folder / MANIFEST, json.dumps(about, indent=1) + "\n")

    @property
    def verdicts(self) -> Journal:
        """What judges say, apart from the replies: judging again needs no model to reply again."""
        if self._verdicts is None:
            self._verdicts = Journal(self.folder / VERDICTS)
        return self._verdicts

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.records.close()
        if self._verdicts is not None:
            self._verdicts.close()


def fill(journal: Journal, units: Iterable[Unit], say: Callable[[str], None] | None = None) -> int:
    """Make and write every unit that the journal has not, in order; returns how many were made.
    One of which records are unsettled is written, and made again by the next call.

    Whatever stops it, the units written stay, and calling it again goes on behind them. `say` gets
    a line of progress with the time that is left, at most every two seconds, also within a unit
    that tells how far it is (`progress.told`).
    """
    units = list(units)
    left = [unit for unit in units if not journal.has(unit.name, unit.mark)]
    total = sum(unit.size for unit in units)
    begun = told = time.monotonic()
    start = done = total - sum(unit.size for unit in left)

    def line(done: float, unit: Unit, more: str = "") -> None:
        nonlocal told
        now = time.monotonic()
        if say and (now - told > 2 or done == total):
            told = now
            rest = (now - begun) * (total - done) / max(1e-9, done - start)
            say(f"{int(done)}/{total} records, {rest:.0f} s left ({unit.name}{more})")

    def within(unit: Unit, share: float) -> None:
        if 0 < share < 1:
            line(done + unit.size * share, unit, f", {100 * share:.0f} % of it")

    times = journal.path.with_name(TIMES)
    with os.fdopen(os.open(times, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a") as clock:
        for unit in left:
            before = time.monotonic()
            with progress.heard(functools.partial(within, unit)):
                records = list(unit.make())
                journal.commit(unit.name, records, unit.mark)
            if unit.after:
                unit.after()
            took: dict[str, Any] = {"unit": unit.name}
            took["seconds"] = round(time.monotonic() - before, 4)
            if each := {r.key: round(r.seconds, 4) for r in records if r.seconds is not None}:
                took["records"] = each
            clock.write(json.dumps(took) + "\n")
            clock.flush()
            done += unit.size
            line(done, unit)
    return len(left)


def read_records(folder: str | Path, kind: str | None = None) -> Iterator[Record]:
    """Records of a run's finished units, of one kind or all; no verdicts."""
    for record in read_journal(Path(folder) / RECORDS):
        if kind in (None, record.kind):
            yield record


def read_verdicts(folder: str | Path) -> Iterator[Record]:
    """Verdicts of a run; none if it was not judged."""
    path = Path(folder) / VERDICTS
    return read_journal(path) if path.is_file() else iter(())


def read_times(folder: str | Path) -> dict[str, float]:
    """Seconds by key of the records whose makers told; a torn last line counts for nothing."""
    path, found = Path(folder) / TIMES, {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            found.update(json.loads(line).get("records", {}))
    return found


def loaded(records: Iterable[Record]) -> list[Record]:
    """All of them. Python's collector, which would look for cycles among them again and again,
    rests meanwhile: a fifth of the time in which a large run is read."""
    resting = gc.isenabled()
    gc.disable()
    try:
        return list(records)
    finally:
        if resting:
            gc.enable()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What the run was asked to compute, and where it ran.

    Raises:
        ValueError: no run there, or a manifest that cannot be read.
    """
    path = Path(folder) / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no run with a readable {MANIFEST}: {error}") from error


def files_hash(*paths: str | Path) -> str:
    """16 hex digits of what is in these files, in order, for a manifest; one that is not there
    counts as empty."""
    found = hashlib.sha256()
    for path in map(Path, paths):
        raw = path.read_bytes() if path.is_file() else b""
        found.update(hashlib.sha256(raw).digest())
    return found.hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Versions and hardware of this process."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    torch = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "versions": versions,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "device": torch.cuda.get_device_name() if torch and cuda else None,
    }


def write_private(path: Path, text: str) -> None:
    """Write a file that its owner alone can read; the whole of it or nothing."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
