"""The folder of a run: one run at a time, whole files only, and no rubble of killed ones."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LOCK = ".lock"
# What a write leaves when its process is killed: `.<name>.<process>`.
PARTS = re.compile(r"\.(checkpoint-.+|best.pt|reference-.+|train_log.*\.jsonl)\.\d+")


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """`folder`, made if need be, belongs to this process in the block; what killed writes left in
    it is removed.

    Raises:
        ValueError: it is no folder, or another run is in it. The lock is the operating system's and
            goes with the process that holds it, however that ends.
    """
    from filelock import FileLock, Timeout  # torch itself depends on it

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"output_dir: expected a folder, {folder} is a file") from error
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"output_dir: another run is in {folder}; wait for its end or choose another folder"
        ) from error
    try:
        for path in folder.iterdir():
            if PARTS.fullmatch(path.name):
                path.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def write_atomically(path: Path, value: object) -> None:
    """torch.save that leaves either the whole file, on the disk, or none.

    Raises:
        OSError: no room for it; the message says how much is missing and what is still there.
    """
    free, need = shutil.disk_usage(path.parent).free, size_of(value)
    if free < need:
        raise _no_room(path, need, free)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch's writer hides the reason: "unexpected pos 2286976 vs 2286864".
        written = part.stat().st_size if part.exists() else 0
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or shutil.disk_usage(path.parent).free < need - written:
            raise _no_room(path, need, free) from error
        raise
    finally:
        part.unlink(missing_ok=True)


def read(path: Path, verify: bool = True) -> Any:
    """What `write_atomically` wrote, mapped from the disk rather than read into memory; `verify`:
    after a look at its checksums.

    Raises:
        ValueError: not such a file, or its bytes are not those that were written: torch.load does
            not look at the checksums in it.
    """
    try:
        if verify:
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged} in it is wrong")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch and pickle raise whatever they like on damaged bytes
        raise ValueError(f"{path} is not a readable file of a run: {error}") from error


def size_of(value: Any) -> int:
    """Bytes of the tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(size_of, value.values()))
    return sum(map(size_of, value)) if isinstance(value, (list, tuple)) else 0


def _sync_folder(folder: Path) -> None:
    """The new name, too, outlives a power cut. Only POSIX can open a folder."""
    with contextlib.suppress(PermissionError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _no_room(path: Path, need: int, free: int) -> OSError:
    return OSError(
        errno.ENOSPC,
        f"no room for {path.name}: it takes {need / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free in"
        f" {path.parent}. Nothing that was there is lost; make room, then resume",
    )
