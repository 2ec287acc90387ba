"""All that a run needs to go on as if it had never stopped; half a file never counts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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


def trained_state(model: nn.Module) -> dict[str, Any]:
    """The state dict without parameters that are not trained: of LoRA, the adapter alone."""
    frozen = {
        name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad
    }
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def load_trained(model: nn.Module, state: dict[str, Any]) -> None:
    """Put what `trained_state` gave back.

    Raises:
        ValueError: another set of names.
    """
    expected = trained_state(model).keys()
    if odd := sorted(expected ^ state.keys()):
        raise ValueError(
            f"resume: the checkpoint and the parameters that model trains differ, first in {odd[0]}"
        )
    model.load_state_dict(state, strict=False)


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """The optimizer's state dict with names of parameters in the place of numbers."""
    state = optimizer.state_dict()
    names = list(_names(optimizer, model))
    return {
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Any]
) -> None:
    """Put what `optimizer_state` gave back."""
    numbers = {name: number for number, name in enumerate(_names(optimizer, model))}
    optimizer.load_state_dict(
        {
            "state": {numbers[name]: values for name, values in state["state"].items()},
            "param_groups": [
                {**group, "params": [numbers[name] for name in group["params"]]}
                for group in state["param_groups"]
            ],
        }
    )


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[str]:
    """Of the optimizer's parameters, in the order of its state dict's numbers."""
    named = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            yield named[id(p)]


def all_finite(model: nn.Module) -> bool:
    """Whether no trained parameter holds a NaN or an infinity."""
    every = [p for p in model.parameters() if p.requires_grad]
    return all(bool(_local(p).isfinite().all()) for p in every)


def _local(x: Tensor) -> Tensor:
    """This process's part of a sharded tensor."""
    return x.to_local() if hasattr(x, "to_local") else x  # type: ignore[operator]


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
