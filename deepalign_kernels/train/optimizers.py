"""The optimizer of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from deepalign_kernels.train.config import TrainConfig


def make_optimizer(config: TrainConfig, params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over `params`; only those of two or more dimensions decay."""
    matrices = [p for p in params if p.dim() >= 2]
    vectors = [p for p in params if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=config.adam_betas,
        eps=config.adam_eps,
        fused=params[0].device.type in ("cpu", "cuda"),  # one kernel for all parameters
    )
