"""What a fine-tuning has done so far, step by step; in a folder that survives a kill."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deepalign_kernels.runs.journal import Journal, read_journal
from deepalign_kernels.runs.record import Record


class Kept:
    """Records by step, in the order in which they were added; a context manager.

    Args:
        folder: made if it is not there; None keeps everything in memory alone.

    Attributes:
        records: all of them.
        training: folder for the trainer's own files.
    """

    def __init__(self, folder: Path | None) -> None:
        self._temporary = tempfile.TemporaryDirectory() if folder is None else None
        root = Path(self._temporary.name) if self._temporary else Path(folder or "")
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.training = str(root / "training")
        self._journal = Journal(root / "records.jsonl")
        self.records: list[Record] = list(read_journal(root / "records.jsonl"))

    def has(self, step: int | str) -> bool:
        """Whether the records of a step are there."""
        return str(step) in self._journal.units

    def add(self, step: int | str, records: Sequence[Record]) -> None:
        """Keep the records of a step."""
        self._journal.commit(str(step), records)
        self.records += records

    def drop_training(self) -> None:
        """Delete the trainer's files: checkpoints are large."""
        shutil.rmtree(self.training, ignore_errors=True)

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()
        if self._temporary is not None:
            self._temporary.cleanup()
