"""Held-out data: what the policy has learnt and how far it has moved, by position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepalign_kernels import rules
from deepalign_kernels.data.columns import Batch, TokenTable
from deepalign_kernels.data.examples import IGNORE
from deepalign_kernels.modes import evaluating
from deepalign_kernels.train.config import TrainConfig
from deepalign_kernels.train.forwards import forwards
from deepalign_kernels.train.objective import BatchObjective, TokenParts, beta_of, untrained
from deepalign_kernels.train.ranks import Ranks, is_sharded


def reading(config: TrainConfig, kl: bool) -> BatchObjective:
    """Reads log-probabilities, with `kl` also the divergence from the reference."""
    return BatchObjective(
        "nll",
        config.beta_at,
        head=config.head,
        autocast_dtype=config.autocast_dtype,
        temperature=config.temperature,
        kl_coef=1.0 if kl else 0.0,
        kl_direction=config.kl_direction,
        kl_positions=config.kl_positions,
    )


POSITIONS = 15  # each has its own numbers, as in the paper's figures; later ones share one


class Evaluation:
    """Means over the trained tokens of `table`, in nats.

    Args:
        config: of the run.
        table: with `ref_logp`, if the rule needs a reference and no model runs along.
        ranks: the processes that share the work.
        device: of the model.
    """

    def __init__(
        self, config: TrainConfig, table: TokenTable, ranks: Ranks, device: torch.device
    ) -> None:
        self._config, self._table, self._ranks, self._device = config, table, ranks, device

    def measure(self, model: nn.Module, ref_model: nn.Module | None) -> dict[str, Any]:
        """Log fields: `objective` (as in training, less its constant), `nll`, and lists by position
        1 to 15 and, last, all other trained tokens: `tokens_at`, `nll_at`; with a reference
        `log_ratio_at`, with one in memory, kl_coef or eval_kl `kl_at`; None where there is no such
        token.

        All processes must call.
        """
        config = self._config
        in_memory = ref_model is not None and not is_sharded(ref_model)
        whole = in_memory or config.kl_coef > 0 or config.eval_kl
        reads = reading(config, whole)
        sums = torch.zeros(POSITIONS + 1, 6, dtype=torch.float64, device=self._device)
        with evaluating(model), torch.no_grad():
            table, limits = self._table, config.limits
            rows = sorted(range(len(table)), key=lambda row: -table.lengths[row])
            for each, own in forwards(self._ranks, rows, table.lengths, limits):
                batch = table.batch(each, self._device, table.count(each), limits.packed)
                batch = batch if own else untrained(batch)
                self._add(sums, reads, model, ref_model, batch, whole)
        return self._said(self._ranks.sum(sums).T.tolist(), ref_model, whole)

    def _add(
        self,
        sums: Tensor,
        reads: BatchObjective,
        model: nn.Module,
        ref_model: nn.Module | None,
        batch: Batch,
        whole: bool,
    ) -> None:
        _, parts = reads.loss(model, batch, ref_model if whole else None)
        if ref_model is not None and not whole:
            parts = parts._replace(ref_logp=reads.logp(ref_model, batch))
        elif batch.ref_logp is not None and ref_model is None:
            parts = parts._replace(ref_logp=batch.ref_logp)
        trained = batch.targets != IGNORE
        at = batch.positions[trained].long()
        at = torch.where((at > 0) & (at <= POSITIONS), at - 1, POSITIONS)
        columns = torch.stack(
            [
                torch.ones_like(parts.logp),
                self._objective(parts, batch),
                -parts.logp,
                parts.logp - parts.ref_logp,
                torch.zeros_like(parts.logp) if parts.kl is None else parts.kl,
                trained if parts.anchored is None else parts.anchored,
            ],
            dim=-1,
        )
        sums.index_add_(0, at, columns[trained].double())

    def _objective(self, parts: TokenParts, batch: Batch) -> Tensor:
        """What training minimises, of each token, less what no learning changes."""
        config, about = self._config, rules.objective_of(self._config.rule)
        beta = beta_of(config.beta_at, batch) if about.needs_reference else None
        ref_logp = parts.ref_logp if about.needs_reference else None
        each, _ = rules.run(about.name, config.min_weight, parts.logp, ref_logp, beta)
        if config.rule == "exact" and beta is not None:
            same, _ = rules.run(about.name, 0.0, parts.logp, parts.logp, beta)
            each = each - same
        return each if parts.kl is None else each + config.kl_coef * parts.kl

    def _said(
        self, columns: list[list[float]], ref_model: nn.Module | None, whole: bool
    ) -> dict[str, Any]:
        count, objective, nll, ratio, kl, anchored = columns
        total = max(sum(count), 1.0)

        def at(values: list[float], of: list[float] = count) -> list[float | None]:
            return [v / n if n else None for v, n in zip(values, of, strict=True)]

        out = {
            "objective": sum(objective) / total,
            "nll": sum(nll) / total,
            "tokens_at": [int(n) for n in count],
            "nll_at": at(nll),
        }
        if ref_model is not None or self._table.ref_logp is not None:
            out["log_ratio_at"] = at(ratio)
        if whole:
            out["kl_at"] = at(kl, anchored)
        return out
