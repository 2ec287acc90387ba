"""Two attacks in a row: a prefill behind a suffix, decoding after fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deepalign_kernels import progress
from deepalign_kernels.attack.attack import Attack, Prepares
from deepalign_kernels.data.prompts import Prompt
from deepalign_kernels.runs.record import Record


@dataclass(frozen=True)
class Compose:
    """`then` on what `first` leaves: its suffixes, or its model.

    Records are named "first+then"; those of the search or training come first. Replies behind a
    universal suffix say "train" or "test".

    Args:
        first: GCG, RandomSearch or Finetune.
        then: any attack.
    """

    first: Prepares
    then: Attack

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of its records."""
        return f"{self.first.name}+{self.then.name}"

    @property
    def together(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether all prompts are needed at once."""
        return self.first.together or self.then.together

    @property
    def local(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether one of them needs the model itself."""
        return self.first.local or self.then.local

    @property
    def continues(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether one of them needs replies that go on behind a given beginning."""
        return self.first.continues or self.then.continues

    def about(self) -> dict[str, Any]:
        """Both configs as plain values."""
        from deepalign_kernels.attack.suite import plain

        return {"attack": self.name, "first": plain(self.first), "then": plain(self.then)}

    def __call__(self, engine: Any, prompts: Sequence[Prompt]) -> Iterator[Record]:
        """As `Attack`."""
        mark = getattr(self.first, "marks", None)
        marks = mark(prompts) if mark else {}
        with progress.part(0.0, 0.9):  # a search or a training
            records, engine, prompts = self.first.prepare(engine, prompts)
        for record in records:
            yield replace(record, name=self.name)
        with progress.part(0.9, 1.0):
            after = list(self.then(engine, prompts))
        for record in after:
            cell = {**record.cell, **marks.get(record.item, {})}
            yield replace(record, name=self.name, cell=cell)
