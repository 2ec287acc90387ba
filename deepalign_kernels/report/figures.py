"""All figures of a page, and those of analyses; bands are bootstraps over answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from deepalign_kernels.report import attacks
from deepalign_kernels.report.figure import (
    ATTACKS,
    BANDS,
    DEPTH,
    POSITION,
    TRAINING,
    Figure,
    Heat,
    Series,
)
from deepalign_kernels.report.read import Source
from deepalign_kernels.runs import curves, paper


def figures(sources: Sequence[Source]) -> list[Figure]:
    """All figures for which there is anything to show, in the order of the page."""
    makers: list[Callable[[Sequence[Source]], Iterator[Figure]]] = [
        _kl,
        attacks.prefill,
        _nll,
        _norms,
        _layers,
        _other,
        attacks.attack_steps,
        attacks.dynamics,
        attacks.logs,
        attacks.decoding,
        attacks.searches,
        attacks.judges,
    ]
    found = [figure for make in makers for figure in make(sources)]
    order = (DEPTH, ATTACKS, TRAINING)
    models = list(dict.fromkeys(s.model for s in sources if s.values or s.cells))
    return [_dressed(f, models) for f in sorted(found, key=lambda f: order.index(f.section))]


def _dressed(figure: Figure, models: Sequence[str]) -> Figure:
    """Curves of one model in one colour on the whole page; of others in what is left, the paper's
    in grey and black."""
    if isinstance(figure.data, Heat):
        return figure
    seen: dict[int, int] = {}
    free = iter(range(100))
    used = {models.index(s.model) for s in figure.data if s.model in models}
    out = []
    for s in figure.data:
        of = models.index(s.model) if s.model in models else None
        other = 6 + seen.get(-1, 0) if s.paper else None
        if of is None:
            of = next(i for i in free if i not in used) if other is None else other
        key = -1 if s.paper else of
        out.append(replace(s, look=of, variant=0 if s.paper else seen.get(key, 0)))
        seen[key] = seen.get(key, 0) + 1
    return replace(figure, data=out)


def curve_series(name: str, values: np.ndarray, *, model: str = "", shown: bool = True) -> Series:
    """A curve by position with its band."""
    c = curves.curve(values)
    known = np.flatnonzero(c.count > 0)
    mean, low, high = ([float(v) for v in part[known]] for part in (c.mean, c.low, c.high))
    count = c.count[known].tolist()
    return Series(name, (known + 1).tolist(), mean, low, high, count, shown, model=model)


def _by_group(sources: Sequence[Source], name: str, which: str = "values") -> Iterator[Series]:
    """A curve for every analysis and group; of further groups the first alone is shown at once."""
    having = [s for s in sources if name in getattr(s, which)]
    for source in having:
        groups = getattr(source, which)[name]
        for at, (group, values) in enumerate(groups.items()):
            label = source.title if len(groups) == 1 else f"{source.title}, {group}"
            shown = at == 0 or len(having) == 1
            if not np.isnan(values).all():
                yield curve_series(label, values, model=source.model, shown=shown)


def _kl(sources: Sequence[Source]) -> Iterator[Figure]:
    series = list(_by_group(sources, "kl_model_base"))
    if series:
        bases = ", ".join(dict.fromkeys(s.base for s in sources if s.values))
        caption = (
            f"KL(model || {bases}) of the next-token distributions, both models reading the same "
            f"answers. {BANDS}"
        )
        yield Figure(
            "kl",
            "KL divergence by position",
            caption,
            POSITION,
            "KL(model || base) (nats)",
            DEPTH,
            series,
        )
    shapes = [s for series in _shapes(sources) for s in series]
    if shapes:
        yield Figure(
            "kl-shape",
            "KL divergence relative to the first token",
            "The mean at each position over that at position 1; beside it the paper's figures 1 and"
            f" 4, in which a shallow alignment falls at once and a deep one does not. {BANDS}",
            POSITION,
            "KL(t) / KL(1)",
            DEPTH,
            [*shapes, *_papers()],
        )


def _papers() -> list[Series]:
    """Figures 1 and 4, over the value at position 1."""
    return [
        Series(f"paper: {name}", range(1, 21), [v / values[0] for v in values], paper=True)
        for name, values in paper.KL.items()
    ]


def _shapes(sources: Sequence[Source]) -> Iterator[list[Series]]:
    """The first group of each analysis over its mean at position 1, where that is not 0."""
    for source in sources:
        for values in list(source.values.get("kl_model_base", {}).values())[:1]:
            draws = curves.resampled_means(values)
            with np.errstate(invalid="ignore", divide="ignore"):
                low, high = np.nanpercentile(draws / draws[:, :1], curves.TAILS, axis=0)
                mean = np.nanmean(values, 0)
            if mean[0] > 1e-3:
                x, y = range(1, len(mean) + 1), (mean / mean[0]).tolist()
                yield [Series(source.title, x, y, low.tolist(), high.tolist(), model=source.model)]


def _nll(sources: Sequence[Source]) -> Iterator[Figure]:
    """What both models say of an answer: beside each model the first one's base."""
    for name, title, caption, label in (
        ("nll", "Cross-entropy of the answers by position",
         "How surprised each model is by the answers it is given: figure 3a.",
         "-log p(token) (nats)"),
        ("entropy", "Entropy of the next token by position",
         "How undecided each model is behind the answer so far.", "entropy (nats)"),
    ):  # fmt: skip
        analysed = [s for s in sources if f"base_{name}" in s.values]
        if analysed:
            first = analysed[0]
            group, values = next(iter(first.values[f"base_{name}"].items()))
            base = f"{first.base}, {group}" if len(first.values[name]) > 1 else first.base
            series = [*_by_group(sources, name), curve_series(base, values)]
            yield Figure(name, title, f"{caption} {BANDS}", POSITION, label, DEPTH, series)


