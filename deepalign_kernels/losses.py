"""Maths on vectors of token values, in plain torch: beta schedule, positions, reductions.

Nothing here touches a [T, V] tensor, so nothing here needs a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from deepalign_kernels import check
from deepalign_kernels.ops._reduce import scale_of_sum, scaled_sum
from deepalign_kernels.ops._register import accumulator


@dataclass(frozen=True)
class BetaSchedule:
    """beta_t of the constrained loss by response position (arXiv 2406.05946, section 4.1).

    The paper's values are the defaults. 0 is plain cross-entropy.

    Args:
        first: beta of the first token of a response.
        prefix: beta of tokens 2 to `prefix_length`.
        rest: beta of later tokens, and of trained tokens that are in no response.
        prefix_length: tokens of the second group end here.
        table: in place of all these, beta of token 1, 2, ...; the last one is that of later tokens
            too, and of trained tokens that are in no response.

    Raises:
        ValueError: a negative or non-finite beta, a negative prefix_length, a table that is empty
            or stands beside another choice.
    """

    first: float = 0.5
    prefix: float = 2.0
    rest: float = 0.1
    prefix_length: int = 5
    table: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.table is not None:
            self._check_table(self.table)
        for name in ("first", "prefix", "rest"):
            check.number(name, getattr(self, name), low=0.0)
        if (
            isinstance(self.prefix_length, bool)
            or not isinstance(self.prefix_length, int)
            or self.prefix_length < 0
        ):
            raise ValueError(f"prefix_length: expected an int >= 0, got {self.prefix_length!r}")

    def _check_table(self, table: object) -> None:
        if not isinstance(table, (list, tuple)) or not table:
            raise ValueError(f"table: expected betas of token 1, 2, ..., got {table!r}")
        for at, beta in enumerate(table, 1):
            check.number(f"table, token {at}", beta, low=0.0)
        plain = {f.name: f.default for f in fields(self) if f.name != "table"}
        if other := [name for name, value in plain.items() if getattr(self, name) != value]:
            raise ValueError(
                f"table: it says beta of every token, so {', '.join(other)} cannot be given too"
            )
        object.__setattr__(self, "table", tuple(map(float, table)))

    @classmethod
    def uniform(cls, beta: float) -> BetaSchedule:
        """One beta at every position (the ablation of Table 8)."""
        return cls(first=beta, prefix=beta, rest=beta)

    def __call__(self, positions: Tensor) -> Tensor:
        """positions [...] int, 1-based, 0 = not in a response -> beta [...] fp32 (0: `rest`, or the
        table's last)."""
        check.tensor("positions", positions)
        if positions.is_floating_point() or positions.dtype == torch.bool:
            raise ValueError(
                f"positions: expected an integer tensor, got {check.describe(positions)}"
            )
        if self.table is not None:
            betas = torch.tensor(self.table, dtype=torch.float32)
            last = len(self.table)
            at = torch.where(positions >= 1, positions.clamp(max=last), last).long() - 1
            return betas.to(positions.device, non_blocking=True)[at]
        in_prefix = (positions >= 1) & (positions <= self.prefix_length)
        beta = torch.where(in_prefix, self.prefix, self.rest)
        return torch.where(in_prefix & (positions == 1), self.first, beta).to(torch.float32)


def response_positions(
    labels: Tensor, *, ignore_index: int = -100, position_ids: Tensor | None = None
) -> Tensor:
    """1-based position of each trained token inside its own response; 0 where nothing is trained.

    A response is a run of consecutive trained tokens. Counting restarts at every run (every
    assistant turn) and, with `position_ids`, at every packed document (where the ids do not go on
    by one), so two documents that touch without a prompt in between stay apart.

    Compute this when a conversation is tokenised and pack it along with the tokens: after
    truncation or packing that cuts a response in two, the second half would count from 1 again.

    Args:
        labels: [T] or [B, T] integers, `ignore_index` where nothing is trained.
        ignore_index: the label that marks a token that is not trained.
        position_ids: same shape, or None.

    Returns:
        int64, the shape of `labels`.

    Raises:
        ValueError: labels that are not integer or not [T] or [B, T], position_ids of another shape.
    """
    check.tensor("labels", labels)
    check.index("ignore_index", ignore_index)
    if labels.dim() not in (1, 2) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels: expected integers [T] or [B, T], got {check.describe(labels)}")
    if position_ids is not None and (
        not isinstance(position_ids, Tensor) or position_ids.shape != labels.shape
    ):
        raise ValueError(
            f"position_ids: expected the shape of labels, {tuple(labels.shape)}, "
            f"got {check.describe(position_ids)}"
        )
    trained = labels != ignore_index
    start = torch.ones_like(trained)
    start[..., 1:] = ~trained[..., :-1]
    if position_ids is not None:
        start[..., 1:] |= position_ids[..., 1:] != position_ids[..., :-1] + 1
    count = trained.cumsum(-1)
    before = torch.where(trained & start, count - 1, torch.zeros_like(count)).cummax(-1).values
    return torch.where(trained, count - before, torch.zeros_like(count))


def reduce_tokens(
    values: Tensor,
    valid: Tensor,
    *,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Reduce per-token losses as `constrained_loss` does: for losses put together from other ops.

    Args:
        values: [...] float, 0 where not valid (as all ops of this package give).
        valid: [...] bool, the tokens that count for "mean".
        reduction: "mean", "sum" or "none". Without a valid token the result is 0, not NaN.
        normalizer: for "mean", a number > 0 or a 0-d tensor: the token count over all accumulation
            steps and ranks.

    Returns:
        [...] as `values` for "none", else 0-d fp32 (fp64 for fp64 values), counted and summed in
        that dtype.

    Raises:
        ValueError: no tensors, shapes that differ, a mask that is not bool, an unknown reduction, a
            wrong normalizer.
    """
    check.tensor("values", values)
    if not values.is_floating_point():
        raise ValueError(f"values: expected a float tensor, got {check.describe(values)}")
    if not isinstance(valid, Tensor) or valid.shape != values.shape or valid.dtype != torch.bool:
        raise ValueError(f"valid: expected bool {tuple(values.shape)}, got {check.describe(valid)}")
    wide = accumulator(values.dtype)
    scale = scale_of_sum(valid, reduction, normalizer, wide)
    return values if reduction == "none" else scaled_sum(values.to(wide), scale)
