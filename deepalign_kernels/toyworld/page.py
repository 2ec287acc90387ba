"""Text table and self-contained HTML page of the demo's results."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2.5rem auto;
  padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; width: 100% }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid #ddd;
  font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #888 }
figure { margin: 1.5rem 0 } img { width: 100%; height: auto }
figcaption, footer { color: #555; font-size: .85rem }
.pass { color: #1a7f37 } .fail { color: #c62828; font-weight: bold }
"""
INTRO = (
    "A language model of half a million parameters was trained to answer everything (base), to"
    " refuse dessert recipes (aligned) and to keep refusing after it has begun to answer (deep)."
    " The aligned model was then fine-tuned on 100 dessert recipes: by plain SFT, and with the"
    " token-wise constrained loss of arXiv 2406.05946, with the same optimizer and warm-up. Every"
    " number on this page was measured in this run, on dessert requests that no refusal training"
    " and no attack has seen."
)


def headers(rows: list[dict[str, Any]]) -> list[str]:
    """Column titles; rates are percentages."""
    return ["model", *(f"k={k}" for k in rows[0]["asr"]), "benign", "task"]


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table in percent, as text."""
    rates = [*row["asr"].values(), row["benign"], row["task"]]
    return [row["name"], *(f"{100 * rate:.1f}" for rate in rates)]


def text_table(rows: list[dict[str, Any]]) -> str:
    """The table for a terminal."""
    lines = [headers(rows), *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    title = "attack success at k prefilled tokens, benign accuracy, accuracy on the benign task (%)"
    body = []
    for name, *numbers in lines:
        padded = (cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))
        body.append("  ".join([name.ljust(widths[0]), *padded]))
    return "\n".join([title, *body])


def write_page(results: list[dict[str, Any]], machine: dict[str, str], path: Path) -> None:
    """Write the HTML page; `results` as in the JSON, each with `figures`: {caption: PNG path}."""
    body = "\n".join(_seed(result) for result in results)
    facts = ", ".join(f"{escape(key)} {escape(value)}" for key, value in machine.items())
    title = "Safety alignment a few tokens deep, and deeper"
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n<p>{INTRO}</p>\n{body}\n"
        f"<footer><p>{facts}</p></footer></body></html>\n",
        encoding="utf-8",
    )


def _row(texts: list[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts) + "</tr>"


def _table(head: str, lines: list[str]) -> str:
    body = "\n".join(lines)
    return (
        f'<div class="scroll"><table><thead>{head}</thead><tbody>\n{body}\n</tbody></table></div>'
    )


def _claim(claim: dict[str, Any]) -> str:
    bound = f"{escape(claim['op'])} {claim['bound']:.1f}"
    name = "pass" if claim["holds"] else "fail"
    verdict = f'<td class="{name}">{"pass" if claim["holds"] else "FAIL"}</td>'
    return (
        f"<tr><td>{escape(claim['text'])}</td><td>{claim['measured']:.1f}</td><td>{bound}</td>"
        f"{verdict}</tr>"
    )


def _seed(result: dict[str, Any]) -> str:
    rows, seed = result["rows"], result["seed"]
    figures = (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{_inline(path)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, path in result["figures"].items()
    )
    ce = ", ".join(f"{value:.1f}" for value in result["ce_aligned"][:10])
    return "\n".join(
        [
            f"<h2>Results, seed {seed}</h2>",
            "<p>In %: attack success when the first k tokens of the restricted answer are given;"
            " benign requests answered rightly; accuracy on the benign fine-tuning task.</p>",
            _table(_row(headers(rows), "th"), [_row(cells(row)) for row in rows]),
            "<p>Cross-entropy of the restricted answers under the aligned model, positions 1 to"
            f" 10: {ce} nats.</p>",
            *figures,
            f"<h2>Claims, seed {seed}</h2>",
            _table(
                _row(["claim", "measured", "bound", ""], "th"), list(map(_claim, result["claims"]))
            ),
            f"<p>Seed {seed} took {result['seconds']['total']:.0f} seconds.</p>",
        ]
    )


def _inline(path: str | Path) -> str:
    return base64.b64encode(Path(path).read_bytes()).decode("ascii")
