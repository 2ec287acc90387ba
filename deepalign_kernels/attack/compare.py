"""`deepalign compare`: two runs on the same prompts, cell by cell, with paired tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepalign_kernels.runs import stats
from deepalign_kernels.runs.store import read_manifest, read_records, read_verdicts
from deepalign_kernels.runs.table import Cell, cells


@dataclass(frozen=True)
class Options:
    """Compare two judged runs on the same prompts.

    Attributes:
        first: folder of a run.
        second: folder of another run.
    """

    first: str
    second: str


@dataclass(frozen=True)
class Difference:
    """One cell that both runs have; rates in [0, 1], over the prompts that both scored."""

    attack: str
    setting: dict[str, Any]
    judge: str
    prompts: int
    first: float
    second: float
    paired: stats.Paired
    adjusted: float  # p by Holm, over all cells of this comparison


def run(options: Options) -> None:
    """Print the table."""
    lines = [("attack", "setting", "judge", "n", "first %", "second %", "difference", "p", "Holm")]
    for d in compare(options.first, options.second):
        setting = ", ".join(f"{k}={v}" for k, v in d.setting.items()) or "-"
        low, high = 100 * d.paired.low, 100 * d.paired.high
        lines.append(
            (
                d.attack, setting, d.judge, str(d.prompts), f"{100 * d.first:.1f}",
                f"{100 * d.second:.1f}",
                f"{100 * d.paired.difference:+.1f} ({low:+.1f} to {high:+.1f})",
                f"{d.paired.p:.2g}", f"{d.adjusted:.2g}",
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip())


def compare(first: str | Path, second: str | Path) -> list[Difference]:
    """Every cell that both runs have, in the order of the first.

    A prompt's value is the mean over its samples. p-values are McNemar's or of sign flips, adjusted
    together.

    Raises:
        ValueError: no run there, other prompts, no common cell.
    """
    data = [read_manifest(folder).get("data") for folder in (first, second)]
    if data[0] != data[1]:
        raise ValueError(f"second: {second} has other prompts than {first}: {data[1]}, {data[0]}")
    tables = [_table(folder) for folder in (first, second)]
    found = []
    for key, a in tables[0].items():
        b = tables[1].get(key)
        if b is None:
            continue
        items = [i for i, values in a.outcomes.items() if values and b.outcomes.get(i)]
        if not items:
            continue
        one, two = ([sum(c.outcomes[i]) / len(c.outcomes[i]) for i in items] for c in (a, b))
        means = sum(one) / len(one), sum(two) / len(two)
        found.append((a, len(items), *means, stats.paired(one, two)))
    if not found:
        raise ValueError(f"second: {second} and {first} have no judged cell in common")
    adjusted = stats.holm([p.p for *_, p in found])
    return [
        Difference(a.attack, dict(a.setting), a.judge, n, one, two, p, q)
        for (a, n, one, two, p), q in zip(found, adjusted, strict=True)
    ]


def _table(folder: str | Path) -> dict[str, Cell]:
    table = cells(list(read_records(folder, "sample")), list(read_verdicts(folder)))
    return {repr((c.attack, sorted(c.setting.items()), c.judge)): c for c in table}
