"""A vocabulary cut into shards over a process group: what is checked, and the one exchange.

Every rank reads its own columns with the kernels of the plain ops, and then the ranks show each
other what they found: a few numbers per row and rank, in one all-gather. From those every rank
computes the same results (`merge.py`), so no rank has to tell another one anything in the
backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from deepalign_kernels import check

# What a shard calls the targets that have no column in it. A column is 0 or above, so neither can
# be mistaken for one, whatever `ignore_index` is.
IGNORED, ELSEWHERE = -1, -2

if dist.is_available():
    # The functional collectives are the ones that torch.compile traces.
    import torch.distributed._functional_collectives as funcol

    # torch 2.13 renamed it
    _all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor


def all_gather(x: Tensor, group: Any) -> Tensor:
    """[a, ...] of every rank as [ranks * a, ...]"""
    return funcol.wait_tensor(_all_gather(x.contiguous(), 0, group))


def all_reduce(x: Tensor, group: Any) -> Tensor:
    """The sum over the ranks."""
    return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), "sum", group))


class Shard(NamedTuple):
    """This rank's columns of the vocabulary."""

    group: Any  # ProcessGroup
    ranks: int
    columns: int
    start: int | None  # None: the shards lie in the order of the ranks

    def starts_at(self, device: torch.device) -> Tensor:
        """The first column, 0-d int64 on `device`. Without `vocab_start` it costs an all-gather of
        one number per rank; nothing waits for the result and nothing is kept that could grow old.
        """
        if self.start is not None:
            return torch.full((), self.start, dtype=torch.int64, device=device)
        width = torch.full((1,), self.columns, dtype=torch.int64, device=device)
        return self._gather(width)[: dist.get_rank(self.group)].sum()

    def column(self, target: Tensor, ignore_index: int, start: Tensor) -> Tensor:
        """Global targets [N] -> column of this shard, IGNORED, or ELSEWHERE; `start` is that of
        `starts_at`."""
        local = target - start
        inside = (local >= 0) & (local < self.columns)
        column = torch.where(inside, local, ELSEWHERE)
        return torch.where(target == ignore_index, IGNORED, column)

    def exchange(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Every rank's `rows` ([N] each, one dtype): [ranks, N] fp64 each, the same on all ranks.

        Receives 4 * len(rows) bytes per row from every other rank (8 for fp64 logits).
        """
        own = torch.stack(rows)
        return self._gather(own).view(self.ranks, *own.shape).double().unbind(1)

    def _gather(self, own: Tensor) -> Tensor:
        """[a, ...] -> [ranks * a, ...]"""
        if not own.numel():
            return own.repeat(self.ranks, *[1] * (own.dim() - 1))
        return all_gather(own, self.group)

    def compare(self, name: str, content: Tensor) -> None:
        """Inside `checked()`: `content`, int64 [N], must be the same on all ranks.

        Raises:
            ValueError: on every rank alike.
        """
        if not check.checking():
            return
        index = torch.arange(1, len(content) + 1, device=content.device)
        own = torch.stack([index.new_tensor(len(content)), (content * index).sum()])
        counts, contents = self._gather(own).view(self.ranks, 2).unbind(1)
        if counts.min() != counts.max():
            raise ValueError(
                f"process_group: expected the same rows on all ranks, got {counts.tolist()}"
            )
        if contents.min() != contents.max():
            raise ValueError(f"{name}: expected the same values on every rank of process_group")

    def compare_targets(self, target: Tensor, ignore_index: int, shown: Tensor) -> None:
        """Inside `checked()`: `compare`, and no target beyond the last shard."""
        self.compare("target", target)
        if check.checking():
            end = self._gather((self.starts_at(target.device) + self.columns)[None]).max()
            check.in_vocabulary("target", target, int(end), ignore_index, shown)


def shard_of(process_group: Any, vocab_start: int | None, columns: int) -> Shard | None:
    """The shard that the caller means, or None where he holds the whole vocabulary.

    A group of one rank is the whole vocabulary: the plain op does it in one launch.

    Raises:
        ValueError: no process group, one that this rank is not in, a negative start.
    """
    if process_group is None:
        if vocab_start is not None:
            raise ValueError("vocab_start: belongs to process_group, got it without one")
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("process_group: torch.distributed is not initialised in this process")
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group: this rank is not in the group")
    if not isinstance(process_group, dist.ProcessGroup):
        raise ValueError(
            "process_group: expected a torch.distributed.ProcessGroup (of a DeviceMesh: "
            f".get_group()), got {process_group!r}"
        )
    if dist.get_rank(process_group) < 0:
        raise ValueError("process_group: this rank is not in the group")
    if vocab_start is not None and (
        isinstance(vocab_start, bool) or not isinstance(vocab_start, int) or vocab_start < 0
    ):
        raise ValueError(f"vocab_start: expected None or an int >= 0, got {vocab_start!r}")
    ranks = dist.get_world_size(process_group)
    if ranks == 1 and not vocab_start:
        return None
    return Shard(process_group, ranks, columns, vocab_start)
