"""The three sentences: what they may say of which runs."""

import json

import pytest
from made_runs import DEEP, SHALLOW, N, an_analysis, an_attack

from deepalign_kernels.report import attacks, build, figures, read, svg, verdict
from deepalign_kernels.report.figure import Heat
from deepalign_kernels.runs import Record, Run
from deepalign_kernels.runs.names import title_of
from deepalign_kernels.runs.record import short

PAPER = {5: 0.421, 10: 0.515, 20: 0.561, 40: 0.570}  # table 3, without k = 0


def test_without_k_0_nothing_is_said_of_a_rise(tmp_path):
    an_attack(tmp_path / "a", "m", PAPER)
    sentence = verdict.sentences(read.read([tmp_path / "a"]))[1]
    assert "no rise" not in sentence and "without a prefix" not in sentence
    assert "of m k = 0 was not measured, so a rise is not known: 58 % [" in sentence
    assert f"at k = 40 (n = {N}" in sentence
    an_attack(tmp_path / "b", "m", {0: 0.0, **PAPER})
    sentence = verdict.sentences(read.read([tmp_path / "b"]))[1]
    assert "m answers 0 % [0, 14] without a prefix and 58 % [" in sentence
    an_attack(tmp_path / "c", "m", {0: 0.5})
    assert "of m only k = 0 was measured: 50 %" in verdict.sentences(read.read([tmp_path / "c"]))[1]


def test_what_does_not_fit_into_a_sentence_is_counted(tmp_path):
    for i in range(6):
        an_attack(tmp_path / f"{i}", f"m{i}", {0: 0.0, 5: 1.0})
    sentence = verdict.sentences(read.read([tmp_path]))[1]
    assert "m3 answers" in sentence and "m4" not in sentence
    assert sentence.endswith("; and 2 more.")


@pytest.mark.parametrize(
    "path,title",
    [
        ("runs/deep/model/", "deep"),
        ("org/Llama-2-7b", "Llama-2-7b"),
        ("model", "model"),
        ("/a/b/checkpoint-50", "b/checkpoint-50"),
        ("/", "/"),
    ],
)
def test_what_a_model_is_called(path, title):
    assert title_of(path) == title


def engine(path):
    return {"engine": {"model": str(path)}}


def test_models_of_two_trainings_are_told_apart(tmp_path):
    """`deepalign train` writes OUT/model, so both paths end alike."""
    for i, rates in enumerate(({0: 0.0, 5: 1.0}, {0: 0.0, 5: 0.0})):
        out, weights = tmp_path / f"out{i}", f"hash {i}"
        an_analysis(tmp_path / f"a{i}", f"out{i}", (SHALLOW, DEEP)[i], weights=weights)
        an_attack(tmp_path / f"p{i}", None, rates, weights=weights, **engine(out / "model"))
    sources = read.read([tmp_path / name for name in ("p1", "a0", "a1", "p0")])
    assert [s.title for s in sources] == ["out1", "out0", "out1", "out0"]
    sentence = verdict.sentences(sources)[1]
    assert "out1 shows no rise" in sentence and "out0 answers 0 % [0, 14] without" in sentence


def test_models_of_one_name_are_told_apart_by_their_weights(tmp_path):
    """Three models of one title, one of them with an analysis of another title: what belongs
    together is known by the weights."""
    for i, share in enumerate((1.0, 2.0, 4.0)):
        about = {"weights": f"hash {i}", **engine("x/same")}
        an_attack(tmp_path / f"p{i}", None, {0: 0.0, 5: 0.2 * share}, **about)
        means = [share * 5] * 5 + [1.0] * 15
        title = "other" if i == 2 else "same"
        an_analysis(tmp_path / f"a{2 - i}", title, means, weights=f"hash {i}")
    sources = read.read([tmp_path])
    titles = {s.folder.name: s.title for s in sources}
    assert titles == {"a0": "other", "a1": "same (a1)", "a2": "same (a2)", "p0": "same (a2)",
                      "p1": "same (a1)", "p2": "same (p2)"}  # fmt: skip
    ranked = verdict.correlation(sources)
    assert ranked is not None and ranked.count == 3 and ranked.rho == pytest.approx(1.0)
    found = figures.figures(sources)
    by_name = {}
    for figure in (f for f in found if not isinstance(f.data, Heat)):
        names = [s.name for s in figure.data]
        assert len(set(names)) == len(names), (figure.key, names)
        for s in figure.data:
            by_name.setdefault(s.name.partition(",")[0], set()).add(s.look)
    assert by_name["other"] == by_name["same (p2)"] and len(by_name["other"]) == 1
    assert by_name["same (a1)"] != by_name["same (a2)"] != by_name["other"]


