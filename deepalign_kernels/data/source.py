"""From whatever the caller calls training data to the token table and the row order of an epoch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deepalign_kernels import check
from deepalign_kernels.data.columns import TokenTable
from deepalign_kernels.data.examples import (
    ORIGINS,
    TOO_LONG,
    Example,
    limit_length,
    tokenize_chat,
)
from deepalign_kernels.data.packing import epoch_order


class Source:
    """Training data of one run, checked against tokenizer and limits when it is made.

    Args:
        data: path, list of records or of `Example`s, or an object with `examples(epoch)`, which is
            asked again for every epoch and must give the same number of examples each time; its
            `part_weights` and `part_weighting`, if it has them, say how the parts are mixed (see
            `TokenTable`).
        tokenizer: as in `tokenize_chat`; its `pad_token_id` fills rows up. Of `Example`s nothing
            else is needed.
        position_origin: as in `tokenize_chat`.
        max_length: tokens per example, None: no limit. `on_too_long`: "error" refuses a longer
            one, "drop" leaves it out, "truncate" keeps its beginning.
        vocab_size: token ids must be below it; None: not checked.
        seed: of the order of the rows in each epoch.
        keep_epochs: keep the tables of all epochs, not only those of the first and the last asked
            for; for columns that are added to them before training, such as a reference.

    Raises:
        ValueError: anything wrong with the data or the arguments.
    """

    def __init__(
        self,
        data: Any,
        tokenizer: Any,
        *,
        position_origin: str = "content",
        max_length: int | None = None,
        on_too_long: str = "error",
        vocab_size: int | None = None,
        seed: int = 0,
        keep_epochs: bool = False,
    ) -> None:
        check.one_of("position_origin", position_origin, ORIGINS)
        check.one_of("on_too_long", on_too_long, TOO_LONG)
        self._pad_id = getattr(tokenizer, "pad_token_id", None) or 0
        self._max_length, self._on_too_long = max_length, on_too_long
        self._vocab_size, self._seed, self._keep = vocab_size, seed, keep_epochs
        self.too_long = 0  # examples of epoch 0 that were dropped or truncated
        self.changing = hasattr(data, "examples")
        self._data = data if self.changing else _static(data, tokenizer, position_origin)
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
            self._order = (epoch, epoch_order(table.parts, self._seed, epoch))
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
            raise ValueError(f"data: examples({epoch}) gave something that is no Example")
        examples, too_long = limit_length(examples, self._max_length, self._on_too_long)
        weights = getattr(data, "part_weights", None)
        weighting = getattr(data, "part_weighting", "tokens")
        table = TokenTable(examples, self._pad_id, weights, weighting)
        self._check_ids(table)
        if epoch == 0:
            self.too_long = too_long
        elif len(table) != self._size:
            raise ValueError(
                f"data: epoch {epoch} has {len(table)} examples, epoch 0 had {self._size};"
                " the number must not change (on_too_long='drop' may do that)"
            )
        return table

    def _check_ids(self, table: TokenTable) -> None:
        low, high = int(table.ids.min()), int(max(table.ids.max(), table.targets.max()))
        if low < 0 or (self._vocab_size is not None and high >= self._vocab_size):
            raise ValueError(
                f"tokenizer: token id {low if low < 0 else high} is outside the model's"
                f" {self._vocab_size} embeddings"
            )


def _static(data: Any, tokenizer: Any, position_origin: str) -> list[Example]:
    if not isinstance(data, (str, Path)):
        if isinstance(data, dict) or not isinstance(data, Iterable):
            raise ValueError(
                "data: expected a path, a list or an object with examples(epoch), got"
                f" {type(data).__name__}"
            )
        data = list(data)
        if data and all(isinstance(e, Example) for e in data):
            return data
    return tokenize_chat(tokenizer, data, position_origin=position_origin)
