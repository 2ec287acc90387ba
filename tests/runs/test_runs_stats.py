"""Intervals and tests against published values and brute force."""

import itertools
import math

import numpy as np
import pytest

from deepalign_kernels.runs import stats
from deepalign_kernels.runs.stats import wilson

pytest.importorskip("scipy", reason='needs the extra "eval"')


@pytest.mark.parametrize(
    "successes,n,low,high",
    [
        (0, 330, 0.0, 1.15),
        (9, 330, 1.44, 5.10),
        (139, 330, 36.9, 47.5),
        (5, 330, 0.65, 3.5),
        (1, 100, 0.18, 5.45),
        (0, 100, 0.0, 3.7),
        (84, 100, 75.6, 89.9),
        (50, 50, 92.9, 100.0),
    ],
)
def test_wilson_of_published_counts(successes, n, low, high):
    got = wilson(successes, n)
    assert got.value == successes / n
    assert got.low * 100 == pytest.approx(low, abs=0.06)
    assert got.high * 100 == pytest.approx(high, abs=0.06)


def test_wilson_solves_its_own_equation():
    """The bounds are the shares p that lie z standard errors, under p, from what was seen."""
    z = 1.959963984540054
    got = wilson(7, 40)
    for p in (got.low, got.high):
        assert abs(got.value - p) == pytest.approx(z * math.sqrt(p * (1 - p) / 40), rel=1e-9)


@pytest.mark.parametrize("bad", [(1, 0), (-1, 3), (4, 3)])
def test_wilson_refuses(bad):
    with pytest.raises(ValueError, match="successes, n"):
        wilson(*bad)


@pytest.mark.parametrize("n,c,k", [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 2), (7, 3, 7)])
def test_any_of_k_counts_subsets(n, c, k):
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert stats.any_of(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]))


def test_any_of_is_unbiased():
    """The mean over all draws of n samples is 1 - (1 - p)^k."""
    p, n, k = 0.3, 6, 3
    mean = sum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * stats.any_of(n, c, k) for c in range(n + 1)
    )
    assert mean == pytest.approx(1 - (1 - p) ** k)


def test_cluster_bootstrap_knows_that_samples_of_a_prompt_agree():
    """Ten samples of each prompt that always agree are worth one sample."""
    rng = np.random.default_rng(0)
    prompts = rng.random(60) < 0.4
    many = stats.cluster_bootstrap([[float(p)] * 10 for p in prompts])
    one = stats.cluster_bootstrap([[float(p)] for p in prompts])
    assert (many.low, many.high) == pytest.approx((one.low, one.high))
    normal = 1.96 * math.sqrt(prompts.mean() * (1 - prompts.mean()) / 60)
    assert many.high - many.value == pytest.approx(normal, rel=0.15)
    alone = wilson(int(prompts.sum()) * 10, 600)
    assert many.high - many.low > 2.5 * (alone.high - alone.low)


def test_cluster_bootstrap_weighs_samples_not_prompts():
    """Of two drawn from these two, a quarter has the mean 0, half 3/4 and a quarter 1."""
    found = stats.cluster_bootstrap([[1.0] * 3, [0.0]], confidence=0.4)
    assert found == (0.75, 0.75, 0.75)
    found = stats.cluster_bootstrap([[1.0] * 3, [0.0]], confidence=0.6)
    assert found == (0.75, 0.0, 1.0)


def test_calibration_undoes_a_known_judge():
    """Sensitivity 0.8 and specificity 0.9 exactly, true rate 0.5: the judge says 0.45."""
    labels = [True] * 50 + [False] * 50
    verdicts = [True] * 40 + [False] * 10 + [True] * 5 + [False] * 45
    got = stats.calibrated(450, 1000, labels=labels, verdicts=verdicts)
    assert got.value == pytest.approx(0.5)
    raw = wilson(450, 1000)
    assert got.low < 0.45 < 0.5 < got.high and got.high - got.low > raw.high - raw.low
    few = stats.calibrated(50, 100, labels=[True, False] * 5, verdicts=[True, False] * 5)
    raw = wilson(50, 100)  # right on ten of ten does not make the judge perfect
    assert few.value == 0.5 and few.high - few.low > 1.2 * (raw.high - raw.low)
    with pytest.raises(ValueError, match="chance"):
        stats.calibrated(450, 1000, labels=labels, verdicts=[not v for v in verdicts])
    with pytest.raises(ValueError, match="labels"):
        stats.calibrated(1, 2, labels=[True], verdicts=[True])


def test_mcnemar_is_the_binomial_of_the_changed():
    first, second = [0] * 10 + [1] * 2 + [1] * 20, [1] * 10 + [0] * 2 + [1] * 20
    got = stats.paired(first, second)
    tail = sum(math.comb(12, c) for c in (0, 1, 2)) / 2**12
    assert got.p == pytest.approx(2 * tail)
    assert got.difference == pytest.approx(8 / 32) and got.low < 0.25 < got.high
    assert stats.paired([1, 0], [1, 0]).p == 1.0


def test_permutation_test_counts_sign_flips():
    first, second = np.zeros(8), np.array([0.5, 0.25, 0.5, 0.75, 0.5, 0.25, 0.5, -0.25])
    flips = np.array(list(itertools.product((-1, 1), repeat=8)))
    exact = np.mean(np.abs((flips * second).mean(1)) >= second.mean() - 1e-12)
    assert stats.paired(first, second).p == pytest.approx(exact, abs=0.01)


def test_holm():
    """The worked example of Holm (1979) as any textbook has it."""
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_kappa():
    """20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: 0.4."""
    first = [1] * 25 + [0] * 25
    second = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert stats.kappa(first, second) == pytest.approx(0.4)
    assert math.isnan(stats.kappa([1, 1], [1, 1]))