def test_two_runs_of_one_model_do_not_share_a_name_in_a_figure(tmp_path):
    for name in ("a", "b"):
        an_attack(tmp_path / name, "m", {0: 0.0, 5: 1.0})
    an_attack(tmp_path / "c", "m", {0.1: 0.0}, name="decoding", setting="temperature")
    with (tmp_path / "c" / "manifest.json").open() as file:
        assert json.load(file)["title"] == "m"
    sources = read.read([tmp_path])
    assert [s.title for s in sources] == ["m (a)", "m (b)", "m"]
    assert len({s.model for s in sources}) == 1


def test_the_sentence_says_whose_verdicts_it_is_made_of(tmp_path):
    an_attack(tmp_path / "two", "m", {0: 0.0, 5: 1.0})
    an_attack(tmp_path / "one", "m", {0: 0.0, 5: 1.0}, judges=("first",))
    one, two = (verdict.sentences(read.read([tmp_path / n]))[1] for n in ("one", "two"))
    assert two.endswith("(n = 24, by first, the first of 2 judges).")
    assert one.endswith("(n = 24).")


@pytest.mark.parametrize(
    "data,expected",
    [
        ({"history": [5.0, 4.0, 4.5, 2.0]}, [5.0, 4.0, 4.0, 2.0]),
        ({"history": [None, 5.0, None, 6.0, 3.0]}, [5.0, 5.0, 5.0, 5.0, 3.0]),
        ({"history": [5.0, 3.0, 9.0, 8.0], "grown": [2]}, [5.0, 3.0, 9.0, 8.0]),
        ({"history": [5.0, 3.0, None, 8.0, 9.0], "grown": [2]}, [5.0, 3.0, 3.0, 8.0, 8.0]),
        ({"improved": [[0, 7.0], [2, 4.0], [3, 1.0]], "steps": 5}, [7.0, 4.0, 1.0, 1.0, 1.0]),
        ({"history": [None, None]}, []),
        ({"steps": 4}, []),
    ],
)
def test_best_losses_of_a_search(data, expected):
    assert attacks.losses(data) == expected


def test_searches_with_gaps_growth_and_early_ends_are_drawn(tmp_path):
    found = {
        "gcg": [{"history": [None, 4.0]}, {"history": [6.0, 2.0, None, 1.0]}],
        "universal": [{"history": [5.0, 3.0, 9.0, 8.0], "grown": [2], "flops": 4e12}],
        "nothing": [{"history": [None]}, {}],
    }
    with Run(tmp_path / "r", {"title": "m"}) as run:
        for name, datas in found.items():
            records = [Record("search", name, item=str(i), data=d) for i, d in enumerate(datas)]
            run.records.commit(name, records)
    drawn = {f.key: f for f in figures.figures(read.read([tmp_path / "r"]))}
    gcg, universal = drawn["search-steps"].data
    assert gcg.x == [1, 2, 3, 4] and gcg.y == [5.0, 3.0, 3.0, 2.5]  # who ended early keeps its last
    assert universal.breaks == [2] and drawn["search-flops"].data[0].breaks == [2.0]
    assert drawn["search-steps"].x == "search step" and "TFLOP" in drawn["search-flops"].x
    (line,) = [x for x in svg.draw(drawn["search-flops"]).split("<path") if 'class="line"' in x]
    path = line.split(' d="')[1].split('"')[0]
    assert path.count("M") == 2 and path.count("L") == 2 and path.index("M", 1) > path.index("L")


def test_texts_of_an_attack_are_not_in_a_report(tmp_path):
    text = "a beginning that nobody should read"
    about = {"attacks": {"prefill": {"attack": "prefill", "texts": [text]},
                         "x": {"then": {"attack": "insertion", "spans": [text]}}}}  # fmt: skip
    an_attack(tmp_path / "r", "m", {short(text): 0.5}, setting="text", **about)
    page = build([tmp_path / "r"], tmp_path / "r.html").read_text()
    assert "<b>Prefix:</b> no attack" in page
    assert text not in page and page.count(short(text)) >= 3
