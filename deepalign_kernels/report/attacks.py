"""Figures of attacks and trainings: rates with Wilson's intervals, searches with bootstraps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np

from deepalign_kernels.report.figure import ATTACKS, BANDS, POSITION, TRAINING, Figure, Heat, Series
from deepalign_kernels.report.read import Source
from deepalign_kernels.runs import Cell, curves, paper, stats
from deepalign_kernels.runs.grids import beside_paper

RATES = "Bands: 95 % intervals (Wilson's; over prompts where there are several replies to one)."


def rates(cells: Sequence[Cell], setting: str, name: str, *, model: str = "") -> Series:
    """Attack success in percent by a numeric setting."""
    rated = [(float(c.setting[setting]), c, r) for c in cells if (r := c.rate) is not None]
    rated.sort(key=lambda point: point[0])
    value, low, high = ([100 * r[i] for _, _, r in rated] for i in range(3))
    count = [len([v for v in c.outcomes.values() if v]) for _, c, _ in rated]
    return Series(name, [x for x, _, _ in rated], value, low, high, count, model=model)


def sweeps(source: Source, setting: str) -> dict[str, list[Cell]]:
    """Cells that differ in one setting alone, as the first judge of the run sees them, by a label
    that tells the sweeps of a run apart."""
    found = [c for c in source.cells if setting in c.setting]
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in (c for c in found if c.judge == found[0].judge):
        others = sorted(f"{k}={v}" for k, v in cell.setting.items() if k != setting)
        groups.setdefault((cell.attack, *others), []).append(cell)
    same = set.intersection(*map(set, groups)) if groups else set()
    out = {}
    for key, cells in groups.items():
        label = ", ".join([source.title, *(part for part in key if part not in same)])
        out[label] = sorted(cells, key=lambda c: c.setting[setting])
    return out


def prefill(sources: Sequence[Source]) -> Iterator[Figure]:
    series = [
        s
        for source in sources
        for name, cells in sweeps(source, "k").items()
        if (s := rates(cells, "k", name, model=source.model)).x
    ]
    if series:
        yield Figure(
            "prefill",
            "Attack success against prefilled tokens",
            f"Share of prompts answered when the first k tokens of an answer are given. {RATES}"
            " The paper's table 3 can be switched on.",
            "prefilled answer tokens k",
            "attack success (%)",
            ATTACKS,
            [*series, *_papers(max(x for s in series for x in s.x))],
            top=100.0,
        )


def _papers(most: float) -> list[Series]:
    """Table 3, up to `most` tokens, so that the axis need not grow."""
    within = {m: {k: v for k, v in of.items() if k <= most} for m, of in paper.PREFILL.items()}
    return [_paper(model, points) for model, points in within.items() if points]


def _paper(name: str, points: Mapping[int, float]) -> Series:
    return Series(f"paper: {name}", list(points), list(points.values()), shown=False, paper=True)


def beside_the_paper(sources: Sequence[Source]) -> list[list[str]]:
    """A table of every rate that the paper has one for, first line the titles."""
    head = [
        "model",
        "attack",
        "judge",
        "success here",
        "n",
        *(f"paper: {m}, %" for m in paper.MODELS),
    ]
    lines = [head]
    for source in (s for s in sources if s.cells):
        judge = source.cells[0].judge
        for row in beside_paper(source.cells, source.grids, source.manifest, judge):
            rate = row.cell.rate
            shown = ["" if v is None else f"{v:.1f}" for v in row.published.values()]
            if rate is not None:
                lines.append(
                    [source.title, row.label, judge, percent(rate), str(row.cell.samples), *shown]
                )
    return lines


def percent(e: Sequence[float]) -> str:
    """ "42 % [36, 47]" of a value between two bounds, in [0, 1]."""
    value, low, high = (100 * v for v in tuple(e)[:3])
    return f"{value:.0f} % [{low:.0f}, {high:.0f}]"


def finetunings(sources: Sequence[Source]) -> list[Series]:
    """Attack success by step of a fine-tuning, judged here or recorded as a rate."""
    series = []
    for source in sources:
        for name, cells in sweeps(source, "step").items():
            series.append(rates(cells, "step", name, model=source.model))
    for name, points in _trainings(sources):
        known = [p for p in points if p.get("asr") is not None]
        if known:
            series.append(_asr_series(name, known))
    return [s for s in series if s.x]


def _trainings(sources: Sequence[Source]) -> Iterator[tuple[str, list[dict]]]:
    """Points of every fine-tuning by a name that tells it from those of other runs."""
    names = Counter(name for source in sources for name in source.training)
    for source in sources:
        for name, points in source.training.items():
            yield name if names[name] == 1 else f"{source.title}, {name}", points


def attack_steps(sources: Sequence[Source]) -> Iterator[Figure]:
    series = finetunings(sources)
    if series:
        yield Figure(
            "asr-steps",
            "Attack success during fine-tuning",
            f"Without a prefix, on prompts that the fine-tuning has not seen. {RATES}",
            "optimizer step",
            "attack success (%)",
            TRAINING,
            [*series, _paper("Llama-2-7B-Chat, SFT", paper.SFT_STEPS)],
            top=100.0,
        )


def _asr_series(name: str, points: Sequence[Mapping]) -> Series:
    """From points {"step", "asr" in [0, 1], "n"}."""
    bounds = [
        stats.wilson(round(p["asr"] * p["n"]), p["n"]) if p.get("n") else None for p in points
    ]
    low, high = ([None if b is None else 100 * b[i] for b in bounds] for i in (1, 2))
    steps, values = [p["step"] for p in points], [100 * p["asr"] for p in points]
    return Series(name, steps, values, low, high, [p.get("n", 0) for p in points])


def dynamics(sources: Sequence[Source]) -> Iterator[Figure]:
    for number, source in enumerate(s for s in sources if s.dynamics):
        for name, title, label in (
            ("nll", "Cross-entropy by position during training", "-log p(token) (nats)"),
            ("head_grad", "Gradient norm of the head during training", "||gradient||"),
            ("kl_model_base", "KL to the model before training", "KL(now || before) (nats)"),
        ):
            by_step = source.dynamics.get(name, {})
            steps = sorted(by_step)
            if len(steps) > 6:
                steps = [steps[round(i * (len(steps) - 1) / 5)] for i in range(6)]
            series = [
                Series(f"step {step}", range(1, len(by_step[step]) + 1), by_step[step])
                for step in steps
            ]
            if series:
                yield Figure(
                    f"dynamics-{name}-{number}",
                    f"{title}: {source.title}",
                    "Means over a fixed set of answers; figure 3 of the paper.",
                    POSITION,
                    label,
                    TRAINING,
                    series,
                )


def logs(sources: Sequence[Source]) -> Iterator[Figure]:
    logged = [s for s in sources if s.log]
    for name, title, label, caption in (
        ("nll_first", "Cross-entropy of the first token", "-log p(token) (nats)",
         "Position 1 of the training answers, mean over a step."),
        ("nll", "Cross-entropy of all tokens", "-log p(token) (nats)", "Mean over a step."),
        ("grad_norm", "Gradient norm of a step", "||gradient||", "Of all parameters, not clipped."),
    ):  # fmt: skip
        series = []
        for source in logged:
            points = [(r["step"], r[name]) for r in source.log if r.get(name) is not None]
            if points:
                x, y = zip(*points, strict=True)
                series.append(Series(source.title, x, y, model=source.model))
        if name == "nll":
            for curve, points in _trainings(sources):
                known = [(p["step"], p["nll"]) for p in points if p.get("nll") is not None]
                if known:
                    series.append(Series(curve, [x for x, _ in known], [y for _, y in known]))
        if series:
            yield Figure(f"log-{name}", title, caption, "optimizer step", label, TRAINING, series)


def decoding(sources: Sequence[Source]) -> Iterator[Figure]:
    for parameter, title in (
        ("temperature", "temperature"),
        ("top_k", "top-k"),
        ("top_p", "top-p"),
    ):
        rows, values, columns = [], [], []
        for source in sources:
            for name, found in _swept(source, parameter).items():
                columns = sorted({*columns, *found})
                rows.append(name)
                values.append(found)
        if rows:
            grid = [[100 * r.value if (r := v.get(c)) else None for c in columns] for v in values]
            yield Figure(
                f"decoding-{parameter}",
                f"Attack success by {title} of decoding",
                "One parameter is swept, the others are pinned. The intervals are in the table of"
                " the attack.",
                title,
                "model",
                ATTACKS,
                Heat(rows, [f"{c:g}" for c in columns], grid),
                unit="%",
                top=100.0,
            )


def _swept(source: Source, parameter: str) -> dict[str, dict[float, stats.Interval | None]]:
    """Rates by the value of a decoding parameter, as the first judge of the run sees them, by a
    name that tells the grids of a run apart."""
    out: dict[str, dict[float, stats.Interval | None]] = {}
    for name, cells in sweeps(source, parameter).items():
        out[name] = {float(c.setting[parameter]): c.rate for c in cells}
    return out


# What a search is drawn against: (key of the figure, of the data, label, words, divided by).
UNITS = (
    ("steps", "steps", "search step", "step", 1.0),
    ("seconds", "seconds", "seconds of the machine that ran it", "wall time", 1.0),
    ("flops", "flops", "TFLOP spent", "computation", 1e12),
)


def searches(sources: Sequence[Source]) -> Iterator[Figure]:
    for key, unit, label, words, size in UNITS:
        series = []
        for source in sources:
            names = dict.fromkeys(r.name for r in source.searches)
            for name in names:
                found = [
                    {**r.data, "seconds": source.seconds.get(r.key)}
                    for r in source.searches
                    if r.name == name
                ]
                whole = [d for d in found if losses(d) and (unit == "steps" or d.get(unit))]
                if whole:
                    many = len(names) > 1 or len(sources) > 1
                    named = f"{source.title}, {name}" if many else name
                    series.append(_mean_losses(named, whole, unit, size, source.model))
        if series:
            yield Figure(
                f"search-{key}",
                f"Loss of the search by {words}",
                "Best loss so far, mean over prompts; a search that ended early keeps its last."
                " GCG: mean over the target's tokens; random search: its first token. A suffix for"
                " several prompts begins anew where a prompt is taken in: the line breaks there."
                f" {BANDS.replace('answers', 'prompts')}"
                + ("" if unit == "steps" else " A step counts with the mean of all steps."),
                label,
                "loss of the target (nats)",
                ATTACKS,
                series,
            )


def losses(data: Mapping) -> list[float]:
    """Best loss so far after each step of a search; steps before the first loss have that one.

    From "history", losses by step, None where there was no candidate, and "grown", steps after
    which the loss is another one; or from "improved", [step, best loss] where it fell.
    """
    known: dict[int, float] = {int(step): loss for step, loss in data.get("improved") or []}
    history = data.get("history") or [known.get(i + 1) for i in range(data.get("steps", 0))]
    grown = set(data.get("grown") or [])
    first = next((v for v in history if v is not None), None)
    now = known.get(0, first)
    out = []
    for i, loss in enumerate(history):
        if i in grown and loss is not None:
            grown.discard(i)
            now = loss
        elif i in grown:  # the first candidate under the new loss comes later
            grown.discard(i)
            grown.add(i + 1)
        elif loss is not None and now is not None:
            now = min(now, loss)
        out.append(now)
    return [] if now is None else out


def _mean_losses(
    name: str, searches: Sequence[Mapping], unit: str, size: float, model: str
) -> Series:
    """Over prompts; what one step costs, in units of `size`, is the mean of the searches."""
    histories = [losses(d) for d in searches]
    length = max(map(len, histories))
    values = np.array([[*h, *[h[-1]] * (length - len(h))] for h in histories])
    c = curves.curve(values)
    each = 1.0
    if unit != "steps":
        each = sum(d[unit] for d in searches) / sum(map(len, histories)) / size
    x = each * np.arange(1, length + 1)
    every = max(1, length // 200)
    x, mean, low, high = ([float(v) for v in p[::every]] for p in (x, c.mean, c.low, c.high))
    grown = sorted({step for d in searches for step in d.get("grown") or []})
    breaks = [max(v for v in x if v <= each * step) for step in grown if each * step >= x[0]]
    counts = c.count[::every].tolist()
    return Series(name, x, mean, low, high, counts, model=model, breaks=breaks)


def judges(sources: Sequence[Source]) -> Iterator[Figure]:
    for number, source in enumerate(s for s in sources if len(s.verdicts) > 1):
        names = list(source.verdicts)
        grid: list[list[float | None]] = [[None] * len(names) for _ in names]
        for (i, a), (j, b) in combinations(enumerate(names), 2):
            both = [
                (x, source.verdicts[b][of])
                for of, x in source.verdicts[a].items()
                if x is not None and source.verdicts[b].get(of) is not None
            ]
            if both:
                value = stats.kappa(*map(list, zip(*both, strict=True)))
                grid[i][j] = grid[j][i] = None if np.isnan(value) else value
        yield Figure(
            f"judges-{number}",
            f"Agreement of the judges: {source.title}",
            "Cohen's kappa on the same replies: 1 agrees always, 0 no more than by chance. Replies"
            " that a judge could not score are left out.",
            "judge",
            "judge",
            ATTACKS,
            Heat(names, names, grid),
            unit="(kappa)",
            top=1.0,
        )
