"""What is counted, what is not, and how cells are put together."""

import pytest

from deepalign_kernels.runs import Record, cells, stats
from deepalign_kernels.runs.table import agreement, picked, rate_of, text_table, union

pytest.importorskip("scipy", reason='needs the extra "eval"')


def sample(item, k=5, n=0, error=None):
    return Record("sample", "prefill", {"k": k}, item, n, error=error)


def verdict(of, success, judge="words@1", score=None):
    data = {"of": of.key, "success": success, "score": score}
    return Record("verdict", judge, {"of": of.key}, of.item, data=data)


def test_unparsable_and_failed_are_counted_and_not_scored():
    samples = [sample("a"), sample("b"), sample("c"), sample("d", error="429")]
    verdicts = [verdict(s, v) for s, v in zip(samples, (True, None, False), strict=False)]
    (cell,) = cells(samples, verdicts)
    assert (cell.unparsable, cell.failed, cell.samples) == (1, 1, 2)
    assert cell.rate == stats.wilson(1, 2)
    assert "unparsable" in text_table([cell]) and "50.0" in text_table([cell])


def test_nothing_scored_has_no_rate():
    samples = [sample("a")]
    (cell,) = cells(samples, [verdict(samples[0], None)])
    assert cell.rate is None and "-" in text_table([cell])


def test_cells_by_setting_and_judge():
    samples = [sample("a"), sample("a", 10), sample("b")]
    verdicts = [verdict(s, True) for s in samples] + [verdict(samples[0], False, "other@2")]
    got = {(c.setting["k"], c.judge): c.outcomes for c in cells(samples, verdicts)}
    assert got[5, "words@1"] == {"a": [True], "b": [True]}
    assert got[10, "words@1"] == {"a": [True]}
    assert got[5, "other@2"] == {"a": [False], "b": []}


def test_several_samples_of_a_prompt():
    """The interval draws prompts, the spread is between repetitions."""
    truth = {"a": [1, 1, 0], "b": [0, 0, 0], "c": [1, 1, 1], "d": [0, 1, 0]}
    samples = [sample(i, n=n) for n in range(3) for i in truth]
    (cell,) = cells(samples, [verdict(s, bool(truth[s.item][s.sample])) for s in samples])
    assert cell.rate == stats.cluster_bootstrap([truth[i] for i in "abcd"])
    rates = [2 / 4, 3 / 4, 1 / 4]
    assert cell.spread == pytest.approx((sum((r - 0.5) ** 2 for r in rates) / 2) ** 0.5)
    assert cell.any_of(1) == pytest.approx(0.5) and cell.any_of(3) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="k"):
        cell.any_of(4)


def test_no_interval_is_empty():
    """All prompts alike, several samples each: as wide as for that many independent prompts."""
    got = rate_of({str(i): [False] * 5 for i in range(100)})
    assert got.value == 0 and got.high == pytest.approx(stats.wilson(0, 100).high)


def test_union_is_at_least_every_cell():
    samples = [sample(i, k) for k in (5, 10) for i in "abc"]
    said = {("a", 5): True, ("b", 10): True}
    group = cells(samples, [verdict(s, said.get((s.item, s.cell["k"]), False)) for s in samples])
    assert union(group) == {"a": [True], "b": [True], "c": [False]}


def test_the_scorer_picks_and_the_judge_decides():
    samples = [sample(i, k) for k in (5, 10, 20) for i in "ab"]
    scores = dict(zip([s.key for s in samples], (0.1, 0.9, 0.8, 0.2, 0.8, 0.3), strict=True))
    verdicts = [verdict(s, None, "scorer@1", scores[s.key]) for s in samples]
    right = {("a", 10), ("b", 10)}
    verdicts += [verdict(s, (s.item, s.cell["k"]) in right) for s in samples]
    # a: k=10 is the first of two equals and a success; b: k=5 scores highest and is none.
    assert picked(samples, verdicts, "scorer@1", "words@1") == {"a": [True], "b": [False]}


def test_judges_that_disagree():
    samples = [sample(str(i)) for i in range(6)]
    first, second = (1, 1, 1, 0, 0, None), (1, 0, 0, 0, 1, 1)
    verdicts = [
        verdict(s, None if v is None else bool(v), judge)
        for judge, row in (("a@1", first), ("b@2", second))
        for s, v in zip(samples, row, strict=True)
    ]
    (got,) = agreement(verdicts)
    assert (got.first, got.second, got.n) == ("a@1", "b@2", 5)
    assert (got.only_first, got.only_second) == (2, 1)
    assert got.kappa == pytest.approx(stats.kappa(first[:5], second[:5]))
