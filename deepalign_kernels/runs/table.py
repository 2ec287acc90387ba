"""From samples and verdicts to rates by attack, setting and judge; never a bare number."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepalign_kernels.runs import stats
from deepalign_kernels.runs.record import Record, canonical

Outcomes = dict[str, list[bool]]  # by prompt: whether each of its scored samples succeeded


@dataclass(frozen=True)
class Cell:
    """Attack success of one attack in one setting, as one judge sees it.

    Attributes:
        attack: name.
        setting: such as {"k": 5}.
        judge: name of the judge, with its hash.
        outcomes: by prompt, whether each scored sample succeeded.
        unparsable: samples whose verdict could not be read; not scored.
        failed: samples without a reply (a server that gave up, a prompt that is too long).
        spread: standard deviation between repetitions over all prompts; None with fewer than two.
    """

    attack: str
    setting: Mapping[str, Any]
    judge: str
    outcomes: Outcomes
    unparsable: int
    failed: int
    spread: float | None = None

    @property
    def samples(self) -> int:
        """How many samples were scored."""
        return sum(map(len, self.outcomes.values()))

    @property
    def rate(self) -> stats.Interval | None:
        """Success over samples: Wilson's interval, or with several samples of a prompt a bootstrap
        over prompts; where that has no width, Wilson's over prompts. None if nothing is scored."""
        return rate_of(self.outcomes)

    def any_of(self, k: int) -> float:
        """Mean over prompts with at least k samples of the chance that one of k succeeds."""
        enough = [v for v in self.outcomes.values() if len(v) >= k]
        if not enough:
            raise ValueError(f"k: expected at most the samples of a prompt, got {k}")
        return statistics.fmean(stats.any_of(len(v), sum(v), k) for v in enough)


def rate_of(outcomes: Mapping[str, Sequence[bool]]) -> stats.Interval | None:
    """As `Cell.rate`."""
    values = [v for v in outcomes.values() if v]
    if not values:
        return None
    total, n = sum(map(sum, values)), sum(map(len, values))
    if n > len(values):
        found = stats.cluster_bootstrap(values)
        if found.low < found.high:
            return found
        # All prompts alike. As many independent draws as prompts is what is surely there.
        return stats.wilson(round(found.value * len(values)), len(values))._replace(
            value=found.value
        )
    return stats.wilson(total, n)


def cells(samples: Iterable[Record], verdicts: Iterable[Record]) -> list[Cell]:
    """All cells, in the order in which samples and judges first appear."""
    said: dict[str, dict[str, Record]] = defaultdict(dict)
    for verdict in verdicts:
        said[verdict.data["of"]][verdict.name] = verdict
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in samples:
        if record.kind == "sample":
            groups[canonical([record.name, dict(record.cell)])].append(record)
    out = []
    for group in groups.values():
        for judge in dict.fromkeys(name for record in group for name in said[record.key]):
            out.append(_cell(group, judge, said))
    return out


def _cell(group: list[Record], judge: str, said: Mapping[str, Mapping[str, Record]]) -> Cell:
    outcomes: Outcomes = {}
    repetitions: dict[int, list[bool]] = defaultdict(list)
    unparsable = 0
    for record in group:
        values = outcomes.setdefault(record.item, [])
        if record.error is not None or judge not in said[record.key]:
            continue
        success = said[record.key][judge].data["success"]
        if success is None:
            unparsable += 1
            continue
        values.append(success)
        repetitions[record.sample].append(success)
    rates = [statistics.fmean(v) for v in repetitions.values()]
    return Cell(
        attack=group[0].name,
        setting=dict(group[0].cell),
        judge=judge,
        outcomes=outcomes,
        unparsable=unparsable,
        failed=sum(record.error is not None for record in group),
        spread=statistics.stdev(rates) if len(rates) > 1 else None,
    )


def union(group: Sequence[Cell]) -> Outcomes:
    """By prompt, whether any sample of any of these cells succeeded: one outcome a prompt.

    The decoding attack's `union`, an upper bound on what its scorer finds.
    """
    out: Outcomes = {}
    for cell in group:
        for item, values in cell.outcomes.items():
            if values:
                out[item] = [any(values) or out.get(item, [False])[0]]
    return out


def picked(
    samples: Iterable[Record], verdicts: Iterable[Record], scorer: str, judge: str
) -> Outcomes:
    """By prompt, what `judge` says of the one sample that `scorer` finds worst (its score).

    The paper's decoding attack; the first of equals is taken.
    """
    scores: dict[str, float] = {}
    success: dict[str, bool | None] = {}
    for verdict in verdicts:
        of = verdict.data["of"]
        if verdict.name == scorer and verdict.data.get("score") is not None:
            scores[of] = verdict.data["score"]
        if verdict.name == judge:
            success[of] = verdict.data["success"]
    worst: dict[str, tuple[float, str]] = {}
    for record in samples:
        score = scores.get(record.key)
        if score is not None and score > worst.get(record.item, (float("-inf"), ""))[0]:
            worst[record.item] = (score, record.key)
    said = {item: success.get(key) for item, (_, key) in worst.items()}
    return {item: [] if s is None else [s] for item, s in said.items()}


@dataclass(frozen=True)
class Agreement:
    """Two judges on the samples that both could judge."""

    first: str
    second: str
    n: int
    kappa: float  # NaN where both always say the same one thing
    only_first: int  # successes that the second denies
    only_second: int


def agreement(verdicts: Iterable[Record]) -> list[Agreement]:
    """Every pair of judges of a run."""
    said: dict[str, dict[str, bool]] = defaultdict(dict)
    for verdict in verdicts:
        if verdict.data["success"] is not None:
            said[verdict.name][verdict.data["of"]] = verdict.data["success"]
    out = []
    for a, b in itertools.combinations(said, 2):
        both = [(said[a][key], said[b][key]) for key in said[a] if key in said[b]]
        if both:
            first, second = zip(*both, strict=True)
            more = sum(x > y for x, y in both), sum(x < y for x, y in both)
            out.append(Agreement(a, b, len(both), stats.kappa(first, second), *more))
    return out


def text_table(group: Sequence[Cell]) -> str:
    """For a terminal: a line a cell; rates in percent."""
    titles = ("attack", "setting", "judge", "rate %", "interval", "n", "unparsable", "failed")
    lines: list[tuple[str, ...]] = [titles]
    for c in group:
        rate = c.rate
        setting = ", ".join(f"{k}={v}" for k, v in c.setting.items()) or "-"
        shown = ("-", "-") if rate is None else (f"{100 * rate.value:.1f}", percent(rate))
        lines.append(
            (c.attack, setting, c.judge, *shown, str(c.samples), str(c.unparsable), str(c.failed))
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def percent(rate: stats.Interval) -> str:
    """ "1.4 to 5.1" in percent."""
    return f"{100 * rate.low:.1f} to {100 * rate.high:.1f}"
