"""From whatever the caller calls training data to the token table and the row order of an epoch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from deepalign_kernels import check
from deepalign_kernels.data.columns import TokenTable
from deepalign_kernels.data.examples import TOO_LONG, Encoding, Example, LengthLimit
from deepalign_kernels.data.packing import epoch_order
from deepalign_kernels.data.reading import fingerprint
from deepalign_kernels.data.template import ChatTemplate
from deepalign_kernels.data.tokenizing import examples_of

FORMAT = 2  # of the cached tables; to be raised when tokenisation changes


class Source:
    """Training data of one run, checked against tokenizer and limits when it is made.

    Args:
        data: what `load_chat_data` takes, records or `Example`s, or an object with
            `examples(epoch)`, which is asked again for every epoch and must give the same number of
            examples each time; its `part_weights` and `part_weighting`, if it has them, say how the
            parts are mixed (see `TokenTable`). Except for such an object, the data need not fit
            into memory.
        tokenizer: as in `tokenize_chat`; its `pad_token_id` fills rows up. Of `Example`s nothing
            else is needed.
        encoding: how conversations become examples.
        max_length: tokens per example, None: no limit. `on_too_long`: "error" refuses a longer
            one, "drop" leaves it out, "truncate" keeps its beginning.
        vocab_size: token ids must be below it; None: not checked.
        seed: of the order of the rows in each epoch.
        keep_epochs: keep the tables of all epochs, not only those of the first and the last asked
            for; for columns that are added to them before training, such as a reference.
        cache: folder in which the tokens of data that do not change are kept, by the content of
            data, tokenizer, template and choices; None: none are kept.
        workers: processes that tokenise, see `examples_of`.
        progress: a line on the terminal while tokenising.
        step_size: examples of a step, if those of a step are to be of like lengths; None: they are
            drawn from all.

    Raises:
        ValueError: anything wrong with the data or the arguments.
    """

    def __init__(
        self,
        data: Any,
        tokenizer: Any,
        encoding: Encoding | None = None,
        *,
        max_length: int | None = None,
        on_too_long: str = "error",
        vocab_size: int | None = None,
        seed: int = 0,
        keep_epochs: bool = False,
        cache: str | Path | None = None,
        workers: int | None = None,
        progress: bool = False,
        step_size: int | None = None,
    ) -> None:
        check.one_of("on_too_long", on_too_long, TOO_LONG)
        self._tokenizer, self._encoding = tokenizer, encoding or Encoding()
        self._pad_id = getattr(tokenizer, "pad_token_id", None) or 0
        self._limits = max_length, on_too_long
        self._vocab_size, self._seed, self._keep = vocab_size, seed, keep_epochs
        self._cache = None if cache is None else Path(cache)
        self._workers, self._progress, self._step_size = workers, progress, step_size
        self.too_long = 0  # examples of epoch 0 that were dropped or truncated
        self.skipped: list[str] = []  # where and why, of records that were left out
        self.changing = hasattr(data, "examples")
        if hasattr(data, "skipped"):
            self.skipped += data.skipped
        elif self.changing and self._encoding.on_bad_record == "skip":
            raise ValueError(
                "on_bad_record: 'skip' is for records that are read one by one, not for data that"
                f" bring their examples, {type(data).__name__}; give 'error'"
            )
        self._data = data
        self._tables: dict[int, TokenTable] = {}
        self._order: tuple[int, list[int]] = (-1, [])
        self._size = len(self.table(0))

    def table(self, epoch: int) -> TokenTable:
        epoch = epoch if self.changing else 0
        if epoch not in self._tables:
            table = self._build(epoch) if self.changing else self._cached()
            self._check_ids(table)
            if not self._keep:
                self._tables = {e: t for e, t in self._tables.items() if e == 0}
            self._tables[epoch] = table
        return self._tables[epoch]

    def epoch(self, epoch: int) -> tuple[TokenTable, list[int]]:
        """The table and the order in which its rows are trained."""
        table = self.table(epoch)
        if self._order[0] != epoch:
            like = None if self._step_size is None else (table.lengths, self._step_size)
            self._order = (epoch, epoch_order(table.parts, self._seed, epoch, like))
        return table, self._order[1]

    def check(self, epochs: int) -> None:
        """Refuse now what would be refused when one of the later epochs begins."""
        for epoch in self.epochs_with_own_table(epochs):
            self.table(epoch)

    def epochs_with_own_table(self, epochs: int) -> range:
        return range(epochs if self.changing else 1)

    def _build(self, epoch: int) -> TokenTable:
        data: Any = self._data
        limit = LengthLimit(*self._limits)
        weights = getattr(data, "part_weights", None)
        weighting = getattr(data, "part_weighting", "tokens")
        examples = _only_examples(data.examples(epoch), f"examples({epoch})")
        table = TokenTable(limit.of(examples), self._pad_id, weights, weighting)
        if epoch == 0:
            self.too_long = limit.too_long
        elif len(table) != self._size:
            raise ValueError(
                f"data: epoch {epoch} has {len(table)} examples, epoch 0 had {self._size};"
                " the number must not change (on_too_long='drop' may do that)"
            )
        return table

    # Data that are the same in every epoch.

    def _cached(self) -> TokenTable:
        key = None if self._cache is None else self._key()
        if self._cache is None or key is None:
            return self._tokenized(None)
        folder = self._cache / key
        if folder.is_dir():
            try:
                table = TokenTable.load(folder)
                self.too_long = int((folder / "too_long").read_text())
                self.skipped = json.loads((folder / "skipped.json").read_text())
                return table
            except (OSError, ValueError) as error:
                warnings.warn(f"cache: {error}; tokenising again", stacklevel=4)
        part = self._cache / f".{key}.{os.getpid()}"
        part.mkdir(parents=True, exist_ok=True)
        try:
            table = self._tokenized(part)
            (part / "too_long").write_text(str(self.too_long))
            (part / "skipped.json").write_text(json.dumps(self.skipped))
            shutil.rmtree(folder, ignore_errors=True)
            _moved(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return table

    def _tokenized(self, folder: Path | None) -> TokenTable:
        skipped: list[str] = []
        skips = self._encoding.on_bad_record == "skip"
        limit = LengthLimit(*self._limits, skipped if skips else None)
        examples = _any_left(limit.of(self._examples(skipped)), skipped)
        table = TokenTable(examples, self._pad_id, folder=folder)
        self.too_long, self.skipped = limit.too_long, skipped
        return table

    def _key(self) -> str | None:
        """What the tokens depend on; None if that cannot be told."""
        content = fingerprint(self._data)
        core = getattr(self._tokenizer, "backend_tokenizer", None)
        if content is None or core is None:
            return None
        template = ChatTemplate(self._tokenizer)
        # Some templates write the day; its text is in the rendering and not in the template.
        shown = template.render(
            [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
        )
        parts = (FORMAT, content, core.to_str(), template.template, shown, self._encoding)
        return hashlib.blake2b(
            repr((*parts, self._limits, self._pad_id)).encode(), digest_size=16
        ).hexdigest()

    def _examples(self, skipped: list[str]) -> Iterator[Example]:
        data = self._data
        if not isinstance(data, (str, Path)):
            if isinstance(data, Mapping) or not isinstance(data, Iterable):
                raise ValueError(
                    "data: expected a path, a list or an object with examples(epoch), got"
                    f" {type(data).__name__}"
                )
            if not hasattr(data, "_fingerprint"):  # as a Dataset has, whose rows are no Examples
                rows = iter(data)
                first = list(islice(rows, 1))
                data = chain(first, rows)
                if first and isinstance(first[0], Example):
                    return _only_examples(data, "this list")
        return examples_of(
            self._tokenizer,
            data,
            self._encoding,
            workers=self._workers,
            progress=self._progress,
            skipped=skipped,
        )

    def _check_ids(self, table: TokenTable) -> None:
        low, high = table.id_range()
        if low < 0 or (self._vocab_size is not None and high >= self._vocab_size):
            raise ValueError(
                f"tokenizer: token id {low if low < 0 else high} is outside the model's"
                f" {self._vocab_size} embeddings"
            )


def _moved(part: Path, folder: Path) -> None:
    """Another process may have put the same there meanwhile."""
    try:
        os.replace(part, folder)
    except OSError:
        if not folder.is_dir():
            raise


def _any_left(examples: Iterable[Example], skipped: list[str]) -> Iterator[Example]:
    none = True
    for example in examples:
        none = False
        yield example
    if none and skipped:
        raise ValueError(
            f"data: on_bad_record='skip' left nothing of {len(skipped)} records; the first:"
            f" {skipped[0]}"
        )


def _only_examples(examples: Iterable[Any], where: str) -> Iterator[Example]:
    for example in examples:
        if not isinstance(example, Example):
            raise ValueError(f"data: {where} gave something that is no Example")
        yield example
