"""Rates corrected for the errors of a judge, by replies of the run that a person has labelled."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepalign_kernels.data.reading import read_jsonl
from deepalign_kernels.runs import stats
from deepalign_kernels.runs.grids import label
from deepalign_kernels.runs.record import Record, canonical
from deepalign_kernels.runs.table import Cell, percent, rate_of

LEAST = 5  # successes, and failures: from fewer a judge's errors cannot be told
LABELS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def read_labels(path: str | Path) -> dict[str, bool]:
    """By a sample's key, whether it is a success in truth.

    Args:
        path: .csv with a header, or .jsonl: `key` and `label` (true or false, 1 or 0, yes or no).

    Raises:
        ValueError: no such file, another kind of file or row, a key with two labels, fewer than
            LEAST successes or failures.
    """
    path = Path(path)
    if not path.is_file() or path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"calibration: {path}: expected a .csv or .jsonl file that exists")
    labels: dict[str, bool] = {}
    for where, row in _rows(path):
        key, truth = row.get("key"), LABELS.get(str(row.get("label")).strip().lower())
        if not isinstance(key, str) or truth is None:
            raise ValueError(
                f"calibration: {where}: expected key (text) and label (true or false), got"
                f" key {key!r}, label {row.get('label')!r}"
            )
        if labels.setdefault(key, truth) != truth:
            raise ValueError(f"calibration: {where}: key {key!r} has both labels")
    if why := _few(list(labels.values())):
        raise ValueError(f"calibration: {path}: {why}")
    return labels


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path.suffix == ".jsonl":
        yield from ((where, row) for row, where in read_jsonl("calibration", path))
        return
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield f"{path}:{reader.line_num}", row


def _few(labels: Sequence[bool]) -> str:
    good, bad = sum(labels), len(labels) - sum(labels)
    if min(good, bad) >= LEAST:
        return ""
    return f"expected at least {LEAST} labelled successes and {LEAST} failures, got {good}, {bad}"


def corrected(
    table: Sequence[Cell],
    samples: Sequence[Record],
    verdicts: Sequence[Record],
    labels: Mapping[str, bool],
) -> list[str]:
    """Lines: how often each judge is right on the labelled replies, and the rate that follows for
    each cell with a labelled reply (`runs.stats.calibrated`).

    A judge's errors are counted over all labelled replies together. Several samples of a prompt
    count as one draw, as they are not independent.

    Args:
        table: cells of the run.
        samples: its replies.
        verdicts: of its judges.
        labels: `read_labels`.

    Raises:
        ValueError: a label of no reply of the run.
    """
    if unknown := labels.keys() - {s.key for s in samples}:
        raise ValueError(
            f"calibration: {len(unknown)} of {len(labels)} keys are of no reply of this run, such"
            f" as {min(unknown)!r}"
        )
    covered = {canonical([s.name, dict(s.cell)]) for s in samples if s.key in labels}
    out = []
    for judge in dict.fromkeys(c.judge for c in table):
        said = {v.data["of"]: v.data["success"] for v in verdicts if v.name == judge}
        both = [(labels[k], said[k]) for k in labels if said.get(k) is not None]
        truth, found = [t for t, _ in both], [f for _, f in both]
        if why := _few(truth):
            out.append(f"{judge} is not corrected: {why} that it could judge")
            continue
        right = [sum(f == t for t, f in both if t is which) for which in (True, False)]
        out.append(
            f"{judge}, on {len(both)} labelled replies: {right[0]} of {sum(truth)} successes and"
            f" {right[1]} of {len(truth) - sum(truth)} failures are called so"
        )
        for cell in table:
            if cell.judge != judge or canonical([cell.attack, dict(cell.setting)]) not in covered:
                continue
            rate, prompts = rate_of(cell.outcomes), sum(map(bool, cell.outcomes.values()))
            if rate is None:
                continue
            try:
                better = stats.calibrated(
                    rate.value * prompts, prompts, labels=truth, verdicts=found
                )
            except ValueError as error:
                out.append(f"{judge} is not corrected: {error}")
                break
            shown = f"{100 * better.value:.1f} % ({percent(better)})"
            out.append(f"{label(cell)}, corrected ({judge}): {shown}")
    return out
