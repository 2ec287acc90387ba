"""Rows of whatever holds training data, one at a time: the data may be larger than memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Row = tuple[Any, str]  # a record as it stands there, and where


def rows_of(data: Any, name: str = "data", keep_broken: bool = False) -> Iterator[Row]:
    """(record, where) of every row.

    Args:
        data: a JSONL file; a Parquet file (.parquet); a folder that `datasets` has saved, or of
            such files, in order of their names; the name of a data set, with its split behind a
            colon if that is not "train" ("owner/name:validation"); a `datasets` object; any
            iterable of records.
        name: the argument to blame.
        keep_broken: a line that is no JSON object is not raised; the `ValueError` that says so
            comes in the place of its record.

    Raises:
        ValueError: no such file or data set, nothing in it, broken JSON or Parquet.
    """
    empty = True
    for row in _rows(data, name, keep_broken):
        empty = False
        yield row
    if empty:
        raise ValueError(f"{name}: {_said(data)}")


def fingerprint(data: Any) -> str | None:
    """A hash of the content of `data`; None if it cannot be had without reading it as training
    does, as of a generator."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(data, (str, Path)) and Path(data).exists():
        for file in _files(Path(data)):
            digest.update(f"{file.name} ".encode())
            with file.open("rb") as opened:
                while block := opened.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()
    if isinstance(data, str):
        data = _load_named("data", data)
    return getattr(data, "_fingerprint", None)


def _said(data: Any) -> str:
    if isinstance(data, (str, Path)):
        return f"{data}: no conversation in this {'folder' if Path(data).is_dir() else 'file'}"
    return "no conversation in this list"


def _rows(data: Any, name: str, keep_broken: bool) -> Iterator[Row]:
    if not isinstance(data, (str, Path)):
        if isinstance(data, Mapping) or not isinstance(data, Iterable):
            raise ValueError(
                f"{name}: expected a path, a data set or records, got {type(data).__name__}"
            )
        return ((row, f"{name}[{index}]") for index, row in enumerate(data))
    path = Path(data)
    if path.is_dir() and any((path / f).is_file() for f in ("state.json", "dataset_dict.json")):
        return _saved(name, path)
    if path.exists():
        return (row for file in _files(path) for row in _rows_of_file(name, file, keep_broken))
    if path.suffix or path.is_absolute() or str(data).startswith("."):
        raise ValueError(f"{name}: {path}: no such file")
    return _named(name, str(data))


def _files(path: Path) -> list[Path]:
    """The file itself, or the data files of a folder."""
    if path.is_file():
        return [path]
    return sorted(f for f in path.rglob("*") if f.suffix in (".jsonl", ".parquet", ".arrow"))


def _rows_of_file(name: str, path: Path, keep_broken: bool) -> Iterable[Row]:
    if path.suffix == ".parquet":
        return _parquet(name, path)
    return read_jsonl(name, path, keep_broken)


def read_jsonl(name: str, path: str | Path, keep_broken: bool = False) -> Iterator[Row]:
    """(object, "file:line") of every line that is not blank; `name` is the argument to blame,
    `keep_broken` as in `rows_of`."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{name}: {path}: no such file")
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                record = _object(raw, "utf-8-sig" if number == 1 else "utf-8", where)
            except ValueError as error:
                if not keep_broken:
                    raise
                record = error
            if record is not None:
                yield record, where


def _object(raw: bytes, encoding: str, where: str) -> Any:
    """The JSON object of a line; None if it is blank."""
    try:
        line = raw.decode(encoding)
        if not line.strip():
            return None
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: broken JSON, column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # thousands of digits or brackets
        raise ValueError(f"{where}: broken JSON: {error}") from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise ValueError(f"{where}: expected one JSON object per line, got a {kind}")
    return record


def _parquet(name: str, path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield record, f"{path}:{number}"
    except pyarrow.ArrowException as error:
        raise ValueError(f"{name}: {path}: not a readable Parquet file: {error}") from error


def _saved(name: str, path: Path) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: {path}: not a readable data set: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        if "train" not in data:
            raise ValueError(f"{name}: {path}: no split 'train' among {', '.join(map(str, data))}")
        data = data["train"]
    return ((row, f"{path}[{index}]") for index, row in enumerate(data))


def _named(name: str, text: str) -> Iterator[Row]:
    return ((row, f"{text}[{index}]") for index, row in enumerate(_load_named(name, text)))


def _load_named(name: str, text: str) -> Any:
    import datasets

    owner, _, split = text.partition(":")
    try:
        return datasets.load_dataset(owner, split=split or "train")
    except Exception as error:  # of many kinds: no such name, no net, no such split
        raise ValueError(
            f"{name}: {text}: no such file, and no data set that can be loaded: {error}"
        ) from error
