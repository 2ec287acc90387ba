"""A figure as inline SVG. Colours are classes and variables of the page's style sheet; every series
has a dash and a mark of its own besides, so that it is told apart in grey."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from deepalign_kernels.report.figure import Figure, Heat, Series, number

WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 48
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4", "1 2", "6 2 1 2 1 2")
MARKS = (  # paths around 0, 0
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "M-3.6 -3.6h7.2v7.2h-7.2z",
    "M0 -4.6L4.4 3.4H-4.4z",
    "M0 -5L5 0L0 5L-5 0z",
    "M0 4.6L4.4 -3.4H-4.4z",
    "M-4.4 -1.3h3.1v-3.1h2.6v3.1h3.1v2.6h-3.1v3.1h-2.6v-3.1h-3.1z",
    "M-5 -1.5h10v3h-10z",
    "M-1.5 -5v10h3v-10z",
)
COLOURS = len(MARKS)


def draw(figure: Figure) -> str:
    """The <svg> element."""
    if isinstance(figure.data, Heat):
        return _heat(figure, figure.data)
    return _lines(figure, figure.data)


def swatch(series: Series) -> str:
    """The line and mark of a series, for the legend."""
    c, dash, mark = _look(series)
    return (
        f'<svg class="swatch c{c}" viewBox="0 0 34 12" width="34" height="12" aria-hidden="true">'
        f'<path class="line" d="M1 6H33" stroke-dasharray="{dash}"/>'
        f'<path class="mark" d="{mark}" transform="translate(17 6)"/></svg>'
    )


def _look(s: Series) -> tuple[int, str, str]:
    """Colour, dash and mark; the ninth colour is the first's with another mark."""
    other = (s.look + s.look // COLOURS + 3 * s.variant) % COLOURS
    return s.look % COLOURS, DASHES[other], MARKS[other]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


class Scale:
    """From values to pixels; log where asked for."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool) -> None:
        self.log, self.start, self.end = log, start, end
        self.low, self.high = (math.log10(low), math.log10(high)) if log else (low, high)

    def __call__(self, value: float) -> float:
        v = math.log10(max(value, 1e-300)) if self.log else value
        part = (v - self.low) / ((self.high - self.low) or 1.0)
        return round(self.start + min(max(part, -0.05), 1.05) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high)
        powers = range(math.ceil(self.low), math.floor(self.high) + 1)
        return [10.0**p for p in powers] or [10**self.low, 10**self.high]


def scales(figure: Figure, series: Sequence[Series]) -> tuple[Scale, Scale]:
    """The axes, so that all series fit, those that are switched off too."""
    xs = [x for s in series for x in s.x]
    ys = [v for s in series for part in (s.y, s.low, s.high) for v in part if v is not None]
    if figure.log:
        ys = [y for y in ys if y > 0] or [0.1, 1.0]
        low, high = min(ys), max(ys)
        low, high = (low, high) if high > low else (low / 2, high * 2)
    else:
        low = min(ys, default=0.0) if figure.bottom is None else min(figure.bottom, *ys, 0.0)
        high = max(ys, default=1.0) if figure.top is None else figure.top
        high = high if high > low else low + 1.0
        if figure.top is None:
            high += 0.04 * (high - low)
    left, right = min(xs, default=0.0), max(xs, default=1.0)
    pad = 0.03 * (right - left) or 0.5
    return (
        Scale(left - pad, right + pad, LEFT, WIDTH - RIGHT, False),
        Scale(low, high, HEIGHT - BOTTOM, TOP, figure.log),
    )


def _open(figure: Figure, height: float = HEIGHT) -> str:
    return (
        f'<svg class="chart" id="svg-{figure.key}" viewBox="0 0 {WIDTH} {height:g}" tabindex="0"'
        f' role="img" aria-label="{escape(figure.title)}. {escape(figure.y)} by {escape(figure.x)}.'
        ' Arrow keys move through the values.">'
    )


def _labels(figure: Figure, height: float = HEIGHT, left: float = LEFT) -> str:
    middle = (TOP + height - BOTTOM) / 2
    return (
        f'<text class="label" x="{(left + WIDTH - RIGHT) / 2:g}" y="{height - 8:g}"'
        f' text-anchor="middle">{escape(figure.x)}</text>'
        f'<text class="label" transform="translate(15 {middle:g}) rotate(-90)"'
        f' text-anchor="middle">{escape(figure.y)}</text>'
    )


def _lines(figure: Figure, series: Sequence[Series]) -> str:
    x, y = scales(figure, series)
    out = [_open(figure), '<g class="grid">']
    for v in y.ticks():
        at = y(v)
        out.append(f'<path d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        out.append(f'<text x="{LEFT - 7}" y="{at + 4.5:g}" text-anchor="end">{number(v)}</text>')
    whole = all(float(v).is_integer() for s in series for v in s.x)
    known = sorted({v for s in series if not s.paper for v in s.x})
    marks = known if len(known) <= 10 else ticks(known[0], known[-1], 8)
    if whole and known and known[0] == 1 and 1 not in marks:
        marks = [1, *marks]  # positions begin there
    for v in marks:
        if whole and not float(v).is_integer():
            continue
        out.append(
            f'<text x="{x(v)}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{number(v)}</text>'
        )
    out.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/></g>')
    out.append(_labels(figure))
    for i, s in enumerate(series):
        out.append(_series(i, s, x, y, sparse=len(s.x) > 40))
    out.append(f'<path class="cursor" d="M0 {TOP}V{HEIGHT - BOTTOM}"/></svg>')
    return "".join(out)


def _series(i: int, s: Series, x: Scale, y: Scale, sparse: bool) -> str:
    c, dash, mark = _look(s)
    points = [(x(a), y(b)) for a, b in zip(s.x, s.y, strict=True) if b is not None]
    out = [f'<g class="series c{c}{" paper" * s.paper}" data-series="{i}"']
    out.append("" if s.shown else ' hidden=""')
    out.append(">")
    if len(s.low) and any(v is not None for v in s.low):
        ends = [
            (x(a), y(lo), y(hi))
            for a, lo, hi in zip(s.x, s.low, s.high, strict=True)
            if lo is not None and hi is not None
        ]
        up = [f"{a} {hi}" for a, _, hi in ends]
        down = [f"{a} {lo}" for a, lo, _ in reversed(ends)]
        out.append(f'<path class="band" d="M{"L".join(up + down)}z"/>')
    if points:
        new = {x(a) for a in s.breaks}
        joins = ["M", *("M" if a in new else "L" for a, _ in points)]
        path = "".join(f"{join}{a} {b}" for join, (a, b) in zip(joins, points, strict=False))
        out.append(f'<path class="line" d="{path}" stroke-dasharray="{dash}"/>')
    every = max(1, len(points) // 24) if sparse else 1
    out += [
        f'<path class="mark" d="{mark}" transform="translate({a} {b})"/>'
        for a, b in points[::every]
    ]
    return "".join([*out, "</g>"])


def _heat(figure: Figure, grid: Heat) -> str:
    left = min(200, 30 + 7 * max(map(len, grid.rows), default=1))
    rows, columns = max(1, len(grid.rows)), max(1, len(grid.columns))
    size = min(34.0, max(9.0, 300 / rows))
    size = max(size, 7.5 * len(figure.y) / rows)  # room for the label beside few rows
    width = (WIDTH - RIGHT - left) / columns
    height = TOP + size * rows + BOTTOM + 26
    known = [v for row in grid.values for v in row if v is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    low = low if figure.bottom is None else min(figure.bottom, low)
    high = high if figure.top is None else figure.top
    out = [_open(figure, height)]
    for r, row in enumerate(grid.values):
        at = TOP + r * size
        if rows <= 34 or r % 2 == 0:
            out.append(
                f'<text x="{left - 6}" y="{at + size / 2 + 4.5:g}" text-anchor="end">'
                f"{escape(grid.rows[r])}</text>"
            )
        for c, v in enumerate(row):
            part = 0.0 if v is None else max(0.0, (v - low) / ((high - low) or 1.0))
            kind = "cell none" if v is None else "cell"
            out.append(
                f'<rect class="{kind}" data-at="{r},{c}" x="{left + c * width:.1f}" y="{at:.1f}"'
                f' width="{width - 0.8:.1f}" height="{size - 0.8:.1f}"'
                f' fill-opacity="{0.04 + 0.96 * part:.3f}"/>'
            )
            if v is not None and width >= 34 and size >= 16:
                dark = " over" if part > 0.55 else ""
                out.append(
                    f'<text class="inside{dark}" x="{left + (c + 0.5) * width:.1f}"'
                    f' y="{at + size / 2 + 4.5:.1f}" text-anchor="middle">{number(v, 3)}</text>'
                )
    bottom = TOP + rows * size
    every = max(1, math.ceil(columns * 26 / (WIDTH - left)))
    for c in range(0, columns, every):
        out.append(
            f'<text x="{left + (c + 0.5) * width:.1f}" y="{bottom + 17:.1f}" text-anchor="middle">'
            f"{escape(grid.columns[c])}</text>"
        )
    out.append(
        f'<text class="label" x="{(left + WIDTH) / 2:g}" y="{bottom + 36:g}" text-anchor="middle">'
        f"{escape(figure.x)}</text>"
        f'<text class="label" transform="translate(13 {(TOP + bottom) / 2:g}) rotate(-90)"'
        f' text-anchor="middle">{escape(figure.y)}</text>'
    )
    out.append(_key(left, bottom + 46, low, high, figure.unit))
    return "".join([*out, '<rect class="ring" width="0" height="0"/></svg>'])


def _key(left: float, at: float, low: float, high: float, unit: str) -> str:
    """What the shades mean."""
    out = [f'<text x="{left}" y="{at + 11}" text-anchor="start">{number(low, 3)}</text>']
    for i in range(8):
        out.append(
            f'<rect class="cell" x="{left + 46 + 16 * i}" y="{at}" width="15.5" height="13"'
            f' fill-opacity="{0.04 + 0.96 * i / 7:.3f}"/>'
        )
    out.append(f'<text x="{left + 180}" y="{at + 11}">{number(high, 3)} {escape(unit)}</text>')
    return "".join(out)
