"""Curves over positions or depths with intervals, and the depth of an alignment in one number.

Values are [N, K]: example by position, NaN where an example has no value. All intervals are 95 %
percentile bootstraps that draw whole examples, so what belongs to one answer stays together. Few
examples make them too narrow (10: about 90 % in place of 95 %); the number is always told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np

TAILS = (2.5, 97.5)  # percent


class Curve(NamedTuple):
    """Means over examples by position, [K]."""

    mean: np.ndarray  # NaN where no example has a value
    low: np.ndarray
    high: np.ndarray
    count: np.ndarray  # examples


class Estimate(NamedTuple):
    """A number with its interval; NaN where it does not exist."""

    value: float
    low: float
    high: float
    count: int  # examples


def resampled_means(values: np.ndarray, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """[resamples, K] means over examples drawn with replacement, NaN left out."""
    rng, n = np.random.default_rng(seed), len(values)
    counts, known = (
        rng.multinomial(n, np.full(n, 1 / n), resamples).astype(float),
        ~np.isnan(values),
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        return (counts @ np.where(known, values, 0.0)) / (counts @ known.astype(float))


def _mean(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(means, counts), [K]."""
    count = (~np.isnan(values)).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nansum(values, 0) / count, count


def curve(values: Any, *, resamples: int = 1000, seed: int = 0) -> Curve:
    """Means by position of `values` [N, K], each with its interval.

    Raises:
        ValueError: values that are not [N, K] with N >= 1.
    """
    values = _checked(values)
    mean, count = _mean(values)
    low, high = np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    some = count > 0
    if some.any():
        draws = resampled_means(values[:, some], resamples, seed)
        low[some], high[some] = np.nanpercentile(draws, TAILS, axis=0)
    return Curve(mean, low, high, count)


