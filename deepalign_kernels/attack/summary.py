"""What `deepalign attack` prints of a judged run: tables, whole grids, the paper beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepalign_kernels.attack.calibration import corrected
from deepalign_kernels.attack.failures import failures
from deepalign_kernels.attack.worst import worst_trial
from deepalign_kernels.runs.grids import Beside, beside_paper, is_grid, label, over_grids
from deepalign_kernels.runs.record import Record
from deepalign_kernels.runs.store import loaded, read_manifest, read_records, read_verdicts
from deepalign_kernels.runs.table import (
    Cell,
    agreement,
    cells,
    percent,
    rate_of,
    text_table,
    union,
)
from deepalign_kernels.runs.told import told


def summary(
    folder: str | Path,
    model: str = "",
    *,
    records: Sequence[Record] | None = None,
    labels: Mapping[str, bool] | None = None,
) -> str:
    """Tables of a judged run, without any prompt or reply.

    Args:
        folder: of the run.
        model: "initial" or "augmented" puts the paper's numbers beside.
        records: of the run, if they are read already.
        labels: `calibration.read_labels`: rates corrected by these stand beside.

    Raises:
        ValueError: a label of no reply of the run.
    """
    records = loaded(read_records(folder)) if records is None else records
    samples, verdicts = [r for r in records if r.kind == "sample"], loaded(read_verdicts(folder))
    table, manifest = cells(samples, verdicts), read_manifest(folder)
    grids = over_grids(table, samples, verdicts, manifest)
    parts = [
        *told(manifest),
        *_as_text(manifest, samples),
        text_table(table),
        *(_whole(c) for c in grids if c.rate is not None),
    ]
    for found in (r for r in records if r.kind == "search"):
        loss = "no suffix" if found.error else f"loss {found.data['loss']:.3f}"
        ended = found.data.get("ended", "steps")
        steps = f"{found.data.get('steps')} steps" + (f" ({ended})" if ended != "steps" else "")
        detail = found.error or f"{steps}, {found.data['flops']:.2g} FLOP"
        parts.append(f"{found.name} {found.item or 'universal'}: {loss}, {detail}")
    for metric in (r for r in records if r.kind == "metric"):
        where = ", ".join(f"{k}={v}" for k, v in metric.cell.items())
        parts.append(f"{metric.name} utility ({where}): {100 * metric.data['value']:.1f} %")
    parts += _any(table, manifest) + _answered(table) + _worst(manifest, records, verdicts)
    parts += [
        f"judges {a.first} and {a.second}: kappa {a.kappa:.2f} on {a.n} replies;"
        f" {a.only_first} successes for the first alone, {a.only_second} for the second alone"
        for a in agreement(verdicts)
    ]
    if labels:
        parts += corrected(table, samples, verdicts, labels)
    if model:
        for judge in dict.fromkeys(c.judge for c in table):
            parts += _beside(beside_paper(table, grids, manifest, judge), model)
    parts += failures(records, verdicts)
    return "\n".join(parts)


def _as_text(manifest: Mapping[str, Any], samples: Sequence[Record]) -> list[str]:
    """Of a chat server, which is given text, the prefixes that are other tokens there."""
    if (manifest.get("engine") or {}).get("send") != "chat":
        return []
    found = [r.data["survives_as_text"] for r in samples if r.data.get("prefilled")
             and "survives_as_text" in r.data]  # fmt: skip
    lost = found.count(False)
    told = (
        f"NOT EXACT: {lost} of {len(found)} prefixes are other tokens as text, which a chat takes"
    )
    return [told] if lost else []


def _whole(c: Cell) -> str:
    unread = f", {c.unparsable} unparsable" if c.unparsable else ""
    return f"{label(c)} ({c.judge}): {_shown(c.rate)}, n = {c.samples}{unread}"


def _any(table: Sequence[Cell], manifest: Mapping[str, Any]) -> list[str]:
    """Of cells with several samples of a prompt, those of decoding grids apart: any of all and of
    fewer, and the standard deviation between repetitions."""
    out = []
    for c in table:
        n, rate = max(map(len, c.outcomes.values()), default=0), rate_of(union([c]))
        if n > 1 and rate is not None and not is_grid(manifest, c.attack):
            parts = [f"{100 * c.any_of(k):.1f} % of {k}" for k in (1, 2, 5, 10, 20, 50) if k < n]
            if c.spread is not None:
                parts.append(f"repetitions {100 * c.spread:.1f} points apart (standard deviation)")
            out.append(
                f"{label(c)}, any of {n} samples ({c.judge}): {_shown(rate)}; {', '.join(parts)}"
            )
    return out


def _answered(table: Sequence[Cell]) -> list[str]:
    """Of harmless prompts, a reply that a judge calls no success is a refusal, or empty."""
    out = []
    for cell in table:
        if cell.attack == "direct" and cell.setting.get("benign") and cell.rate is not None:
            refused = rate_of({i: [not v for v in values] for i, values in cell.outcomes.items()})
            out.append(f"over-refusal ({cell.judge}): {_shown(refused)} of {cell.samples} replies")
    return out


def _worst(
    manifest: Mapping[str, Any], records: Sequence[Record], verdicts: Sequence[Record]
) -> list[str]:
    out = []
    for name, about in manifest["attacks"].items():
        if about.get("attack") != "worst_case":
            continue
        metric, drop = about["metric"], about["utility_drop"]
        for judge in dict.fromkeys(v.name for v in verdicts):
            found = worst_trial(records, verdicts, judge, name=name, metric=metric, drop=drop)
            if found is not None:
                where = ", ".join(f"{k}={v}" for k, v in found.setting.items())
                kept = "" if found.utility is None else f", {metric} {100 * found.utility:.1f} %"
                out.append(f"{name}, worst trial ({judge}): {_shown(found.rate)}, {where}{kept}")
    return out


def _beside(rows: Sequence[Beside], model: str) -> list[str]:
    out = []
    for row in rows:
        known, rate = row.published[model], row.cell.rate
        if known is None or rate is None:
            continue
        inside = 100 * rate.low <= known <= 100 * rate.high
        out.append(
            f"paper, {row.label} ({row.cell.judge}): {known:.1f}, here {_shown(rate)}:"
            f" {'inside' if inside else 'outside'} the interval"
        )
    return out


def _shown(rate: Any) -> str:
    return f"{100 * rate.value:.1f} % ({percent(rate)})"
