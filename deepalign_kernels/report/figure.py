"""What a figure is: plain data, from which its SVG, its table and its CSV are made."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BANDS = "Bands: 95 % bootstrap intervals over answers."
POSITION = "position in the answer (tokens)"
DEPTH, ATTACKS, TRAINING = "Where the models differ", "Attacks", "Fine-tuning"


@dataclass(frozen=True)
class Series:
    """One curve; None where it has no value.

    Attributes:
        name: for the legend.
        x: numbers, ascending.
        y: numbers.
        low: lower ends of intervals, or empty.
        high: upper ends.
        count: examples behind each value, or empty.
        shown: False: switched off until the reader asks for it.
        paper: from the paper, not measured here.
        model: names the model that it is of, "" for others.
        breaks: values of x behind which the line begins anew.
        look: number of its colour: one model has the same in all figures of a page.
        variant: tells curves of one colour apart, by dash and mark.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    count: Sequence[int] = ()
    shown: bool = True
    paper: bool = False
    model: str = ""
    breaks: Sequence[float] = ()
    look: int = 0
    variant: int = 0


@dataclass(frozen=True)
class Heat:
    """A grid of values, None where there is none."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Figure:
    """A figure with axes, curves or a grid, and what a reader must know of it.

    Attributes:
        key: unique on a page; also the name of its files.
        title: one line, a statement of what is shown.
        caption: how it was measured, what the bands are.
        x: label of the axis with its unit.
        y: likewise; of a heat map its rows.
        unit: of a heat map's values.
        section: heading under which it stands.
        data: curves or a grid.
        top: upper end of the y axis or of a grid's shades, if it is not the data's.
        bottom: lower end.
        log: a logarithmic y axis.
    """

    key: str
    title: str
    caption: str
    x: str
    y: str
    section: str
    data: Sequence[Series] | Heat
    unit: str = ""
    top: float | None = None
    bottom: float | None = 0.0
    log: bool = False

    @property
    def table(self) -> list[list[str]]:
        """The numbers behind it, first line the titles."""
        if isinstance(self.data, Heat):
            head = [self.y, *self.data.columns]
            body = zip(self.data.rows, self.data.values, strict=True)
            return [head, *([row, *map(number, values)] for row, values in body)]
        lines = [["series", self.x, self.y, "low (95 %)", "high (95 %)", "n"]]
        for s in self.data:
            for i, (x, y) in enumerate(zip(s.x, s.y, strict=True)):
                interval = [number(b[i]) if len(b) else "" for b in (s.low, s.high)]
                count = str(s.count[i]) if len(s.count) else ""
                lines.append([s.name, number(x), number(y), *interval, count])
        return lines

    @property
    def csv(self) -> str:
        """`table` as CSV."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(self.table)
        return out.getvalue()


def number(value: Any, digits: int = 4) -> str:
    """So many digits, at most; "" for None and NaN."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e7 else text
