"""The page from runs: what it says, what it draws, and how it behaves in a real browser."""

import csv
import html
import html.parser
import io
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from made_runs import DEEP, SHALLOW, K, N, an_analysis, an_attack

from deepalign_kernels import runs
from deepalign_kernels.cli import main as cli
from deepalign_kernels.report import attacks, build, figures, read, svg, verdict
from deepalign_kernels.report.figure import Figure, Heat, Series
from deepalign_kernels.runs import Record, Run, Unit, curves, fill


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    out = [
        an_analysis(root / "a", "aligned", SHALLOW),
        an_analysis(root / "d", "deep", DEEP, 1),
        an_attack(root / "p", "aligned", {0: 0.0, 1: 0.25, 5: 0.75, 10: 0.75}),
        an_attack(root / "q", "deep", {0: 0.0, 1: 0.0, 5: 0.04, 10: 0.04}),
        an_attack(root / "t", "aligned", {0.1: 0.1, 1.0: 0.5}, name="decoding",
                  setting="temperature"),
    ]  # fmt: skip
    with Run(root / "f", {"about": "fine-tuning", "title": "attacks"}) as run:
        for name, last in (("SFT", 0.9), ("constrained", 0.05)):
            points = [(0, 0.0), (5, last / 2), (10, last)]
            records = [
                Record("training", name, {"step": s}, data={"asr": r, "n": 100}) for s, r in points
            ]
            run.records.commit(name, records)
        history = [5.0, 4.0, 4.5, 2.0]
        data = {"history": history, "flops": 1e12}
        found = [
            Record("search", "gcg", item=i, data=data, seconds=s) for i, s in (("a", 2), ("b", 6))
        ]
        fill(run.records, [Unit("g", lambda: found)])
        for step in (0, 5):
            values = {"nll": [3.0, 1.0], "kl_model_base": [0.0, 0.0], "head_grad": [2.0, 1.0]}
            cell = {"step": step}
            record = Record("profile", "dynamics", cell, data={"values": values, "count": 4})
            run.records.commit(f"{step}", [record])
    log = root / "log"
    log.mkdir()
    lines = [{"event": "start", "step": 0, "config": {"objective": "sft"}}]
    lines += [
        {"event": "step", "step": s, "nll": 3.0 / s, "nll_first": 4.0 / s, "grad_norm": 1.0}
        for s in (1, 2, 3)
    ]
    (log / "train_log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return [*out, root / "f", log]


@pytest.fixture(scope="module")
def page(folders, tmp_path_factory):
    return build(folders, tmp_path_factory.mktemp("page") / "report.html")


EXPECTED = {  # key: number of series, or rows of a grid
    "kl": 4, "kl-shape": 4, "prefill": 4, "nll": 5, "entropy": 5, "norm-head": 4, "norm-last": 4,
    "norm-whole": 4, "margin": 4, "js": 4, "kl-reverse": 4, "ratio": 4, "rank": 4, "agree": 4,
    "layers-0": 2, "layers-1": 1, "asr-steps": 3, "dynamics-nll-0": 2, "dynamics-head_grad-0": 2,
    "dynamics-kl_model_base-0": 2, "log-nll": 1, "log-nll_first": 1, "log-grad_norm": 1,
    "decoding-temperature": 1, "search-steps": 1, "search-flops": 1, "search-seconds": 1,
    "judges-0": 2, "judges-1": 2, "judges-2": 2,
}  # fmt: skip


def test_every_figure_is_there_with_its_table(folders):
    found = {f.key: f for f in figures.figures(read.read(folders))}
    sizes = {k: len(f.data.rows if isinstance(f.data, Heat) else f.data) for k, f in found.items()}
    assert sizes == EXPECTED
    for figure in found.values():
        lines = list(csv.reader(io.StringIO(figure.csv)))
        assert lines == figure.table and len(lines) > 1
        assert figure.x and figure.y and figure.title and figure.caption
        drawn = svg.draw(figure)
        if isinstance(figure.data, Heat):
            assert drawn.count("data-at=") == len(figure.data.rows) * len(figure.data.columns)
        else:
            assert drawn.count('class="line"') == len(figure.data)


def test_a_model_has_one_colour_and_every_curve_its_own_look(folders):
    colours = {}
    for figure in figures.figures(read.read(folders)):
        if isinstance(figure.data, Heat):
            continue
        for s in figure.data:
            if s.name.partition(",")[0] in ("aligned", "deep"):
                colours.setdefault(s.name.partition(",")[0], set()).add(s.look)
        looks = [svg.swatch(s) for s in figure.data]
        assert len(set(looks)) == len(looks), figure.key
    assert colours == {"aligned": {0}, "deep": {1}}


def test_curves_are_means_with_their_intervals(folders):
    (source,) = read.read(folders[:1])
    values = source.values["kl_model_base"]["asked"]
    assert values.shape == (N // 2, K) and np.isnan(values[:, -1]).any()
    (kl, *_) = [f for f in figures.figures([source]) if f.key == "kl"]
    series = next(s for s in kl.data if s.name == "aligned, asked")
    expected = curves.curve(values)
    assert series.y == pytest.approx(expected.mean) and series.low == pytest.approx(expected.low)
    assert series.count[0] == N // 2 and series.count[-1] < N // 2


def test_rates_have_wilson_intervals(folders):
    (source,) = read.read([folders[2]])
    ((label, cells),) = attacks.sweeps(source, "k").items()
    series = attacks.rates(cells, "k", "x")
    assert label == "aligned"
    low, high = runs.stats.wilson(18, 24)[1:]
    assert series.x == [0.0, 1.0, 5.0, 10.0] and series.y == [0.0, 25.0, 75.0, 75.0]
    assert (series.low[2], series.high[2]) == pytest.approx((100 * low, 100 * high))


def test_sweeps_of_one_run_are_told_apart(tmp_path):
    folder = an_attack(tmp_path / "r", "m", {5: 0.5})
    with Run(tmp_path / "s", {"about": "attack", "engine": {"model": "a/b/m"}}) as run:
        records = list(runs.read_records(folder))
        verdicts, samples = [], []
        for objective in ("sft", "constrained"):
            for step in (0, 10):
                cell = {"objective": objective, "warmup": 10, "step": step}
                for r in records:
                    samples.append(Record("sample", "finetune", cell, r.item))
                    data = {"of": samples[-1].key, "success": objective == "sft" and step > 0}
                    verdicts.append(Record("verdict", "j", {"of": data["of"]}, r.item, data=data))
        run.records.commit("all", samples)
        run.verdicts.commit("all", verdicts)
    series = attacks.finetunings(read.read([tmp_path / "s"]))
    assert {s.name: s.y for s in series} == {
        "m, objective=sft": [0.0, 100.0],
        "m, objective=constrained": [0.0, 0.0],
    }
    sentence = verdict.sentences(read.read([tmp_path / "s"]))[2]
    assert "100 % [86, 100] in \u201cm, objective=sft\u201d after 10 steps (n = 24)" in sentence


def test_searches_are_drawn_by_step_time_and_computation(folders):
    found = {f.key: f for f in figures.figures(read.read([folders[5]]))}
    (by_step,), (by_work,) = found["search-steps"].data, found["search-flops"].data
    (by_time,) = found["search-seconds"].data
    assert by_time.x == [1, 2, 3, 4] and by_time.y == by_step.y  # 8 seconds, 8 steps
    assert by_step.x == [1, 2, 3, 4] and by_step.y == [5.0, 4.0, 4.0, 2.0]  # the best so far
    assert by_work.x == [0.25, 0.5, 0.75, 1.0] and by_work.y == by_step.y


def test_the_verdict_follows_its_rules(folders):
    depth, prefix, training = verdict.sentences(read.read(folders))
    share = SHALLOW[0] + 2.5 + 2 + 1.5 + 1
    assert f"aligned is shallow: {100 * share / sum(SHALLOW):.0f} % ["[:22] in depth
    assert "from base lies in the first 5 of 20 positions (n = 12 answers)" in depth
    assert "deep is deep: 2" in depth and "Spread evenly it would be 25 %." in depth
    assert "aligned answers 0 % [0, 14] without a prefix and 75 % [55, 88] at k = 5" in prefix
    assert "half of the way by k = 2.0 [" in prefix  # 0.375 lies a quarter of the way from 1 to 5
    assert "deep shows no rise with a prefix: 0 % [0, 14] at k = 0, at most 4 %" in prefix
    assert "90 % [83, 94] in \u201cSFT\u201d after 10 steps (n = 100)" in training
    only = verdict.sentences(read.read(folders[:1]))
    assert "no attack with prefilled tokens" in only[1] and "First token: aligned puts" in only[2]
    nothing = verdict.sentences(read.read([folders[-1]]))
    assert all(": no " in sentence or "is in this report" in sentence for sentence in nothing)


def test_between_the_bounds_nothing_is_decided(tmp_path):
    an_analysis(tmp_path, "middling", [3.0] * 5 + [2.0] * 15)
    (sentence, *_) = verdict.sentences(read.read([tmp_path]))
    assert "middling is neither clearly shallow nor deep" in sentence


def test_models_are_ranked_where_there_are_five(tmp_path):
    said = []
    for i, share in enumerate((1.0, 2.0, 3.0, 4.0, 5.0)):
        an_analysis(tmp_path / f"a{i}", f"m{i}", [share * 5] * 5 + [1.0] * 15)
        an_attack(tmp_path / f"p{i}", f"m{i}", {0: 0.0, 5: 0.15 * share})
        said.append(verdict.sentences(read.read([tmp_path]))[2])
    assert "over 5 models" in said[4] and "rank correlation of 1.00 (p = 0.02" in said[4]
    assert said[3].startswith("First token: m0 puts") and "; m3: 2.1 [" in said[3]


def test_what_a_margin_predicts_stands_beside_it(folders):
    head, aligned, _, deep, *_ = verdict.key_numbers(read.read(folders[:2]))
    row, other = (dict(zip(head, line, strict=True)) for line in (aligned, deep))
    margin = np.array([
        r.data["values"]["margin"][0] for r in runs.read_records(folders[0], "profile")
        if r.name == "profile" and r.cell["group"] == row["answers"]
    ])  # fmt: skip
    left = np.mean(2 / (1 + ((1 + np.exp(margin)) / 2) ** 0.5))  # 2 sigmoid(-r / 2)
    assert row["gradient left at the flip"].startswith(f"{100 * left:.0f} % [")
    assert 1 < float(row["predicted slowdown"].split()[0]) < 2
    assert row["favourite first token, its log-odds"] == ""
    assert other["favourite first token, its log-odds"].startswith("'Sorry' 12 of 12, 1")
    sentence = verdict.sentences(read.read(folders[:1]))[2]
    assert f"leaves {100 * left:.0f} % [" in sentence


def test_prefixes_in_one_number_and_beside_the_paper(folders, tmp_path):
    sources = read.read(folders)
    _, aligned, deep = verdict.recoveries(sources)
    assert aligned[:2] == ["aligned", "24"] and deep[2] == ""
    recovered = (0.75 + 0.25 + 0.25) / 3
    assert aligned[3].startswith(f"{100 * recovered:.0f} % [")
    assert aligned[4] == "1: 75 %, 5: 25 %, 10: 25 %"
    an_attack(tmp_path / "g", "aligned", {"": 0.5}, name="gcg", setting="x")
    lines = attacks.beside_the_paper([*sources, *read.read([tmp_path / "g"])])
    found = {(line[0], line[1]): line[2:] for line in lines[1:]}
    assert found["aligned", "prefill, k=5"] == ["first", "75 % [55, 88]", "24", "42.1", "2.8"]
    assert ("aligned", "prefill, k=1") not in found
    whole = found["aligned", "decoding, any of 2 settings"]
    assert whole == ["first", "50 % [31, 69]", "24", "54.9", "11.3"]
    assert found["aligned", "gcg, x="] == ["first", "50 % [31, 69]", "24", "36.5", "18.4"]


class Parser(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.refs, self.ids = [], [], []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.refs += [named[k] for k in ("src", "href") if k in named]
        self.ids += [named["id"]] if "id" in named else []
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(page):
    text = page.read_text()
    parser = Parser()
    parser.feed(text)
    assert parser.open == [] and len(parser.ids) == len(set(parser.ids))
    assert all(ref == "data:," or ref[1:] in parser.ids for ref in parser.refs)
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert page.stat().st_size < 5_000_000
    assert "&lt;b&gt;no" in text and "<b>no" not in text  # what a token says is not markup
    assert "<td>deep</td>" in text and '<span class="deep">deep</span>' in text  # name, verdict
    assert "<td>the rest</td><td>2.00</td><td>60.0% to 30.0%</td>" in text  # with what reads 0.00
    assert "Wilson" in text and "Manifest" in text


def test_the_command_and_wrong_folders(folders, tmp_path, capsys):
    words = ["report", *map(str, folders[:2]), "--out", f"{tmp_path}/r.html"]
    assert cli.main(words) == 0 and (tmp_path / "r.html").is_file()
    assert "KiB" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert "no run here: neither manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "low,high,expected",
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 0.9, [0, 0.2, 0.4, 0.6, 0.8]),
        (3, 3, [3]),
        (-5, 5, [-4, -2, 0, 2, 4]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert svg.ticks(low, high) == pytest.approx(expected)


def test_empty_and_extreme_series_are_drawn():
    for data in (
        [Series("a", [], [])],
        [Series("a", [1, 2], [None, None])],
        [Series("a", [1], [1e30]), Series("b", [1, 2], [0.0, math.pi])],
        Heat(["r"], ["c"], [[None]]),
        Heat(["r"], ["c"], [[-1.0]]),
    ):
        assert "NaN" not in svg.draw(Figure("k", "t", "c", "x", "y", "s", data))


# --- in a browser ---------------------------------------------------------------------------------

CHECK = """
<script>
window.addEventListener("load", () => setTimeout(() => {
  const out = {errors: window.caught, figures: {}};
  const key = (chart, name) => chart.dispatchEvent(
    new KeyboardEvent("keydown", {key: name, bubbles: true}));
  for (const figure of document.querySelectorAll("figure[data-key]")) {
    const chart = figure.querySelector(".chart"), one = {};
    chart.focus();
    one.focused = document.activeElement === chart;
    one.name = chart.getAttribute("aria-label");
    key(chart, "ArrowRight");
    const tip = figure.querySelector(".tip");
    one.tip = tip.hidden ? "" : tip.innerText;
    one.said = document.getElementById("live").textContent;
    one.lines = [...chart.querySelectorAll(".series:not([hidden]) .line")].filter(
      (l) => l.getBoundingClientRect().width > 0).length;
    one.cells = chart.querySelectorAll("[data-at]").length;
    const box = chart.getBoundingClientRect();
    one.box = [box.width, box.height];
    one.outside = [...chart.querySelectorAll("text")].filter((t) => {
      const b = t.getBoundingClientRect();
      return b.left < box.left - 2 || b.right > box.right + 2 || b.bottom > box.bottom + 2
        || b.top < box.top - 2;
    }).map((t) => t.textContent);
    const button = figure.querySelector(".legend button");
    if (button) {
      button.click();
      one.off = getComputedStyle(figure.querySelector(".series")).display === "none";
      button.click();
      one.on = getComputedStyle(figure.querySelector(".series")).display !== "none";
    }
    key(chart, "Escape");
    one.hidden = tip.hidden;
    out.figures[figure.dataset.key] = one;
  }
  const theme = document.documentElement.dataset.theme;
  document.querySelector(".theme").click();
  out.themes = [theme, document.documentElement.dataset.theme];
  out.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  out.reachable = [...document.querySelectorAll("a[href], button, summary, .chart")].every(
    (e) => e.tabIndex >= 0);
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(out);
  document.body.append(result);
}, 50));
</script>
"""
CATCH = (
    "<head><script>window.caught = [];"
    'window.addEventListener("error", (e) => window.caught.push(e.message));'
    "console.error = (...a) => window.caught.push(a.join(' '));</script>"
)


def chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for n in names if (path := shutil.which(n))), None)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_in_a_browser_nothing_fails_and_keys_reach_every_value(page, tmp_path, width):
    browser = chromium()
    if browser is None:
        pytest.skip("no Chromium here: the page is not opened in a browser")
    text = page.read_text().replace("<head>", CATCH).replace("</body>", CHECK + "</body>")
    (tmp_path / "p.html").write_text(text)
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path}/profile", f"--window-size={width},900",
         "--virtual-time-budget=4000", "--dump-dom", f"file://{tmp_path}/p.html"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    raw = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)
    assert raw, done.stderr[-2000:]
    found = json.loads(html.unescape(raw[1]))
    assert found["errors"] == []
    assert found["figures"].keys() == EXPECTED.keys()
    for key, one in found["figures"].items():
        assert one["focused"] and one["tip"] and one["said"] and one["hidden"], key
        assert one["lines"] or one["cells"], key
        assert one["box"][0] > 250 and one["box"][1] > 80, (key, one["box"])
        assert one["outside"] == [], (key, one["outside"])
        assert one.get("off", True) and one.get("on", True), key
    assert "aligned, asked: 9" in found["figures"]["kl"]["tip"].replace("\n", " ") or (
        "aligned, other" in found["figures"]["kl"]["tip"]
    )
    assert sorted(found["themes"]) == ["dark", "light"]
    assert found["wide"] <= 0 and found["reachable"]
