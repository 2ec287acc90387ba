"""All that a run needs to go on as if it had never stopped; half a file never counts."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from deepalign_kernels.train.folder import read, write_atomically

FORMAT = 2
NAME = re.compile(r"checkpoint-(\d+)\.pt")


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), path) for path in folder.iterdir() if (m := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `checkpoint-<step>.pt`, then remove all but the newest `keep`."""
    path = folder / f"checkpoint-{step:07d}.pt"
    write_atomically(path, {"format": FORMAT, "step": step, **state})
    for old in checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that is whole. One that is not is passed over, with a warning.

    Raises:
        ValueError: there is none, or one of another version of this library.
    """
    found = checkpoints(folder)
    if not found:
        raise ValueError(f"resume: no checkpoint in {folder}")
    why = None
    for path in reversed(found):
        try:
            state = read(path)
        except ValueError as error:
            why = error
            warnings.warn(f"resume: {error}; taking the one before it", stacklevel=2)
            continue
        if state.get("format") != FORMAT:
            raise ValueError(
                f"resume: {path} has format {state.get('format')}, expected {FORMAT}: finish the"
                " run with the version of this library that began it"
            )
        return path, state
    raise ValueError(f"resume: no checkpoint in {folder} can be read; the oldest: {why}")


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Of torch's generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
