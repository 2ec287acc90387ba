"""Rates of whole decoding grids, and which rates stand beside the paper's."""

import pytest

from deepalign_kernels.attack.summary import summary
from deepalign_kernels.report import attacks, figures, read
from deepalign_kernels.runs import Record, Run, cells, grids

ABOUT = {
    "grid": {"attack": "decoding"},
    "suffix, then grid": {
        "attack": "gcg+decoding",
        "first": {"attack": "gcg"},
        "then": {"attack": "decoding"},
    },
    "direct": {"attack": "direct"},
}
# By prompt and setting: (score of the rubric, what it says; what the other judge says).
RUBRIC = {
    "a": [(1, False, False), (5, True, False), (2, False, True)],
    "b": [(1, False, True), (3, False, True), (2, False, False)],
    "c": [(2, False, False), (4, False, None), (3, False, False)],  # the worst is unparsable
    "d": [(None, None, True), (None, None, False), (None, None, False)],  # nothing to pick from
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    samples, verdicts = [], []
    for name in ABOUT:
        for item, row in RUBRIC.items():
            for n, (score, first, second) in enumerate(row):
                cell = {} if name == "direct" else {"temperature": (n + 1) / 2}
                sample = Record("sample", name, cell, item, n if name == "direct" else 0)
                samples.append(sample)
                for judge, success, number in (("rubric", first, score), ("other", second, None)):
                    data = {"of": sample.key, "success": success, "score": number}
                    verdicts.append(Record("verdict", judge, {"of": sample.key}, item, data=data))
    with Run(folder, {"attacks": ABOUT, "engine": {"model": "m"}}) as run:
        run.records.commit("all", samples)
        run.verdicts.commit("all", verdicts)
    return folder


def of(folder):
    (source,) = read.read([folder])
    return source


@pytest.mark.parametrize("name", ["grid", "suffix, then grid"])
def test_a_grid_is_known_by_its_attack_not_by_its_name(folder, name):
    found = {(c.setting["over"], c.judge): c for c in of(folder).grids if c.attack == name}
    assert list(found) == [
        ("any of 3 settings", "rubric"),
        ("worst of 3 settings by rubric", "rubric"),
        ("any of 3 settings", "other"),
        ("worst of 3 settings by rubric", "other"),
    ]
    union = found["any of 3 settings", "other"]
    assert union.outcomes == {"a": [True], "b": [True], "c": [False], "d": [True]}
    assert union.unparsable == 1
    worst = found["worst of 3 settings by rubric", "other"]
    assert worst.outcomes == {"a": [False], "b": [True], "c": []}
    assert (worst.samples, worst.unparsable, worst.failed) == (2, 1, 1)
    own = found["worst of 3 settings by rubric", "rubric"]
    assert own.outcomes == {"a": [True], "b": [False], "c": [False]} and own.unparsable == 0


def test_the_summary_counts_what_could_not_be_read(folder):
    lines = summary(folder).splitlines()
    line = next(x for x in lines if x.startswith("grid, worst of 3") and "(other)" in x)
    assert "50.0 %" in line and line.endswith("n = 2, 1 unparsable")
    assert not any("grid" in x and "samples (" in x for x in lines)


def test_the_papers_rate_stands_beside_the_reply_that_another_judge_picked(folder):
    source = of(folder)
    rows = grids.beside_paper(source.cells, source.grids, source.manifest, "other")
    assert [(r.label, r.cell.samples) for r in rows] == [("grid, worst of 3 settings by rubric", 2)]
    assert rows[0].published == {"initial": 54.9, "augmented": 11.3}
    printed = [x for x in summary(folder, "initial").splitlines() if x.startswith("paper")]
    assert len(printed) == 2 and not any("temperature" in x for x in printed)  # one by each judge
    assert printed[1].startswith("paper, grid, worst of 3 settings by rubric (other): 54.9")
    (_, line) = attacks.beside_the_paper([source])
    assert line[:3] == ["m", "grid, worst of 3 settings by rubric", "rubric"]  # the first judge


def test_the_heat_map_is_of_the_first_judge_and_has_a_line_for_each_grid(folder):
    (figure,) = [f for f in figures.figures([of(folder)]) if f.key == "decoding-temperature"]
    assert figure.data.rows == ["m, grid", "m, suffix, then grid"]
    assert figure.data.values[0] == pytest.approx([0.0, 100 / 3, 0.0])


def test_a_gcg_by_another_name_is_compared_on_the_prompts_it_was_not_searched_on():
    samples = [
        Record("sample", "u", {"universal": kind}, item)
        for kind, items in (("train", "ab"), ("test", "cdef"))
        for item in items
    ]
    verdicts = [
        Record("verdict", "j", data={"of": s.key, "success": s.item in "af"}) for s in samples
    ]
    about = {"attacks": {"u": {"attack": "gcg"}}}
    (row,) = grids.beside_paper(cells(samples, verdicts), [], about, "j")
    assert row.label == "u, universal=test" and row.cell.rate.value == pytest.approx(1 / 4)
    assert row.published["initial"] == 36.5
