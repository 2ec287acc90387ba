"""Names of before, which still work. `deepalign_kernels.trl` has classes of the same two names, for
TRL's trainer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from deepalign_kernels.train.config import TrainConfig
from deepalign_kernels.train.loop import Callback, TrainingRun


class ConstrainedSFTConfig(TrainConfig):
    """`TrainConfig` under its name of before."""

    def __post_init__(self) -> None:
        _warn("ConstrainedSFTConfig", "TrainConfig", frames=1)  # the dataclass's own __init__
        super().__post_init__()


class ConstrainedSFTTrainer(TrainingRun):
    """`TrainingRun` under its name of before, with `data` as `train_data`."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: TrainConfig,
        train_data: Any,
        ref_model: nn.Module | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        _warn("ConstrainedSFTTrainer", "fit or TrainingRun", frames=0)
        super().__init__(model, tokenizer, config, train_data, ref_model, callbacks)


def _warn(old: str, new: str, *, frames: int) -> None:
    """`frames` stand between the class and the line that uses it, which the warning shows."""
    warnings.warn(
        f"deepalign_kernels.train.{old} is now {new}; for TRL's trainer there is "
        f"deepalign_kernels.trl.{old}",
        DeprecationWarning,
        stacklevel=3 + frames,
    )
