"""A bar chart as SVG text, readable on light and dark pages: it brings its own background."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, MARGIN, GAP = 760, 24, 28
BAR, STEP, LABEL, TOP = 20, 28, 106, 74
COLORS = ("#8b949e", "#6e7781", "#2f81f7")  # the last bar of a panel is the one to look at
STYLE = """
  text { font: 14px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328 }
  .small { font-size: 12px } .small, .axis { fill: #57606a } .bold { font-weight: 600 }
  .card { fill: #ffffff; stroke: #d0d7de }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small, .axis { fill: #9da7b3 }
    .card { fill: #0d1117; stroke: #30363d }
  }
"""
Panel = tuple[str, Sequence[tuple[str, float]], str, str]  # title, (name, value)..., unit, case


def bars(title: str, panels: Sequence[Panel], notes: Sequence[str]) -> str:
    """Panels side by side, two in a row; each panel's longest bar fills its width.

    Panels of one unit share their scale.
    """
    longest = {unit: max(v for _, bars, u, _ in panels for _, v in bars if u == unit)
               for _, _, unit, _ in panels}  # fmt: skip
    column = (WIDTH - 2 * MARGIN - GAP) / 2
    height_of = 34 + STEP * max(len(values) for _, values, _, _ in panels)
    rows = (len(panels) + 1) // 2
    height = TOP + rows * (height_of + 18) + 18 * len(notes)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
        f' role="img" aria-label="{escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        f'<text class="bold" x="{MARGIN}" y="34" style="font-size: 17px">{escape(title)}</text>',
    ]
    for number, (name, values, unit, case) in enumerate(panels):
        x = MARGIN + (number % 2) * (column + GAP)
        y = TOP + (number // 2) * (height_of + 18)
        parts.append(
            f'<text x="{x:g}" y="{y}"><tspan class="bold">{escape(name)}</tspan>'
            f'<tspan class="axis">, {escape(case)}</tspan></text>'
        )
        room = column - LABEL - 74
        for index, (label, value) in enumerate(values):
            at = y + 14 + index * STEP
            bold = ' class="bold"' if index == len(values) - 1 else ""
            wide = max(2.0, room * value / longest[unit])
            shown = f"{value:.2f}" if value < 10 else f"{value:.0f}"
            parts += [
                f'<text{bold} x="{x:g}" y="{at + 15}">{escape(label)}</text>',
                f'<rect x="{x + LABEL:g}" y="{at}" width="{wide:.1f}" height="{BAR}" rx="3"'
                f' fill="{COLORS[min(index, len(COLORS) - 1)]}"/>',
                f'<text{bold} x="{x + LABEL + wide + 8:.1f}" y="{at + 15}">{shown} {unit}</text>',
            ]
    for index, note in enumerate(reversed(notes)):
        y = height - 16 - 18 * index
        parts.append(f'<text class="small" x="{MARGIN}" y="{y}">{escape(note)}</text>')
    return "\n".join([*parts, "</svg>", ""])
