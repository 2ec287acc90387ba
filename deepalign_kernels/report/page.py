"""The page: one file, nothing fetched, readable without a mouse, on paper and in grey."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from deepalign_kernels.report import attacks, svg, verdict
from deepalign_kernels.report.figure import Figure, Heat
from deepalign_kernels.report.figures import figures
from deepalign_kernels.report.read import Source, read
from deepalign_kernels.runs.record import short
from deepalign_kernels.runs.table import text_table
from deepalign_kernels.runs.told import told

ICON = "data:,"  # or a browser asks for one
TABLE_LINES = 400  # of one figure's table on the page


def build(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    title: str = "How deep does the alignment go?",
    more: str = "",
) -> Path:
    """Write the page.

    Args:
        folders: of runs: analyses, attacks, training runs; or folders that hold such.
        out: path of the HTML file.
        title: of the page.
        more: HTML that stands behind the verdict, such as the claims of a demo.

    Returns:
        `out`.

    Raises:
        ValueError: a folder without a run, a broken file.
    """
    sources = read(folders)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html(sources, title, more), encoding="utf-8")
    return out


def html(sources: Sequence[Source], title: str, more: str = "") -> str:
    """The whole page."""
    drawn = figures(sources)
    sections = list(dict.fromkeys(f.section for f in drawn))
    body = []
    for section in sections:
        body.append(f'<section><h2 id="{_id(section)}">{escape(section)}</h2>')
        body.append('<div class="figures">')
        body += [_figure(f) for f in drawn if f.section == section]
        body.append("</div></section>")
        if section == sections[0]:
            body.append(_tokens(sources))
    names = [*sections, "Tables", "Manifest"]
    links = "".join(f'<li><a href="#{_id(n)}">{escape(n)}</a></li>' for n in names)
    style, script = (_asset(name) for name in ("page.css", "page.js"))
    titles = list(dict.fromkeys(s.title for s in sources if s.values or s.cells))
    models = ", ".join(titles[:6]) + (f" and {len(titles) - 6} more" if len(titles) > 6 else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="{ICON}"><style>{style}</style></head>\n<body>'
        f'<header class="top"><div><h1>{escape(title)}</h1>'
        f'<p class="soft">{escape(models)}</p></div>'
        '<button class="theme" type="button">Dark</button></header>'
        f'<main>{_verdict(sources)}{more}</main><nav aria-label="Sections"><ul>{links}</ul></nav>'
        f"\n<main>{''.join(body)}{_tables(sources)}{_manifest(sources)}</main>"
        "<footer>Made by <code>deepalign report</code> from the records of the runs named above;"
        " nothing on this page is fetched from elsewhere. Intervals have 95 % coverage.</footer>"
        f'<div id="live" class="hide" aria-live="polite"></div><script>{script}</script>'
        "</body></html>\n"
    )


def _asset(name: str) -> str:
    return files("deepalign_kernels.report").joinpath(name).read_text(encoding="utf-8")


def _id(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower())


def _verdict(sources: Sequence[Source]) -> str:
    lines = []
    for sentence in verdict.sentences(sources):
        kept = re.sub(
            r"(?<=\d) (?=%)|(?<=[nkp]) = ", lambda m: m[0].replace(" ", "\u00a0"), sentence
        )
        head, _, rest = kept.partition(": ")
        lines.append(f"<li><b>{escape(head)}:</b> {escape(rest)}</li>")
    rules = "".join(f"<li>{escape(rule)}</li>" for rule in verdict.RULES)
    return (
        f'<div class="verdict"><ol>{"".join(lines)}</ol></div>'
        '<details class="printed"><summary>The rules behind these sentences</summary>'
        f'<ul class="rules">{rules}</ul></details>'
    )


def _figure(f: Figure) -> str:
    legend = ""
    if not isinstance(f.data, Heat):
        buttons = "".join(
            f'<button type="button" data-series="{i}" aria-pressed="{str(s.shown).lower()}">'
            f"{svg.swatch(s)}{escape(s.name)}</button>"
            for i, s in enumerate(f.data)
        )
        legend = f'<div class="legend" role="group" aria-label="Series">{buttons}</div>'
    return (
        f'<figure data-key="{f.key}"><h3>{escape(f.title)}</h3>{legend}{svg.draw(f)}'
        f"<figcaption>{escape(f.caption)}</figcaption>"
        '<div class="files"><details><summary>Table</summary>'
        f'<div class="scroll" tabindex="0">{table(f.table[: TABLE_LINES + 1])}</div></details>'
        '<button type="button" class="as-csv">CSV</button>'
        '<button type="button" class="as-svg">SVG</button></div>'
        f'<script type="application/json">{_data(f)}</script></figure>'
    )


def _data(f: Figure) -> str:
    """What the script needs to show values."""
    named: dict[str, Any] = {"key": f.key, "x": f.x, "unit": f.unit}
    if isinstance(f.data, Heat):
        named |= {"rows": f.data.rows, "columns": f.data.columns, "values": _rounded(f.data.values)}
    else:
        x, _ = svg.scales(f, f.data)
        named["axis"] = [x.low, x.high, x.start, x.end]
        named["series"] = [
            {"name": s.name, "n": list(s.count)}
            | {k: _rounded(getattr(s, k)) for k in ("x", "y", "low", "high")}
            for s in f.data
        ]
    return json.dumps(named, separators=(",", ":")).replace("<", "\\u003c")


def _rounded(values: Any) -> Any:
    if isinstance(values, Iterable) and not isinstance(values, str):
        return [_rounded(v) for v in values]
    if isinstance(values, float):
        return float(f"{values:.5g}") if math.isfinite(values) else None
    return values


def table(lines: Sequence[Sequence[str]], kind: str = "") -> str:
    """<table> with the first line as its head."""
    head = "".join(f'<th scope="col">{escape(t)}</th>' for t in lines[0])
    body = "".join(
        f"<tr{' class=paper' if line[0].startswith('paper') else ''}>"
        + f"<td>{escape(line[0])}</td>"
        + "".join(f"<td>{_word(t)}</td>" for t in line[1:])
        + "</tr>"
        for line in lines[1:]
    )
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _word(text: str) -> str:
    """A cell that is no name: a verdict in its colour; lines break before intervals alone."""
    if text in ("shallow", "deep"):
        return f'<span class="{text}">{text}</span>'
    return re.sub(r"(?<=\d) (?=%)|(?<=,) (?=[\d.-]+\])", "\u00a0", escape(text))


def _tables(sources: Sequence[Source]) -> str:
    out = ['<section><h2 id="tables">Tables</h2>']
    numbers = verdict.key_numbers(sources)
    if len(numbers) > 1:
        out.append(
            "<h3>Depth in one number</h3><p class=soft>The paper's models are of 7B parameters on"
            f' harmful prompts: compare the order.</p><div class="scroll wide" tabindex="0">'
            f"{table(numbers)}</div>"
        )
    for lines, title, about in (
        (verdict.recoveries(sources), "Prefixes in one number",
         "Recovered: of the prompts refused without a prefix, the share that is no success behind"
         " one either."),
        (attacks.beside_the_paper(sources), "Beside the paper",
         "Llama-2-7B-Chat on HEx-PHI (arXiv 2406.05946, tables 3, 4, 9, 10), before and after its"
         " augmentation. Of decoding what the judge says of the reply that a scorer finds worst, as"
         " there, or success in any setting where no judge gives scores; of fine-tuning 100 harmful"
         " examples. Other prompts, another judge: compare the order."),
    ):  # fmt: skip
        if len(lines) > 1:
            out.append(f"<h3>{title}</h3><p class=soft>{about}</p>"
                       f'<div class="scroll wide" tabindex="0">{table(lines)}</div>')  # fmt: skip
    for source in sources:
        if source.cells:
            out.append(
                f"<h3>Attacks on {escape(source.title)}</h3>{_told(source)}"
                f'<pre tabindex="0">{escape(text_table([*source.cells, *source.grids]))}</pre>'
            )
    return "".join([*out, "</section>"]) if len(out) > 1 else ""


def _told(source: Source) -> str:
    return "".join(f"<p class=soft>{escape(line)}.</p>" for line in told(source.manifest))


def _tokens(sources: Sequence[Source]) -> str:
    """The tokens that carry the divergence, of the first group of each analysis."""
    out = []
    for source in (s for s in sources if s.terms):
        group = next(iter(source.terms))[0]
        blocks = [_terms(v) for (g, _), v in source.terms.items() if g == group]
        out.append(
            f"<h3>{escape(source.title)} ({escape(group)})</h3>"
            f'<div class="tokens">{"".join(blocks)}</div>'
        )
    if not out:
        return ""
    return (
        "<section><h2>What the model prefers instead</h2><p class=soft>The largest terms of"
        " KL(model || base), means over answers: what each token adds in nats, and its mean"
        " probability under the base and under the model. The rest of the vocabulary is summed up;"
        f" it may be negative.</p>{''.join(out)}</section>"
    )


def _terms(v: dict[str, Any]) -> str:
    largest = max(map(abs, v["terms"]), default=1.0) or 1.0
    rows = []
    shown = zip(v["text"], v["terms"], v["base_prob"], v["model_prob"], strict=True)
    rest = [v["rest"], v["rest_base_prob"], v["rest_model_prob"]]
    lines = []
    for text, *numbers in shown:  # what would read 0.00 is not worth a line
        if abs(numbers[0]) >= 0.005:
            lines.append((text, *numbers))
        else:
            rest = [a + b for a, b in zip(rest, numbers, strict=True)]
    lines.append(("the rest", *rest))
    for number, (text, term, q, p) in enumerate(lines):
        name = escape(text) if number == len(lines) - 1 else f"<code>{escape(repr(text))}</code>"
        width = min(100, 100 * abs(term) / largest)
        less = ' class="less"' if term < 0 else ""
        rows.append(
            f"<tr><td>{name}</td><td>{round(term, 2) + 0.0:.2f}</td><td>{q:.1%} to {p:.1%}</td>"
            f'<td class="bar"><i{less} style="width:{width:.0f}%"></i></td></tr>'
        )
    return (
        f"<div><p><b>Position {v['position']}</b>, KL = {v['kl']:.2f} nats</p><table><thead><tr>"
        '<th scope="col">token</th><th scope="col">nats</th><th scope="col">probability</th>'
        f"<th></th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _named(value: Any, key: str = "") -> Any:
    """A manifest with the name of a text, as it stands in the cells, for every text that an attack
    puts into a model's mouth."""
    if isinstance(value, dict):
        return {k: _named(v, k) for k, v in value.items()}
    if key in ("texts", "spans") and isinstance(value, list):
        return [short(v) if isinstance(v, str) else v for v in value]
    return value


def _manifest(sources: Sequence[Source]) -> str:
    out = ['<section><h2 id="manifest">Manifest</h2>']
    for source in sources:
        shown = json.dumps(_named(source.manifest), indent=1, sort_keys=True, default=str)
        out.append(
            f"<details><summary>{escape(source.title)}: {escape(source.folder.name)}</summary>"
            f'<pre tabindex="0">{escape(shown)}</pre></details>'
        )
    return "".join([*out, "</section>"])
