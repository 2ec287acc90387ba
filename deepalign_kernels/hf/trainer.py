"""The constrained loss in transformers' own Trainer, inside the model's head: a mixin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepalign_kernels.hf.attach import attach
from deepalign_kernels.hf.head import IGNORE
from deepalign_kernels.hf.loss_function import compute_loss
from deepalign_kernels.hf.losses import ConstrainedLoss
from deepalign_kernels.losses import BetaSchedule
from deepalign_kernels.rules import Rule

# What a row has beside input_ids and labels, and what stands there in padding; what rows have of
# data in which a message has a weight, or a conversation a beta_scale.
COLUMNS = {"response_positions": 0, "ref_logp": 0.0}
RARE = {"token_weights": 0.0, "beta_scales": 1.0}
PADDING = {"input_ids": 0, "labels": IGNORE, **COLUMNS, **RARE}


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows of `train.constrained_rows` as one batch, padded on the right.

    Args:
        rows: each with input_ids, labels, response_positions, ref_logp of one length; perhaps with
            token_weights and beta_scales.

    Returns:
        The same names [B, T], and attention_mask. Padding has id 0, which no attention sees.
    """
    out: dict[str, Tensor] = {}
    for name, filler in PADDING.items():
        if name in rows[0]:
            parts = [torch.as_tensor(row[name]) for row in rows]
            out[name] = torch.nn.utils.rnn.pad_sequence(parts, True, filler)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    out["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return out


def loss_of(
    batch: dict[str, Any],
    beta: Callable[[Tensor], Tensor] | None = None,
    objective: str | Rule = "exact",
) -> tuple[ConstrainedLoss, dict[str, Any]]:
    """The loss of a batch of `collate`, and what of the batch the model takes: for any loop,

        loss, inputs = hf.loss_of(batch)
        hf.compute_loss(model, loss, **inputs).loss.backward()

    Args:
        batch: see `collate`.
        beta: response positions -> beta; None: the paper's schedule.
        objective: as in `ConstrainedLoss`.
    """
    loss = ConstrainedLoss(
        beta=scaled_beta(batch, beta or BetaSchedule()),
        ref_logp=batch["ref_logp"],
        objective=objective,
        weights=batch.get("token_weights"),
    )
    return loss, {k: v for k, v in batch.items() if k not in (*COLUMNS, *RARE)}


def scaled_beta(batch: dict[str, Any], beta: Callable[[Tensor], Tensor]) -> Tensor:
    """beta [B, T] of the labels: by position, times what their conversation says."""
    scales, by_position = batch.get("beta_scales"), beta(batch["response_positions"])
    return by_position if scales is None else by_position * scales


def weight_of(batch: dict[str, Any]) -> Tensor:
    """What the trained tokens of a batch weigh in all, 0-d: their number, unless it has
    token_weights. The sum of it over accumulation steps and processes is `num_items_in_batch`."""
    trained = batch["labels"][:, 1:] != IGNORE
    weights = batch.get("token_weights")
    return trained.sum() if weights is None else (weights[:, 1:] * trained).sum()


class WeighingSteps:
    """Of a Trainer: a step's `num_items_in_batch` is what its trained tokens weigh, where rows have
    token_weights. transformers counts tokens, which is right where each weighs 1."""

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """See transformers."""
        above: Any = super()
        own: Any = self
        batches, count = above.get_batch_samples(epoch_iterator, num_batches, device)
        if count is None or not batches or "token_weights" not in batches[0]:
            return batches, count
        total = torch.stack([weight_of(batch) for batch in batches]).sum().to(device)
        if own.args.average_tokens_across_devices and own.args.world_size > 1:
            total = torch.as_tensor(own.accelerator.gather(total)).sum()
        return batches, total


class ConstrainedMixin(WeighingSteps):
    """`class Mine(hf.ConstrainedMixin, Trainer)`: a Trainer of transformers whose loss is the
    constrained one, computed inside the model's own head.

    Its rows come from `train.constrained_rows`; accumulation, several devices, PEFT, evaluation and
    checkpoints are the Trainer's. A Trainer with a `compute_loss` of its own is none for this.

    Args:
        beta: response positions -> beta; None: the paper's schedule.
        objective: as in `ConstrainedLoss`.

    All else is the Trainer's.

    Raises:
        ValueError: `compute_loss_func` is given, which would take the place of this loss.
    """

    def __init__(
        self,
        *arguments: Any,
        beta: Callable[[Tensor], Tensor] | None = None,
        objective: str | Rule = "exact",
        **options: Any,
    ) -> None:
        if options.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: not with a loss of this library's own")
        if len(arguments) < 3:  # model, args, data_collator
            options.setdefault("data_collator", collate)
        super().__init__(*arguments, **options)
        own: Any = self
        self._beta, self._objective = beta, objective
        own.model_accepts_loss_kwargs = True  # the loss is divided by the tokens of a whole step
        attach(own.model)

    def _set_signature_columns_if_needed(self) -> None:
        own: Any = super()
        own._set_signature_columns_if_needed()
        self._signature_columns = [*{*(self._signature_columns or ()), *COLUMNS, *RARE}]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """See transformers."""
        if missing := COLUMNS.keys() - inputs.keys():
            raise ValueError(
                f"train_dataset: no column {min(missing)}; rows come from"
                " deepalign_kernels.train.constrained_rows"
            )
        own: Any = self
        loss, batch = loss_of(inputs, self._beta, self._objective)
        out = compute_loss(model, loss, **batch, num_items_in_batch=num_items_in_batch)
        value = out.loss
        assert value is not None
        if own.args.average_tokens_across_devices and num_items_in_batch is not None:
            value = value * own.accelerator.num_processes
        if not return_outputs:
            return value
        with torch.no_grad():
            return value, model(**batch)
