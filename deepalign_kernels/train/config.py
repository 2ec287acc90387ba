"""Every choice of a training run, checked when it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from deepalign_kernels import check, rules
from deepalign_kernels.data.examples import ORIGINS, TOO_LONG
from deepalign_kernels.losses import BetaSchedule

# Names of this level; any other is a rule of rules.py.
OBJECTIVES = {"sft": "nll", "constrained": "exact"}
REFERENCES = ("precomputed", "frozen")
SCHEDULES = ("linear", "cosine", "constant")
HEADS = ("fused", "logits")
# What may differ between a run and its continuation without changing a single weight.
FREE_TO_CHANGE = ("output_dir", "save_every", "keep_checkpoints", "log_every", "progress")

Schedule = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the paper's for constrained fine-tuning (arXiv 2406.05946).

    Args:
        output_dir: folder of the log, the checkpoints and the reference cache; made when training
            starts.
        objective: "constrained" (equation 3), "sft" (cross-entropy), another rule by name, or a
            function of (logp, ref_logp, beta): see `deepalign_kernels.rules`.
        beta: positions [...] -> beta [...], or one number for every position. A rule without a
            reference, such as "sft", does not use it; its `prefix_length` still
            divides the logged positions into groups.
        reference: "precomputed": one number per trained token, taken before the first step;
            "frozen": a copy of the model, or `ref_model`, that runs along with every batch. Rules
            that need no reference get none. "precomputed" keeps the data of all epochs if they
            differ.
        head: where the losses are computed. "fused": inside the model's own output head
            (`hf.attach`), so the logits are never whole in memory; a model that `attach` does not
            take is refused. "logits": from the model's whole logits, for any module that has them.
            The two differ by rounding, of 16-bit models by that of their logits.
        position_origin: where a response begins to count: at its "content", behind what the chat
            template itself puts there (an empty think block, a channel header), or at the start of
            its "span".
        learning_rate: peak, reached after `warmup_steps`.
        lr_schedule: "linear" or "cosine" bring the rate to 0 at the end, "constant" holds it.
        warmup_steps: steps of linear warm-up. As in transformers, the first of several has rate 0.
        batch_size: conversations per forward.
        gradient_accumulation_steps: forwards per optimizer step.
        epochs: rounds through the data; without this and max_steps, one. Not both.
        max_steps: optimizer steps, instead of epochs.
        adam_betas: of AdamW; the paper has 0.5 and 0.999.
        adam_eps: of AdamW.
        weight_decay: decoupled, on parameters with two or more dimensions.
        max_grad_norm: 2-norm to which the gradient is clipped; None leaves it as it is.
        max_length: tokens per conversation; None asks the model's config.
        on_too_long: "error" refuses a longer one, "drop" leaves it out, "truncate" keeps its
            beginning.
        autocast_dtype: "bfloat16" runs the forward in it. Keep the weights in fp32: a step at a
            rate of 2e-5 is mostly below the resolution of bf16 weights.
        gradient_checkpointing: recompute activations in the backward.
        seed: of data order and dropout; nothing outside the run depends on it.
        save_every: steps between checkpoints; None keeps none, but for a run that is interrupted.
        keep_checkpoints: how many of the newest stay.
        log_every: steps that one line of the log sums up; the only time the loop waits for the
            device.
        progress: a line on the terminal with the step and the loss.

    Raises:
        ValueError: naming the field.
    """

    output_dir: str | Path
    objective: str | rules.Rule = "constrained"
    beta: BetaSchedule | Schedule | float = field(default_factory=BetaSchedule)
    reference: str = "precomputed"
    head: str = "fused"
    position_origin: str = "content"
    learning_rate: float = 2e-5
    lr_schedule: str = "linear"
    warmup_steps: int = 10
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    epochs: int | None = None
    max_steps: int | None = None
    adam_betas: tuple[float, float] = (0.5, 0.999)
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    max_length: int | None = None
    on_too_long: str = "error"
    autocast_dtype: Any = None
    gradient_checkpointing: bool = False
    seed: int = 0
    save_every: int | None = None
    keep_checkpoints: int = 2
    log_every: int = 1
    progress: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (
            ("reference", REFERENCES),
            ("lr_schedule", SCHEDULES),
            ("head", HEADS),
            ("position_origin", ORIGINS),
            ("on_too_long", TOO_LONG),
        ):
            check.one_of(name, getattr(self, name), allowed)
        if isinstance(self.objective, str):
            check.one_of("objective", self.objective, (*OBJECTIVES, *rules.RULES))
        rules.objective_of(self.rule)
        for name in ("batch_size", "gradient_accumulation_steps", "keep_checkpoints", "log_every"):
            _integer(name, getattr(self, name), 1)
        for name in ("epochs", "max_steps", "max_length", "save_every"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 1)
        _integer("warmup_steps", self.warmup_steps, 0)
        _integer("seed", self.seed, 0)
        check.number("learning_rate", self.learning_rate, above=0.0)
        check.number("adam_eps", self.adam_eps, above=0.0)
        check.number("weight_decay", self.weight_decay, low=0.0)
        if self.max_grad_norm is not None:
            check.number("max_grad_norm", self.max_grad_norm, above=0.0)
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(
                f"epochs, max_steps: give one of the two, got {self.epochs} and {self.max_steps}"
            )
        if self.epochs is None and self.max_steps is None:
            object.__setattr__(self, "epochs", 1)
        self._check_composites()

    def _check_composites(self) -> None:
        betas = self.adam_betas
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"adam_betas: expected two numbers, got {betas!r}")
        for beta in betas:
            check.number("adam_betas", beta, low=0.0, below=1.0)
        object.__setattr__(self, "adam_betas", tuple(map(float, betas)))
        if not callable(self.beta):
            check.number("beta", self.beta, low=0.0)
            object.__setattr__(self, "beta", BetaSchedule.uniform(float(self.beta)))
        dtype = self.autocast_dtype
        if dtype not in (None, "bfloat16", torch.bfloat16):
            raise ValueError(f"autocast_dtype: expected None or 'bfloat16', got {dtype!r}")
        object.__setattr__(self, "autocast_dtype", None if dtype is None else torch.bfloat16)

    def beta_at(self, positions: Tensor) -> Tensor:
        """beta [...] at positions [...]."""
        return cast(Schedule, self.beta)(positions)

    @property
    def rule(self) -> str | rules.Rule:
        """`objective` as `rules.objective_of` takes it."""
        objective = self.objective
        return OBJECTIVES.get(objective, objective) if isinstance(objective, str) else objective

    @property
    def needs_reference(self) -> bool:
        """Whether the rule compares with a reference model."""
        return rules.objective_of(self.rule).needs_reference

    @property
    def prefix_length(self) -> int:
        """Last position of the second group of positions in the log."""
        return getattr(self.beta, "prefix_length", 5)

    @property
    def step_size(self) -> int:
        """Conversations in one optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the log and the checkpoints."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        beta = self.beta
        out["beta"] = (
            asdict(beta) if is_dataclass(beta) and not isinstance(beta, type) else repr(beta)
        )
        if not isinstance(self.objective, str):
            out["objective"] = getattr(self.objective, "__qualname__", repr(self.objective))
        out["output_dir"] = str(self.output_dir)
        out["adam_betas"] = list(self.adam_betas)
        out["autocast_dtype"] = self.autocast_dtype and str(self.autocast_dtype).removeprefix(
            "torch."
        )
        return out


def _integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")
