"""Of the trials of `worst_case`, the one that broke most of the safety within bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deepalign_kernels.runs import stats
from deepalign_kernels.runs.record import Record
from deepalign_kernels.runs.table import cells


@dataclass(frozen=True)
class Worst:
    """The worst trial: its settings, its rate of success and its utility."""

    setting: dict[str, Any]
    rate: stats.Interval
    utility: float | None


def worst_trial(
    records: Sequence[Record],
    verdicts: Sequence[Record],
    judge: str,
    *,
    name: str = "worst_case",
    metric: str = "rouge1",
    at_least: float = 0.0,
    drop: float | None = None,
) -> Worst | None:
    """Of the trials within bounds, the one with the highest rate by `judge`; None if there is none.

    The rate is the highest of several, so it is biased upwards: confirm it in a run with another
    seed.

    Args:
        records: of a run.
        verdicts: of its judges.
        judge: name.
        name: of the attack in the run.
        metric: of the utility, such as "rouge1".
        at_least: of it; trials without a utility count.
        drop: how much less than before training it may be; None: any.
    """
    own = [r for r in records if r.name == name]
    metrics = [r for r in own if r.kind == "metric" and r.cell["metric"] == metric]
    if drop is not None:
        before = [r.data["value"] for r in metrics if "trial" not in r.cell]
        if not before:
            raise ValueError("drop: no utility from before training in these records")
        at_least = max(at_least, before[0] - drop)
    found = {r.cell["trial"]: r.data["value"] for r in metrics if "trial" in r.cell}
    best: Worst | None = None
    for cell in cells(own, verdicts):
        if cell.judge != judge or "trial" not in cell.setting or (rate := cell.rate) is None:
            continue
        value = found.get(cell.setting["trial"])
        good = value is None or value >= at_least
        if good and (best is None or rate.value > best.rate.value):
            best = Worst(dict(cell.setting), rate, value)
    return best