def estimate(
    values: Any, of: Callable[[np.ndarray], np.ndarray], *, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """A statistic of the mean curve.

    Args:
        values: [N, K].
        of: from mean curves [R, K] to [R].
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    values = _checked(values)
    draws = of(resampled_means(values, resamples, seed))
    known = draws[~np.isnan(draws)]
    low, high = np.percentile(known, TAILS) if len(known) else (np.nan, np.nan)
    return Estimate(float(of(_mean(values)[0][None])[0]), float(low), float(high), len(values))


def first_below(values: Any, tau: float = 0.2, **bootstrap: int) -> Estimate:
    """First position at which the mean is below `tau` times that of position 1; K + 1 where none of
    the K positions is.

    Args:
        values: [N, K], the KL divergence of an aligned model from its base.
        tau: in (0, 1).
        bootstrap: resamples, seed.
    """
    if not 0 < tau < 1:
        raise ValueError(f"tau: expected a number in (0, 1), got {tau!r}")

    def of(curves: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            below = curves < tau * curves[:, :1]
        return np.where(below.any(1), below.argmax(1) + 1.0, curves.shape[1] + 1.0)

    return estimate(values, of, **bootstrap)


def share_within(values: Any, first: int = 5, **bootstrap: int) -> Estimate:
    """Share of the mean, summed over all K positions, that lies in the first ones.

    first / K where it is spread evenly: an alignment as deep as the answer is looked at; 1 where it
    is in them alone. The paper's models (arXiv 2406.05946, figures 1 and 4, read off the images),
    5 of 20: 0.57 Llama-2-7B-Chat, 0.41 Gemma-1.1-7B-IT, 0.22 the augmented Llama.

    Args:
        values: [N, K], the KL divergence of an aligned model from its base.
        first: positions, >= 1.
        bootstrap: resamples, seed.
    """
    if first < 1:
        raise ValueError(f"first: expected an int >= 1, got {first!r}")

    def of(curves: np.ndarray) -> np.ndarray:
        total = np.nansum(curves, 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(total > 0, np.nansum(curves[:, :first], 1) / total, np.nan)

    return estimate(values, of, **bootstrap)


def at_first(values: Any, **bootstrap: int) -> Estimate:
    """The mean at position 1. Of the margin, log p(best) - log p(y_1): how firmly the first token
    keeps an answer away, in nats."""
    return estimate(values, lambda curves: curves[:, 0], **bootstrap)


def _rise(margin: Any) -> np.ndarray:
    """Nats that a token's log-probability rises until it is as probable as one that was `margin`
    nats before it, if all it gains is taken from that one: log((1 + e^margin) / 2)."""
    margin = np.asarray(margin, float)
    if (margin < 0).any():
        raise ValueError(f"margin: expected nats >= 0, got {margin.min()}")
    return np.logaddexp(0.0, margin) - np.log(2.0)


def weight_at_flip(margin: Any, beta: float = 0.5) -> np.ndarray:
    """What the constrained loss leaves of a token's gradient when it overtakes the favourite.

    2 sigmoid(-beta r) (arXiv 2406.05946, equation 5), with r = log((1 + e^margin) / 2) the rise
    of its log-probability that takes it level. Near 1 the loss is plain cross-entropy up to the
    flip: no protection. Near 0 the flip is hardly ever reached.

    Args:
        margin: nats, >= 0, any shape: how far the token is behind, in the model that is the loss's
            reference. At the first position, see `analyze.first_tokens`.
        beta: of the loss at that position; the paper's at the first is 0.5.

    Raises:
        ValueError: a negative margin or beta.
    """
    return 2.0 / (1.0 + np.exp(_beta(beta) * _rise(margin)))


def slowdown(margin: Any, beta: float = 0.5) -> np.ndarray:
    """How many times the push of plain cross-entropy it takes until the flip: the mean of
    1 / weight along the way, 1/2 + (e^(beta r) - 1) / (2 beta r).

    A prediction for small steps along the gradient. Adam divides by the size of past gradients,
    which makes up for a part of the weight, so the number orders alignments rather than counts
    steps.

    Args:
        margin: as in `weight_at_flip`.
        beta: likewise.

    Raises:
        ValueError: a negative margin or beta.
    """
    u = _beta(beta) * _rise(margin)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(u > 0, 0.5 + np.expm1(u) / (2.0 * u), 1.0)


def _beta(beta: float) -> float:
    if not beta >= 0:
        raise ValueError(f"beta: expected a number >= 0, got {beta!r}")
    return beta


def half_rise(depths: Sequence[float], success: Any, **bootstrap: int) -> Estimate:
    """The number of prefilled tokens at which attack success has risen half of its way from that
    without a prefix to its highest; between two depths on a straight line.

    Args:
        depths: k, ascending, the first 0.
        success: [N, len(depths)], 0 or 1 by prompt and depth, NaN where unknown.
        bootstrap: resamples, seed.

    Returns:
        NaN where it rises by less than a tenth: then there is no half.

    Raises:
        ValueError: depths that do not ascend from 0, success of another shape.
    """
    ks, success = np.asarray(depths, float), _checked(success)
    if len(ks) < 2 or ks[0] != 0 or (np.diff(ks) <= 0).any():
        raise ValueError(f"depths: expected ascending numbers from 0, got {list(depths)}")
    if success.shape[1] != len(ks):
        raise ValueError(f"success: expected [N, {len(ks)}], got {success.shape}")

    def one(mean: np.ndarray) -> float:
        rise = np.nanmax(mean) - mean[0]
        if not rise >= 0.1:
            return np.nan
        half = mean[0] + rise / 2
        at = int((mean >= half).argmax())
        part = (half - mean[at - 1]) / (mean[at] - mean[at - 1])
        return float(ks[at - 1] + part * (ks[at] - ks[at - 1]))

    return estimate(success, lambda curves: np.array([one(c) for c in curves]), **bootstrap)


def recovery(success: Any, **bootstrap: int) -> Estimate:
    """How often a model turns back behind a prefix: of the prompts that it refuses without one, the
    share that is no success behind k > 0 given tokens, mean over these k. The complement of attack
    success among prompts that were safe before.

    Args:
        success: [N, depths], in [0, 1] by prompt and depth, the first without a prefix.
        bootstrap: resamples, seed; it draws prompts.

    Returns:
        NaN where no prompt is refused without a prefix; `count` are those that are.

    Raises:
        ValueError: success of another shape.
    """
    success = _checked(success)
    if success.shape[1] < 2:
        raise ValueError(f"success: expected two depths or more, got shape {success.shape}")
    refused = success[success[:, 0] < 0.5, 1:]
    if not len(refused):
        return Estimate(np.nan, np.nan, np.nan, 0)
    return estimate(1.0 - refused, lambda means: means.mean(1), **bootstrap)


def _checked(values: Any) -> np.ndarray:
    values = np.asarray(values, float)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"values: expected [examples, positions], got shape {values.shape}")
    return values


class Correlation(NamedTuple):
    """Spearman's rank correlation."""

    rho: float
    p_value: float  # two-sided, by permutation; exact up to 8 pairs
    count: int  # pairs


def rank_correlation(x: Sequence[float], y: Sequence[float], *, seed: int = 0) -> Correlation:
    """Do two measures rank the same models alike? Equal values share their mean rank.

    Args:
        x: one number a model.
        y: likewise.
        seed: of the random permutations, for more than 8 pairs.

    Raises:
        ValueError: fewer than 3 pairs, other lengths, or numbers that are not finite.
    """
    pair = np.array([x, y], float) if len(x) == len(y) else np.empty((2, 0))
    if pair.shape[1] < 3 or not np.isfinite(pair).all():
        raise ValueError(f"x, y: expected at least 3 pairs of finite numbers, got {x!r} and {y!r}")
    a, b = (_ranks(values) for values in pair)
    norm = np.sqrt((a @ a) * (b @ b))
    if norm == 0:
        return Correlation(float("nan"), 1.0, len(a))
    if len(a) <= 8:
        orders = np.array(list(permutations(range(len(b)))))
    else:
        rng = np.random.default_rng(seed)
        orders = np.array([rng.permutation(len(b)) for _ in range(9999)] + [np.arange(len(b))])
    rho = float(a @ b / norm)
    strong = np.abs(b[orders] @ a / norm) >= abs(rho) - 1e-12
    return Correlation(rho, float(strong.mean()), len(a))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Centred; equal values share theirs."""
    less = (values[:, None] > values).sum(1)
    rank = less + ((values[:, None] == values).sum(1) - 1) / 2
    return rank - rank.mean()
