"""How a run is saved and found again: the half of `TrainingRun` that is about its checkpoints."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepalign_kernels.data.source import Source
from deepalign_kernels.train import checkpoint as ckpt
from deepalign_kernels.train import folder as folders
from deepalign_kernels.train.config import TrainConfig
from deepalign_kernels.train.identity import differences, frozen_hash, identity
from deepalign_kernels.train.log import Meter
from deepalign_kernels.train.ranks import Ranks
from deepalign_kernels.train.reference import Reference
from deepalign_kernels.train.session import seed_of
from deepalign_kernels.train.state import (
    all_finite,
    full_state,
    load_trained,
    optimizer_state,
    trained_state,
)

BEST = "best.pt"


class Resumable:
    """What `TrainingRun` has at hand, and what it does with its folder."""

    model: nn.Module
    tokenizer: Any
    config: TrainConfig
    folder: Path
    device: torch.device
    ranks: Ranks
    source: Source
    reference: Reference
    optimizer: torch.optim.Optimizer
    warmup_steps: int
    step: int
    metrics: dict[str, Any]
    step0_max_log_ratio: float | None
    best: dict[str, Any] | None
    eval_reference_keys: list[str]
    _meter: Meter
    _rng: Any
    _frozen: str | None = None  # hash of what is not trained, once it was asked for

    def _own_folder(self, stack: contextlib.ExitStack, resume: bool | str) -> None:
        """In the first process: nobody else in the folder, and no run that is not to go on."""
        if resume is not True or self.folder.is_dir():
            stack.enter_context(folders.owned(self.folder))
        if not resume and ckpt.checkpoints(self.folder):
            raise ValueError(
                f"output_dir: {self.folder} holds the checkpoints of a run; resume it, remove them,"
                " or choose another folder"
            )

    def _state_to_resume(self, resume: bool | str) -> dict[str, Any] | None:
        found: dict[str, Any] = {}

        def look() -> Path | None:
            if not resume or (resume == "auto" and not ckpt.checkpoints(self.folder)):
                return None
            path, state = ckpt.load_newest(self.folder)
            if why := differences(state["identity"], self._identity()):
                raise ValueError(f"resume: {path} comes from {why}")
            found.update(state)
            return path

        path = self.ranks.first(look)
        return None if path is None else found or folders.read(path, verify=False)

    def _identity(self) -> dict[str, Any]:
        if self._frozen is None:
            self._frozen = frozen_hash(self.model)
        table, model = self.source.table(0), self.model
        parts = self.config, table, model, self._frozen, self.ranks.count
        return identity(*parts, self.warmup_steps)

    def _rng_of(self, states: list[Any]) -> Any:
        """This process's of a checkpoint; with another number of processes new ones."""
        if len(states) == self.ranks.count:
            return states[self.ranks.rank]
        torch.manual_seed(seed_of(self.config.seed, self.ranks.rank, self.step))
        return ckpt.rng_state(self.device)

    def _must_be_finite(self, name: str, value: float) -> None:
        if math.isfinite(value):
            return
        found = ckpt.checkpoints(self.folder)
        last = f"the last checkpoint is {found[-1].name}" if found else "there is no checkpoint"
        raise FloatingPointError(f"step {self.step}: {name} is {value}; the run is stopped, {last}")

    def save_checkpoint(self) -> Path:
        """Write the state after the last complete step to `output_dir`; callbacks may call this.

        Raises:
            FloatingPointError: a loss since the last line of the log, or a weight, is not finite.
            OSError: no room.
        """
        sums = self._meter.total(self.ranks)
        self._must_be_finite("objective", sums[-1, 0].item())
        self._must_be_finite("grad_norm", sums[-1, 1].item())
        if self.ranks.largest(float(not all_finite(self.model))):
            self._must_be_finite("a weight", math.nan)
        state = {
            "identity": self._identity(),
            "reference": self.reference.keys,
            "model": trained_state(self.model),
            "optimizer": optimizer_state(self.optimizer, self.model),
            "meter": sums.cpu(),
            "rng": self.ranks.gather(self._rng),
            "metrics": self.metrics,
            "eval_reference": self.eval_reference_keys,
            "best": self.best,
            "step0_max_log_ratio": self.step0_max_log_ratio,
        }
        keep = self.config.keep_checkpoints
        return self.ranks.first(lambda: ckpt.save(self.folder, self.step, state, keep))

    def save_best(self) -> None:
        """Write what is trained to best.pt, with the evaluation that chose it."""
        state = {"format": ckpt.FORMAT, "eval": self.best, "model": trained_state(self.model)}
        self.ranks.first(lambda: folders.write_atomically(self.folder / BEST, state))

    def load_best(self) -> dict[str, Any]:
        """Put the weights of the best evaluation into `model`; all processes must call.

        Returns:
            That evaluation, with its step.

        Raises:
            ValueError: there was no evaluation, or the file is damaged.
        """
        path = self.folder / BEST
        if not path.is_file():
            raise ValueError(f"eval_data: no evaluation in {self.folder} that could be the best")
        state = folders.read(path)
        load_trained(self.model, state["model"])
        return state["eval"]

    def save_model(self, folder: str | Path) -> None:
        """Write `model`, put together, and the tokenizer to `folder`; all processes must call."""
        state = full_state(self.model)
        parts: tuple[Any, Any] = self.model, self.tokenizer

        def write() -> None:
            parts[0].save_pretrained(folder, state_dict=state)
            parts[1].save_pretrained(folder)

        self.ranks.first(write)
