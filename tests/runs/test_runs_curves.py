"""Curves with bands and the depth of an alignment in one number."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from deepalign_kernels import rules
from deepalign_kernels.runs import curves


def test_bands_hold_the_truth_about_as_often_as_they_say():
    rng, hits, trials = np.random.default_rng(0), 0, 300
    for trial in range(trials):
        found = curves.curve(rng.exponential(2.0, (40, 1)), resamples=400, seed=trial)
        hits += found.low[0] <= 2.0 <= found.high[0]
    assert 0.87 <= hits / trials <= 0.97  # percentile bootstrap of a skewed mean, n = 40


def test_bands_of_unequal_lengths_count_their_examples():
    found = curves.curve([[1.0, 3.0, np.nan], [3.0, np.nan, np.nan]])
    assert found.mean[:2].tolist() == [2.0, 3.0] and np.isnan(found.mean[2])
    assert found.count.tolist() == [2, 1, 0]
    assert (found.low[0], found.high[0]) == (1.0, 3.0) and np.isnan(found.low[2])


# Means of the paper's figures 1 and 4, read off the images: positions 1 to 20, nats.
LLAMA = [9.28, 2.51, 2.70, 1.68, 1.34, 1.13, 1.06, 1.05, 1.10, 1.16, 1.01, 0.90, 0.82, 0.78, 0.73,
         0.75, 0.71, 0.68, 0.55, 0.68]  # fmt: skip
AUGMENTED = [9.45, 7.8, 6.65, 8.5, 8.0, 8.8, 9.1, 8.95, 9.05, 9.05, 9.75, 9.25, 9.4, 9.85, 10.4,
             10.0, 10.15, 10.4, 10.5, 10.1]  # fmt: skip


def test_the_paper_s_shallow_and_deep_curves_are_told_apart():
    noise = np.random.default_rng(1).lognormal(0, 0.3, (2, 60, 20))
    shallow, deep = LLAMA * noise[0], AUGMENTED * noise[1]
    one, two = curves.share_within(shallow), curves.share_within(deep)
    assert one.value == pytest.approx(0.57, abs=0.03) and one.low < one.value < one.high
    assert two.value == pytest.approx(0.22, abs=0.02) and two.high < one.low
    assert curves.first_below(shallow).value == 4.0
    assert curves.first_below(deep).value == 21.0  # nowhere among the twenty
    assert one.count == 60
    assert curves.at_first(deep).value == pytest.approx(deep[:, 0].mean())


def test_half_rise_is_where_the_line_crosses_the_middle():
    success = np.zeros((10, 4))
    success[:2, 1], success[:8, 2], success[:8, 3] = 1, 1, 1  # 0, 0.2, 0.8, 0.8
    found = curves.half_rise([0, 1, 5, 10], success)
    assert found.value == pytest.approx(1 + 4 * (0.4 - 0.2) / 0.6)
    assert found.low <= found.value <= found.high
    assert math.isnan(curves.half_rise([0, 3], np.zeros((10, 2))).value)


def test_recovery_is_of_those_refused_without_a_prefix():
    success = np.zeros((10, 3))
    success[:2, 0] = 1  # answered anyway: no refusal to come back to
    success[:6, 1], success[:10, 2] = 1, 1
    found = curves.recovery(success)
    assert found.value == pytest.approx((4 / 8 + 0 / 8) / 2) and found.count == 8
    assert 0 < found.low < found.value < found.high < 1
    assert math.isnan(curves.recovery(np.ones((3, 2))).value)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 2.0])
def test_the_prediction_from_a_margin_is_the_losss_own_weight(beta):
    """By small steps along the constrained loss's gradient on two tokens, one ahead of the other:
    its weight where they meet, and the push that it takes to get there."""
    margin = np.array([0.0, 0.3, 3.5, 16.6])
    flip, slower = curves.weight_at_flip(margin, beta), curves.slowdown(margin, beta)
    for m, one, times in zip(margin, flip, slower, strict=True):
        p = 1 / (1 + math.exp(m))
        way = np.linspace(math.log(p), math.log(0.5), 20001)  # log-probability of the token behind
        _, weight = rules.exact(*(torch.tensor(x) for x in (way, np.full_like(way, way[0]),
                                                            np.full_like(way, beta))))  # fmt: skip
        assert one == pytest.approx(weight[-1].item(), rel=1e-6)
        assert times == pytest.approx(np.mean(1 / weight.numpy()), rel=1e-3)
    assert curves.weight_at_flip(16.6) < 1e-3 < 0.3 < curves.weight_at_flip(3.5)


def test_the_predictions_of_the_guide_are_these():
    guide = Path(__file__).parents[2] / "docs" / "guide" / "analyze.md"
    rows = {
        name.strip(): [float(re.match(r"[\d.]+", x.strip())[0]) for x in cells.split("|")[:-1]]
        for name, cells in re.findall(r"^\| ([\w ,=.]+?) \| (\d.*)$", guide.read_text(), re.M)
    }
    margins = rows["margin m, nats"]
    left = [100 * v for v in curves.weight_at_flip(margins)]
    assert rows["gradient left at the flip, beta = 0.5"] == pytest.approx(left, rel=0.02)
    assert rows["predicted slowdown"] == pytest.approx(curves.slowdown(margins), rel=0.02)


def test_rank_correlation_is_exact_for_few_models():
    stats = pytest.importorskip("scipy.stats", reason="the independent value is scipy's")
    x, y = [0.1, 0.4, 0.4, 0.9, 0.7], [1.0, 2.0, 3.0, 2.5, 9.0]
    found = curves.rank_correlation(x, y)
    exact = stats.permutation_test(
        (x,), lambda a: stats.spearmanr(a, y).statistic, permutation_type="pairings",
        n_resamples=np.inf,
    )  # fmt: skip
    assert found.rho == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.p_value == pytest.approx(exact.pvalue)
    assert curves.rank_correlation([1, 2, 3], [2, 4, 9]).p_value == pytest.approx(2 / 6)
    assert found.count == 5


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: curves.half_rise([1, 2], np.ones((2, 2))), "depths: expected ascending"),
        (lambda: curves.half_rise([0, 2], np.ones((2, 3))), "success: expected .N, 2."),
        (lambda: curves.curve([]), "values: expected"),
        (lambda: curves.first_below(np.ones((2, 2)), 1.5), "tau: expected a number in"),
        (lambda: curves.recovery(np.ones((2, 1))), "success: expected two depths"),
        (lambda: curves.slowdown([1.0, -0.1]), "margin: expected nats >= 0, got -0.1"),
        (lambda: curves.weight_at_flip(1.0, -1.0), "beta: expected a number >= 0, got -1.0"),
        (lambda: curves.share_within(np.ones((2, 2)), 0), "first: expected an int"),
        (lambda: curves.rank_correlation([1, 2], [1, 2]), "x, y: expected at least 3 pairs"),
    ],
)
def test_mistakes_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
