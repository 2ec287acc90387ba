"""Rates with their uncertainty. Shares are in [0, 1]; intervals have 95 % coverage by default.

A rate of attack success never stands alone: `wilson` gives its interval also at 0/n and n/n, where
a bootstrap has no width. Several samples of one prompt are not independent: `cluster_bootstrap`
draws prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A value between two bounds."""

    value: float
    low: float
    high: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Share successes / n with Wilson's score interval (scipy).

    Raises:
        ValueError: n < 1, or successes outside 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(
            f"successes, n: expected 0 <= successes <= n and n >= 1, got {successes}, {n}"
        )
    from scipy.stats import binomtest

    low, high = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Interval(successes / n, max(0.0, float(low)), min(1.0, float(high)))


def any_of(n: int, successes: int, k: int) -> float:
    """Probability that at least one of k samples succeeds, from `successes` of n samples.

    Unbiased: 1 - C(n - successes, k) / C(n, k) (arXiv 2107.03374, equation 1). Plugging the rate
    into 1 - (1 - rate)^k is too low.
    """
    if not 1 <= k <= n or not 0 <= successes <= n:
        raise ValueError(
            f"k: expected 1 <= k <= n and 0 <= successes <= n, got {k}, {n}, {successes}"
        )
    return 1.0 - math.comb(n - successes, k) / math.comb(n, k)


def cluster_bootstrap(
    values: Sequence[Sequence[float]],
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """Mean over all values, with the percentile interval of a bootstrap that draws whole clusters.

    Args:
        values: one inner sequence per prompt: what its samples gave. Prompts may have different
            numbers; empty ones are left out.
        confidence: coverage of the interval.
        resamples: how many draws.
        seed: of the draws.

    Raises:
        ValueError: no value at all.
    """
    clusters = [np.asarray(v, dtype=float) for v in values if len(v)]
    if not clusters:
        raise ValueError("values: expected at least one value, got none")
    sums, counts = np.array([c.sum() for c in clusters]), np.array([len(c) for c in clusters])
    means = _resampled(len(clusters), resamples, seed, lambda i: sums[i].sum(1) / counts[i].sum(1))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))


def _resampled(
    n: int, resamples: int, seed: int, statistic: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """`statistic` of index arrays [b, n] drawn with replacement, in pieces of bounded memory."""
    rng = np.random.default_rng(seed)
    piece = max(1, 2_000_000 // n)
    sizes = [min(piece, resamples - at) for at in range(0, resamples, piece)]
    return np.concatenate([statistic(rng.integers(n, size=(size, n))) for size in sizes])


def calibrated(
    successes: float,
    n: int,
    *,
    labels: Sequence[bool],
    verdicts: Sequence[bool],
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """A judge's rate corrected for its errors, which a few labelled replies measure.

    Rogan and Gladen's estimator (rate + specificity - 1) / (sensitivity + specificity - 1), clipped
    to [0, 1]. The interval draws all three shares from Jeffreys' Beta(k + 1/2, n - k + 1/2): one
    that is right on each of a few labelled replies is not taken for one that is never wrong.

    Args:
        successes: replies the judge called successes, of `n`; not whole where several samples of a
            prompt count as one.
        n: replies judged.
        labels: the truth about the labelled replies.
        verdicts: what the judge says of these.
        confidence: coverage of the interval.
        resamples: how many draws.
        seed: of the draws.

    Raises:
        ValueError: labels that are all alike, or a judge no better than chance on them.
    """
    truth, said = np.asarray(labels, bool), np.asarray(verdicts, bool)
    if truth.shape != said.shape or truth.all() or not truth.any():
        raise ValueError("labels: expected as many as verdicts, successes and failures among them")
    sensitivity, specificity = said[truth].mean(), (~said[~truth]).mean()
    if sensitivity + specificity <= 1.0:
        raise ValueError(
            f"verdicts: sensitivity {sensitivity:.2f} + specificity {specificity:.2f} <= 1: the"
            " judge is no better than chance on the labelled replies"
        )
    rng = np.random.default_rng(seed)

    def draw(p: float, size: int) -> np.ndarray:
        return rng.beta(p * size + 0.5, (1 - p) * size + 0.5, resamples)

    def correct(rate: Any, sens: Any, spec: Any) -> Any:
        gain = np.maximum(sens + spec - 1.0, 1e-9)
        return np.clip((rate + spec - 1.0) / gain, 0.0, 1.0)

    drawn = correct(
        draw(successes / n, n),
        draw(sensitivity, int(truth.sum())),
        draw(specificity, int((~truth).sum())),
    )
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(
        float(correct(successes / n, sensitivity, specificity)), float(low), float(high)
    )


class Paired(NamedTuple):
    """Two models on the same prompts."""

    difference: float  # mean of second minus first
    low: float
    high: float
    p: float  # two-sided, of no difference


def paired(
    first: Sequence[float],
    second: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Paired:
    """Difference between two models on the same prompts, second minus first.

    The interval is a bootstrap over prompts. p is McNemar's exact test where all values are 0 or 1,
    else the sign-flip permutation test.

    Raises:
        ValueError: different lengths, or none.
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"first, second: expected the same number >= 1, got {a.size} and {b.size}")
    d = b - a
    means = _resampled(len(d), resamples, seed, lambda i: d[i].mean(1))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    if np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        from scipy.stats import binomtest

        up, changed = int((d > 0).sum()), int((d != 0).sum())
        p = binomtest(up, changed).pvalue if changed else 1.0
    else:
        rng = np.random.default_rng(seed + 1)
        flips = rng.choice((-1.0, 1.0), size=(resamples, len(d)))
        extreme = np.abs((flips * d).mean(1)) >= abs(d.mean()) - 1e-12
        p = (extreme.sum() + 1) / (resamples + 1)
    return Paired(float(d.mean()), float(low), float(high), float(p))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of one table, adjusted by Holm's step-down method, in their order."""
    order = np.argsort(p_values, kind="stable")
    adjusted, worst = [0.0] * len(order), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def kappa(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Cohen's kappa of two judges' verdicts; NaN where both always say the same one thing."""
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"first, second: expected the same number >= 1, got {a.size} and {b.size}")
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return float(((a == b).mean() - chance) / (1 - chance)) if chance < 1 else math.nan
