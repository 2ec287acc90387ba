"""What goes into a run and comes out of it: records of one schema, whoever makes them.

An attack or an analysis yields `Record`s in a fixed order; `store.Run` keeps them; tables and
reports read them back. Nobody in between knows the others.

    kind        one record is                              data
    "sample"    one reply of a model to one prompt         what the maker measured, plain values
    "search"    the result of a search for one prompt      best loss, steps, history
    "training"  one point of a fine-tuning                 step, loss
    "profile"   values by position or layer                "values": [...]
    "metric"    one number about the model                 "value"
    "verdict"   what one judge says of one sample          "of": key of the sample, "judge",
                                                           "success": True, False or None

"again": True in `data` says of a failure that it may be gone in the next run (a busy server).

What a person would not want to read, prompts and replies, is in `text` and nowhere else: no table,
page or log shows it unless it is asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

KINDS = ("sample", "search", "training", "profile", "metric", "verdict")
_JSON = json.JSONEncoder(sort_keys=True, allow_nan=False, separators=(",", ":"))


def canonical(value: Any) -> str:
    """JSON of plain values, the same for equal values; ValueError for NaN and other objects."""
    try:
        return _JSON.encode(value)
    except TypeError as error:
        raise ValueError(f"not a plain value: {error}") from error


def digest(*parts: Any) -> str:
    """16 hex digits that name `parts`, plain values."""
    return hashlib.sha256(canonical(parts).encode()).hexdigest()[:16]


def short(text: str) -> str:
    """8 hex digits that name a text where it must not stand itself, as in a cell."""
    return digest(text)[:8]


def derived_seed(*parts: Any) -> int:
    """A seed in [0, 2^63) from plain values, such as (run seed, item, attack, cell, sample).

    It depends on nothing else: not on the batch, not on what was drawn before.
    """
    raw = hashlib.sha256(canonical(parts).encode()).digest()
    return int.from_bytes(raw[:8], "big") >> 1


@dataclass(frozen=True)
class Record:
    """One line of a run; every value is plain (what JSON holds).

    Args:
        kind: one of KINDS.
        name: of the attack or analysis, such as "prefill".
        cell: the settings that a column of a table stands for, such as {"k": 5}.
        item: id of the prompt; "" where there is none.
        sample: number of the repetition, from 0.
        data: measured values by name.
        text: prompts and replies by name.
        error: why there is no result; such a record is counted, never scored.
        seconds: that it took. No part of the line, as a run that went on has others: `store.fill`
            writes them apart.

    Raises:
        ValueError: an unknown kind, a value that is not plain.
    """

    kind: str
    name: str
    cell: Mapping[str, Any] = field(default_factory=dict)
    item: str = ""
    sample: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    seconds: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        _ = self.line  # refuses what is not plain

    @cached_property
    def key(self) -> str:
        """What names this record within its run; equal for no two of them."""
        return digest(self.kind, self.name, dict(self.cell), self.item, self.sample)

    @property
    def unsettled(self) -> bool:
        """Whether it failed for a reason that may be gone in the next run, which tries again."""
        return self.data.get("again") is True

    @cached_property
    def line(self) -> str:
        """JSON, without a line end."""
        try:
            return canonical({name: getattr(self, name) for name in FIELDS})
        except ValueError as error:
            raise ValueError(f"record {self.name!r} of item {self.item!r}: {error}") from error

    @staticmethod
    def of_line(line: bytes) -> Record:
        """What `line` says: the `line` of a record, as JSON lets nothing through that is not plain.

        Raises:
            ValueError: broken JSON, other fields, an unknown kind, NaN.
        """
        text = line.decode()
        values = _READ.decode(text)
        if not isinstance(values, dict) or values.keys() != FIELDS or values["kind"] not in KINDS:
            raise ValueError(f"expected the fields {', '.join(sorted(FIELDS))} and a known kind")
        record = object.__new__(Record)
        record.__dict__.update(values, line=text.rstrip("\n"))  # not made again from these
        return record


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is not a plain value")


FIELDS = {f.name for f in fields(Record)} - {"seconds"}
_READ = json.JSONDecoder(parse_constant=_refused)
