"""All that a run needs to go on as if it had never stopped; half a file never counts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from deepalign_kernels.train.config import FREE_TO_CHANGE
from deepalign_kernels.train.reference import write_atomically

FORMAT = 1
NAME = re.compile(r"checkpoint-(\d+)\.pt")


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
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


def load(path: Path, config: dict[str, Any], data_hash: str) -> dict[str, Any]:
    """The state in `path`, after checking that it belongs to this configuration and this data.

    Raises:
        ValueError: an unreadable file, another configuration, other data.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        known = state["format"] == FORMAT
    except Exception as error:
        raise ValueError(
            f"resume: {path} is not a readable checkpoint (remove it, and resume"
            f" takes the one before it, if any): {error}"
        ) from error
    if not known:
        raise ValueError(f"resume: {path} has format {state['format']}, expected {FORMAT}")
    then, now = (
        {k: v for k, v in c.items() if k not in FREE_TO_CHANGE} for c in (state["config"], config)
    )
    if changed := [k for k in now if then.get(k) != now[k]]:
        was = ", ".join(f"{k} was {then.get(k)!r}, is {now[k]!r}" for k in changed)
        raise ValueError(f"resume: {path} comes from another configuration: {was}")
    if state["data"] != data_hash:
        raise ValueError(f"resume: {path} comes from other training data than data gives now")
    return state


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
