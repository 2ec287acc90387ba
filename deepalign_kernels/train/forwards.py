"""How conversations go through the model: in which forwards, in which process, whether packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from deepalign_kernels.data.packing import Limits, micro_batches
from deepalign_kernels.data.source import Source
from deepalign_kernels.modes import evaluating
from deepalign_kernels.train.ranks import Ranks
from deepalign_kernels.train.session import embeddings_of, no_cache


class Forward(NamedTuple):
    """Rows, and whether they are this process's. If not, it only takes part: models that are shared
    among processes compute in all of them or in none."""

    rows: list[int]
    own: bool


def forwards(
    ranks: Ranks, rows: Sequence[int], lengths: Sequence[int], limits: Limits
) -> list[Forward]:
    """The forwards of this process: as many as in every other, its rows its share of `rows`."""
    if limits.max_tokens is None:
        groups = micro_batches(rows, lengths, limits.batch_size * ranks.count)
        shares = [(group, ranks.share(group)) for group in groups]
    else:
        groups = micro_batches(rows, lengths, *limits)
        rounds = [groups[at : at + ranks.count] for at in range(0, len(groups), ranks.count)]
        shares = [(each[-1], (each + [[]] * ranks.count)[ranks.rank]) for each in rounds]
    return [Forward(own or group[-1:], bool(own)) for group, own in shares]


def check_limits(limits: Limits, source: Source | None, epochs: int) -> None:
    """Raises ValueError: a row does not fit into a forward by itself."""
    if limits.max_tokens is None or source is None:
        return
    tables = map(source.table, source.epochs_with_own_table(epochs))
    longest = max(max(table.lengths) for table in tables)
    if longest > limits.max_tokens:
        raise ValueError(
            f"max_batch_tokens: expected at least {longest}, the tokens of the longest"
            f" conversation, got {limits.max_tokens}; or give max_length and on_too_long"
        )


@torch.no_grad()
def check_isolation(name: str, model: nn.Module) -> None:
    """Refuse a model in which conversations that are packed into one row see each other.

    Two short rows are packed by their position ids alone, as batches are. The second must be what
    it is alone, and what it is behind another first one.

    Raises:
        ValueError: naming the argument.
    """
    parameter = next(model.parameters())
    count = min(embeddings_of(model) or 16, 16)
    ids = torch.arange(16, device=parameter.device)[None] % count
    other = torch.cat([ids[:, :9].flip(1), ids[:, 9:]], 1)
    positions = torch.cat([torch.arange(9), torch.arange(7)]).to(ids.device)[None]
    kind = type(model).__name__
    with evaluating(model), no_cache(model):
        try:
            one, two = (
                model(input_ids=row, position_ids=positions).logits[0, 9:].float()
                for row in (ids, other)
            )
        except TypeError as error:
            raise ValueError(f"packing: {name} {kind} takes no position_ids: {error}") from error
        alone = model(input_ids=ids[:, 9:]).logits[0].float()
    full, size = parameter.element_size() >= 4, alone.abs().max().clamp(min=1e-6)
    for gap, allowed in (
        ((one - two).abs().max() / size, 1e-5 if full else 1e-2),
        ((one - alone).abs().max() / size, 1e-3 if full else 5e-2),
    ):
        if not gap <= allowed:
            raise ValueError(
                f"packing: {name} {kind} lets packed conversations see each other (logits differ by"
                f" {gap.item():.2g} of the largest); train it without packing"
            )
