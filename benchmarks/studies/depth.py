"""Does the depth of an alignment rank models by their attack success under prefilling?

    python -m benchmarks depth [--keep RUN ... --out FILE]

Reads the stored results of `examples/real_model.py` and of `python -m benchmarks toy`; `python -m
benchmarks page` puts the same numbers into the documentation. `--keep` stores the numbers of the
report on these runs instead, for the same page.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from benchmarks.harness import machine, report
from deepalign_kernels.report import read, verdict
from deepalign_kernels.runs import curves

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results"
REAL, TOY = "real-model-cpu-2core-2026-11-29.json", "toy-cpu-2core-2026-11-29.json"
REPORT = "report-smollm2-cpu-2core-2026-11-29.json"
FIRST = 5
SHOWN = (0, 1, 2, 3, 4, 5, 6, 7, 8)  # columns of the report's first table


class Model(NamedTuple):
    """One model of a study."""

    name: str
    seed: int
    tuned: bool  # after a fine-tuning of the aligned model
    share: float  # of the KL to the original in the first positions
    unprompted: float  # attack success without a prefix, in [0, 1]
    prefilled: float  # mean over k > 0


def real(document: dict[str, Any]) -> list[Model]:
    """Of SmolLM2; the original itself has no divergence to look at."""
    return [
        Model(
            f"{m['alignment']}, {m['variant']}",
            m["seed"],
            m["variant"] != "not fine-tuned" and m["alignment"] != "recovery",
            curves.share_within(m["kl_base"], FIRST, resamples=2).value,
            float(np.mean(m["asr"]["0"])),
            float(np.mean([v for k, v in m["asr"].items() if k != "0"])),
        )
        for m in document["models"]
        if m["alignment"] != "original"
    ]


def toy(document: dict[str, Any]) -> list[Model]:
    """Of the toy world."""
    return [
        Model(
            f"{m['alignment']}, {m['name'] or 'not fine-tuned'}",
            m["seed"],
            bool(m["name"]),
            sum(m["kl"][:FIRST]) / sum(m["kl"]),
            m["asr"]["0"],
            float(np.mean([v for k, v in m["asr"].items() if k != "0"])),
        )
        for m in document["rows"]
    ]


class Ranked(NamedTuple):
    """Spearman's rank correlation over models with its interval, a bootstrap over models."""

    rho: float
    low: float
    high: float
    p_value: float
    count: int


def ranked(models: Sequence[Model], resamples: int = 2000) -> Ranked | None:
    """Of share and success under prefilling; None for fewer than four models."""
    if len(models) < 4:
        return None
    x, y = (np.array([getattr(m, name) for m in models]) for name in ("share", "prefilled"))
    found = curves.rank_correlation(x.tolist(), y.tolist())
    rng, draws = np.random.default_rng(0), []
    for _ in range(resamples):
        i = rng.integers(len(x), size=len(x))
        if len(set(x[i])) > 1 and len(set(y[i])) > 1:
            again: Any = spearmanr(x[i], y[i])
            draws.append(again.statistic)
    low, high = np.percentile(draws, (2.5, 97.5))
    return Ranked(found.rho, float(low), float(high), found.p_value, found.count)


GROUPS: dict[str, Callable[[Model], bool]] = {
    "not fine-tuned": lambda m: not m.tuned,
    "all that decline without a prefix": lambda m: m.unprompted < 0.5,
    "all": lambda m: True,
}


def lines(models: Sequence[Model]) -> list[list[str]]:
    """A table, first line the titles."""
    out = [["models", "n", "rank correlation", "p"]]
    for name, chosen in GROUPS.items():
        r = ranked([m for m in models if chosen(m)])
        if r is not None:
            told = f"{r.rho:.2f} [{r.low:.2f}, {r.high:.2f}]"
            out.append([name, str(r.count), told, f"{r.p_value:.2g}"])
    return out


def values() -> dict[str, str]:
    """What the page of docs/ shows: a table for each study."""
    shown = (lines(models) for models in studies().values())
    real, world = (report.table(rows[0], rows[1:], markdown=True) for rows in shown)
    kept = json.loads((RESULTS / REPORT).read_text())
    numbers = [[row[i] for i in SHOWN] for row in kept["numbers"]]
    return {
        "real": real,
        "toy": world,
        "sentences": "\n".join(f"> {s}\n>" for s in kept["sentences"]).removesuffix("\n>"),
        "numbers": report.table(numbers[0], numbers[1:], markdown=True),
        "recovered": report.table(kept["recovered"][0], kept["recovered"][1:], markdown=True),
        "report_file": REPORT,
        "report_machine": report.machine_text({"packages": {}, **kept["machine"]}),
    }


def numbers_of(folders: Sequence[str]) -> dict[str, Any]:
    """What a report on these runs says, and where this was."""
    sources = read.read(folders)
    return {
        "sentences": verdict.sentences(sources),
        "numbers": verdict.key_numbers(sources),
        "recovered": verdict.recoveries(sources),
        "machine": machine.describe("cpu"),
    }


def studies() -> dict[str, list[Model]]:
    """All stored models by study."""
    makers = {"SmolLM2-135M-Instruct": (REAL, real), "toy world": (TOY, toy)}
    return {
        name: make(json.loads((RESULTS / file).read_text()))
        for name, (file, make) in makers.items()
    }


def command(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks depth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--keep", nargs="+", help="runs of which the report's numbers are stored")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for them")
    options = parser.parse_args(argv)
    if options.keep:
        if options.out is None:
            parser.error("--keep: needs --out FILE")
        options.out.write_text(json.dumps(numbers_of(options.keep), indent=1) + "\n")
        return 0
    for study, models in studies().items():
        print(study)
        for m in sorted(models):
            print(f"  {m.name}, seed {m.seed}: share {m.share:.2f}, success {m.prefilled:.2f}")
        for line in lines(models):
            print("  " + " | ".join(line))
    return 0
