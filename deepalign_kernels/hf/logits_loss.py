"""The constrained loss from logits, in the shape in which the Hugging Face Trainer calls a loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deepalign_kernels import ops
from deepalign_kernels.hf.head import IGNORE
from deepalign_kernels.hf.losses import MustRun
from deepalign_kernels.losses import BetaSchedule, response_positions


class LogitsLoss(MustRun):
    """`hf.install(model, LogitsLoss(beta=...))`: `outputs.loss` becomes `dak.constrained_loss`.

    Works wherever a model's own `loss` is used: Trainer, or any loop that reads `outputs.loss`; not
    under trl's SFTTrainer, which computes its own (`install` raises there). It makes no copy of the
    logits but needs them whole; `attach` is the way without them. Columns of the batch reach it
    through the model's call, so TrainingArguments(remove_unused_columns=False):

        ref_logp [B, T] float: log-probs of the labels under the reference, in nats (0 at the first
            token of a row); required.
        response_positions [B, T] int: for a schedule. Without it they are counted from the labels,
            which is wrong for packed rows.

    The sum is divided by `num_items_in_batch` where the Trainer hands it over, else by the number
    of trained tokens. (`Trainer(compute_loss_func=f)` gives `f` the outputs and labels but no other
    column, so it can serve `dak.token_logp`, not a loss with a reference.)

    Args:
        beta: a number >= 0, or a BetaSchedule.
        options: passed on to `dak.constrained_loss` (objective, min_weight, temperature).

    Raises:
        ValueError: no labels, no ref_logp, or one of another shape than the labels.
    """

    def __init__(self, *, beta: float | BetaSchedule, **options: Any):
        self.beta, self.options = beta, options
        self.ran = False

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        *,
        num_items_in_batch: int | Tensor | None = None,
        shift_labels: Tensor | None = None,
        ref_logp: Tensor | None = None,
        response_positions: Tensor | None = None,
        **_unused: Any,
    ) -> Tensor:
        """logits [B, T, V], labels [B, T] -> 0-d. With shift_labels, columns come shifted too."""
        self.ran = True
        target = labels if shift_labels is None else shift_labels
        if target is None or ref_logp is None:
            raise ValueError(
                "labels, ref_logp: both must be in the batch, under these names; is"
                " TrainingArguments(remove_unused_columns=False) set?"
            )
        if ref_logp.shape != target.shape:
            raise ValueError(
                f"ref_logp: expected {tuple(target.shape)}, the shape of the labels, got"
                f" {tuple(ref_logp.shape)}"
            )
        beta: float | Tensor = self._beta(target, response_positions)
        if shift_labels is None:
            logits, target, ref_logp = logits[:, :-1], target[:, 1:], ref_logp[:, 1:]
            beta = beta[:, 1:] if isinstance(beta, Tensor) else beta
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(logits.device)
        loss = ops.constrained_loss(
            logits,
            target.to(logits.device),
            beta=beta,
            ref_logp=ref_logp.to(logits.device),
            ignore_index=IGNORE,
            normalizer=num_items_in_batch,
            **self.options,
        )
        assert isinstance(loss, Tensor)  # not with return_parts
        return loss

    def _beta(self, target: Tensor, positions: Tensor | None) -> float | Tensor:
        if not isinstance(self.beta, BetaSchedule):
            return self.beta
        return self.beta(response_positions(target) if positions is None else positions)