def _norms(sources: Sequence[Source]) -> Iterator[Figure]:
    for name, key, title, what in (
        ("head_grad", "norm-head", "Gradient norm of the output head by position",
         "||d log p(token) / d head||, exact, in closed form. {}"),
        ("last", "norm-last", "Gradient norm of the last layers and the head by position",
         "Exact; probably what the paper's figure 3b shows. {}"),
        ("whole", "norm-whole", "Gradient norm of all parameters by position", "{}"),
    ):  # fmt: skip
        which = "values" if name == "head_grad" else "norms"
        series = list(_by_group(sources, name, which))
        kinds = [s.norms_kind for s in sources if s.norms]
        about = BANDS
        if name == "whole" and any(k.get("kind") == "probes" for k in kinds):
            error = max(100 * k.get("relative_error", 0.0) for k in kinds)
            about = (
                f"Estimated by random directions; each value may be off by {error:.1f} %. {BANDS}"
            )
        elif name == "whole":
            about = f"Exact. {BANDS}"
        if series:
            label = "||gradient|| of log p(token)"
            yield Figure(key, title, what.format(about), POSITION, label, DEPTH, series)


def _layers(sources: Sequence[Source]) -> Iterator[Figure]:
    for number, source in enumerate(s for s in sources if "layers" in s.norms):
        group, values = next(iter(source.norms["layers"].items()))
        mean = np.nanmean(np.where(np.isnan(values).all(0), 0.0, values), 0)  # [K, L]
        kept = [i for i in range(mean.shape[1]) if not np.isnan(values[..., i]).all()]
        grid = Heat(
            [f"layer {i + 1}" for i in reversed(kept)],
            [str(t + 1) for t in range(len(mean))],
            [[float(v) for v in mean[:, i]] for i in reversed(kept)],
        )
        yield Figure(
            f"layers-{number}",
            f"Gradient norm by layer and position: {source.title}",
            f"Mean of ||d log p(token) / d layer|| over {len(values)} answers ({group}), exact.",
            POSITION,
            "decoder layer",
            DEPTH,
            grid,
            unit="(norm)",
        )


def _other(sources: Sequence[Source]) -> Iterator[Figure]:
    makers: tuple[tuple[str, str, str, str, str, dict[str, Any]], ...] = (
        ("margin", "margin", "How far the given token is behind the favourite",
         "log p(most probable token) - log p(given token) under the model. ", "nats", {}),
        ("js", "js", "Jensen-Shannon divergence by position",
         "Symmetric, at most log 2 = 0.693 nats: large differences saturate. ", "JS (nats)", {}),
        ("kl_base_model", "kl-reverse", "KL divergence by position, the other direction",
         "KL(base || model): weighs the tokens that the base prefers. ",
         "KL(base || model) (nats)", {}),
        ("log_ratio", "ratio", "Log-ratio of the given tokens",
         "log p_model(token) - log p_base(token). ", "nats", {"bottom": None}),
        ("rank", "rank", "Rank of the given token under the model",
         "1 is the most probable token; mean over answers. ", "rank", {"log": True}),
        ("top1_agree", "agree", "Both models' most probable tokens agree", "", "share of answers",
         {"top": 1.0}),
    )  # fmt: skip
    for name, key, title, caption, label, extra in makers:
        series = list(_by_group(sources, name))
        if series:
            yield Figure(key, title, caption + BANDS, POSITION, label, DEPTH, series, **extra)
