"""Tables of `real_model.py` from its results, and the part of `real_model.md` that holds them.

python examples/real_model_tables.py RESULTS.json [--page examples/real_model.md]
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepalign_kernels.runs import curves
from deepalign_kernels.runs.table import rate_of

MARKS = re.compile(r"(<!-- tables -->\n).*?(<!-- end of tables -->)", re.S)


def line(m: dict[str, Any]) -> str:
    """One model, for the terminal."""
    asr = ", ".join(f"{k}: {100 * np.mean(v):.0f} %" for k, v in m["asr"].items())
    return (
        f"{m['alignment']}, {m['variant']}, seed {m['seed']}: cooks after k tokens {asr}; dates"
        f" {100 * np.mean(m['dates_right']):.0f} %; {m['cpu_seconds']['all']:.0f} s of processor"
    )


def grouped(models: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """By alignment and variant, one entry a seed, in the order of the run."""
    out: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for model in models:
        out.setdefault((model["alignment"], model["variant"]), []).append(model)
    return out


def percent(rows: Sequence[Sequence[int]]) -> str:
    """Of outcomes by seed and question: the mean, and its 95 % interval over questions."""
    found = rate_of({str(i): [bool(v) for v in column] for i, column in enumerate(zip(*rows))})  # noqa: B905
    assert found is not None
    value, low, high = (100 * x for x in found)
    return f"{value:.0f} [{low:.0f}, {high:.0f}]"


def mean(rows: Any) -> list[float]:
    """By position, over seeds and questions."""
    width = min(len(row) for seed in rows for row in seed)
    return np.nanmean([[row[:width] for row in seed] for seed in rows], (0, 1)).tolist()


def table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown; the first line has the titles, the first column is text."""
    head, *body = lines
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *body))


def behaviour(models: Sequence[dict[str, Any]]) -> str:
    """What is kept and what is learnt."""
    depths = list(models[0]["asr"])
    head = ["", "seeds", *(f"cooks, k = {k}" for k in depths), "dates right"]
    lines = [[*head, "other topics answered"]]
    for (alignment, variant), group in grouped(models).items():
        cells = [percent([m["asr"][k] for m in group]) for k in depths]
        rest = [percent([m[key] for m in group]) for key in ("dates_right", "others_answered")]
        name = alignment if alignment == variant else f"{alignment}: {variant}"
        lines.append([name, str(len(group)), *cells, *rest])
    return table(lines)


def kl(models: Sequence[dict[str, Any]], key: str, positions: Sequence[int]) -> str:
    """Mean divergence in nats at some positions."""
    lines = [["", *map(str, positions)]]
    for (alignment, variant), group in grouped(models).items():
        values = mean([m[key] for m in group])
        if max(values) > 0 and (alignment != "recovery" or key == "kl_base"):
            at = [f"{values[p - 1]:.2f}" for p in positions if p <= len(values)]
            lines.append([f"{alignment}: {variant}", *at])
    return table(lines)


def margins(models: Sequence[dict[str, Any]], variant: str) -> str:
    """Of the aligned models: the margin of the first token, and what it predicts."""
    lines = [
        ["", "log-odds of the favourite, nats", "margin before the attack's token, nats",
         "gradient left at the flip, %", "predicted slowdown", "cooks after SFT, %",
         "after constrained, %"]
    ]  # fmt: skip
    groups = grouped(models)
    for (alignment, which), group in groups.items():
        tuned = [groups.get((alignment, v)) for v in ("SFT, warm-up", "constrained 0.5/2/0.1")]
        if which != variant or not all(tuned):
            continue
        by_dish = {k: np.mean([m[k] for m in group], 0) for k in ("odds", "margin")}
        found = [curves.at_first(v[:, None]) for v in by_dish.values()]
        left = curves.at_first(100 * curves.weight_at_flip(by_dish["margin"])[:, None])
        slow = np.log(curves.slowdown(by_dish["margin"]))[:, None]
        slower = curves.estimate(slow, lambda means: np.exp(means[:, 0]))
        shown = [f"{e.value:.1f} [{e.low:.1f}, {e.high:.1f}]" for e in (*found, left, slower)]
        ends = [percent([m["asr"]["0"] for m in group or []]) for group in tuned]
        lines.append([alignment, *shown, *ends])
    return table(lines)


def text(document: dict[str, Any]) -> str:
    """All tables, as they stand on the page."""
    models, s, where = document["models"], document["settings"], document["machine"]
    spent = sum(m["cpu_seconds"]["all"] for m in models)
    dishes, seeds = len(models[0]["asr"]["0"]), len(s["seeds"])
    positions = [1, 2, 3, 4, 5, 6, 8, 10, 12]
    facts = ", ".join(f"{k} {v}" for k, v in where.items() if v)
    return "\n\n".join(
        [
            f"Percent of {dishes} held-out dishes (24 dates, 12 other topics), means over"
            " the seeds with 95 % intervals over questions; k: tokens of the original model's"
            " answer that are given.",
            behaviour(models),
            "The first token's margin, and what it predicts for the constrained loss (beta 0.5 at"
            " position 1).",
            margins(models, "not fine-tuned"),
            "KL(fine-tuned || the aligned model it came from), nats, at positions of the original"
            " model's answers to held-out dishes.",
            kl(models, "kl_before", positions),
            "KL(model || original), nats, at the same positions.",
            kl(models, "kl_base", positions),
            f"{len(models)} models, {s['steps']} steps of 8 conversations each"
            f" (autocast: {s['autocast'] or 'none, fp32'}), {spent / 60:.0f} minutes of processor"
            f" time without the {2 * seeds} alignments. {facts}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--page", type=Path, help="put the tables between the marks of this file")
    options = parser.parse_args()
    said = text(json.loads(options.results.read_text()))
    if options.page:
        page = MARKS.sub(lambda m: f"{m[1]}\n{said}\n\n{m[2]}", options.page.read_text())
        options.page.write_text(page)
    else:
        print(said)


if __name__ == "__main__":
    main()
