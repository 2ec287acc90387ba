"""From whatever the caller calls training data to the token table and the row order of an epoch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from deepalign_kernels.train.config import ConstrainedSFTConfig
from deepalign_kernels.train.data import Example, conversations_of, encode, fit
from deepalign_kernels.train.table import TokenTable
from deepalign_kernels.train.template import ChatTemplate


class Source:
    """Training data of one run, checked against tokenizer and model when it is made.

    Args:
        data: path, list of records or of `Example`s, or an object with `examples(epoch)`, which is
            asked again for every epoch and must give the same number of examples each time; its
            `part_weights`, if it has them, say how the parts are mixed.

    Raises:
        ValueError: anything wrong with the data.
    """

    def __init__(
        self, data: Any, tokenizer: Any, model: nn.Module, config: ConstrainedSFTConfig
    ) -> None:
        self._config = config
        self._pad_id = getattr(tokenizer, "pad_token_id", None) or 0
        self._vocab = _rows_of_embedding(model)
        self._max_length = config.max_length or _positions_of(model)
        self.too_long = 0  # examples of epoch 0 that were dropped or truncated
        self.changing = hasattr(data, "examples")
        self._data = data if self.changing else _static(data, tokenizer, config)
        # With a precomputed reference every epoch is needed before the first step, and kept.
        self._keep = config.needs_reference and config.reference == "precomputed"
        self._tables: dict[int, TokenTable] = {}
        self._order: tuple[int, list[int]] = (-1, [])
        self._size = len(self.table(0))

    def table(self, epoch: int) -> TokenTable:
        epoch = epoch if self.changing else 0
        if epoch not in self._tables:
            table = self._build(epoch)
            if not self._keep:
                self._tables = {e: t for e, t in self._tables.items() if e == 0}
            self._tables[epoch] = table
        return self._tables[epoch]

    def epoch(self, epoch: int) -> tuple[TokenTable, list[int]]:
        """The table and the order in which its rows are trained."""
        table = self.table(epoch)
        if self._order[0] != epoch:
            self._order = (epoch, table.order(self._config.seed, epoch))
        return table, self._order[1]

    def check(self, epochs: int) -> None:
        """Refuse now what would be refused when one of the later epochs begins."""
        for epoch in self.epochs_with_own_table(epochs):
            self.table(epoch)

    def epochs_with_own_table(self, epochs: int) -> range:
        return range(epochs if self.changing else 1)

    def _build(self, epoch: int) -> TokenTable:
        data: Any = self._data
        examples = list(data.examples(epoch)) if self.changing else data
        if not all(isinstance(e, Example) for e in examples):
            raise ValueError(f"train_data: examples({epoch}) gave something that is no Example")
        examples, too_long = fit(examples, self._max_length, self._config.on_too_long)
        table = TokenTable(examples, self._pad_id, getattr(self._data, "part_weights", None))
        low, high = int(table.ids.min()), int(max(table.ids.max(), table.targets.max()))
        if low < 0 or (self._vocab is not None and high >= self._vocab):
            raise ValueError(
                f"tokenizer: token id {low if low < 0 else high} is outside the model's"
                f" {self._vocab} embeddings"
            )
        if epoch == 0:
            self.too_long = too_long
        elif len(table) != self._size:
            raise ValueError(
                f"train_data: epoch {epoch} has {len(table)} examples, epoch 0 had {self._size};"
                " the number must not change (on_too_long='drop' may do that)"
            )
        return table


def _static(data: Any, tokenizer: Any, config: ConstrainedSFTConfig) -> list[Example]:
    if not isinstance(data, (str, Path)):
        if isinstance(data, dict) or not isinstance(data, Iterable):
            kind = type(data).__name__
            raise ValueError(
                f"train_data: expected a path, a list or an object with examples(epoch), got {kind}"
            )
        data = list(data)
        if data and all(isinstance(e, Example) for e in data):
            return data
    conversations = conversations_of(data)
    return encode(ChatTemplate(tokenizer), conversations, position_origin=config.position_origin)


def _rows_of_embedding(model: nn.Module) -> int | None:
    get = getattr(model, "get_input_embeddings", None)
    try:
        weight = getattr(get() if get else None, "weight", None)
    except NotImplementedError:  # transformers' way to say that it does not know
        return None
    return None if weight is None else weight.shape[0]


def _positions_of(model: nn.Module) -> int | None:
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
