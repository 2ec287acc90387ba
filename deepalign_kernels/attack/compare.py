"""`deepalign compare`: two runs on the same prompts, cell by cell, with paired tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from deepalign_kernels.runs import stats
from deepalign_kernels.runs.grids import SWEPT, over_grids
from deepalign_kernels.runs.store import read_manifest, read_records, read_verdicts
from deepalign_kernels.runs.table import Cell, cells


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare two judged runs on the same prompts: `deepalign compare RUN_A RUN_B`.

    Attributes:
        runs: folders of the two runs.
        first: the first of them, where they are not given without a flag.
        second: the second.
    """

    runs: Positional[tuple[str, ...]] = ()
    first: str = ""
    second: str = ""


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
    adjusted: float  # p by Holm, over the rows with the same `single`
    single: bool  # one setting of a decoding grid that has rows as a whole


def run(options: Options) -> None:
    """Print the table.

    Raises:
        ValueError: not two folders; as `compare`.
    """
    folders = [*options.runs, *(f for f in (options.first, options.second) if f)]
    if len(folders) != 2:
        raise ValueError(f"runs: expected the folders of two runs, got {len(folders)}")
    found = compare(*folders)
    lines = [("attack", "setting", "judge", "n", "first %", "second %", "difference", "p", "Holm")]
    for d in found:
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
    single = sum(d.single for d in found)
    own = f", single decoding settings apart over their {single}" if single else ""
    print(
        "n: prompts that both runs scored; difference in points with its 95 % interval; Holm: p"
        f" adjusted over {len(found) - single} rows{own}"
    )


def compare(first: str | Path, second: str | Path) -> list[Difference]:
    """Every cell that both runs have, in the order of the first, and whole decoding grids.

    A prompt's value is the mean over its samples. p-values are McNemar's or of sign flips. Those of
    single settings of a grid are adjusted among themselves: the grid as a whole, which is what the
    paper compares, stands among the other rows.

    Raises:
        ValueError: no run there, other prompts, no common cell.
    """
    data = [read_manifest(folder).get("data") for folder in (first, second)]
    if data[0] != data[1]:
        raise ValueError(f"second: {second} has other prompts than {first}: {data[1]}, {data[0]}")
    tables = [_table(folder) for folder in (first, second)]
    found = []
    for key, (a, single) in tables[0].items():
        b, _ = tables[1].get(key, (None, False))
        if b is None:
            continue
        items = [i for i, values in a.outcomes.items() if values and b.outcomes.get(i)]
        if not items:
            continue
        one, two = ([sum(c.outcomes[i]) / len(c.outcomes[i]) for i in items] for c in (a, b))
        means = sum(one) / len(one), sum(two) / len(two)
        found.append((a, single, len(items), *means, stats.paired(one, two)))
    if not found:
        raise ValueError(f"second: {second} and {first} have no judged cell in common")
    ps: dict[bool, list[float]] = {s: [r[-1].p for r in found if r[1] == s] for s in (False, True)}
    adjusted = {s: iter(stats.holm(p)) for s, p in ps.items()}
    return [
        Difference(a.attack, dict(a.setting), a.judge, n, one, two, p, next(adjusted[s]), s)
        for a, s, n, one, two, p in found
    ]


def _table(folder: str | Path) -> dict[str, tuple[Cell, bool]]:
    """Cells by what they have in common with those of another run; whether each is one of a grid
    that is there as a whole."""
    samples, verdicts = list(read_records(folder, "sample")), list(read_verdicts(folder))
    manifest, table = read_manifest(folder), cells(samples, verdicts)
    grids = over_grids(table, samples, verdicts, manifest)
    whole = {c.attack for c in grids}
    return {
        repr((c.attack, sorted(c.setting.items()), c.judge)): (c, single)
        for c, single in [
            *((c, c.attack in whole and any(k in c.setting for k in SWEPT)) for c in table),
            *((c, False) for c in grids),
        ]
    }
