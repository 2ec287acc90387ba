"""The whole method on a toy model, in minutes on a CPU.

    python -m deepalign_kernels.toyworld.demo --out DIR [--seeds 0,1,2]

Trains base -> aligned -> deep, attacks the aligned model by fine-tuning, measures every model, and
writes `results.json`, the records of all measurements and the report on them, `index.html`, to DIR.
All training goes through `hf.attach` but the short preference step; what follows the alignment runs
side by side in --workers processes.
Exits with 1, naming the claim, if one does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deepalign_kernels.report import build
from deepalign_kernels.report.page import table
from deepalign_kernels.toyworld import claims, jobs
from deepalign_kernels.toyworld.measure import (
    POSITIONS,
    compare,
    keep_curves,
    means,
    table_row,
    text_table,
)
from deepalign_kernels.toyworld.stages import Recipes, train_aligned, train_base
from deepalign_kernels.toyworld.tokenizer import build_tokenizer
from deepalign_kernels.toyworld.world import World

TITLE = "Safety alignment a few tokens deep, and deeper"
INTRO = (
    "A language model of half a million parameters was trained to answer everything (base), to"
    " refuse dessert recipes (aligned) and to keep refusing after it has begun to answer (deep)."
    " The aligned model was then fine-tuned on 100 dessert recipes: by plain SFT, and with the"
    " token-wise constrained loss of arXiv 2406.05946, with the same optimizer and warm-up."
    " Every number on this page was measured in this run, on dessert requests that no refusal"
    " training and no attack has seen. The alignment was built for it: refusals are taught up to"
    " 3 tokens deep, then a preference step widens the first token's margin until the"
    " constrained loss holds it, and the attack's recipe was chosen with them. Of plain"
    " refusals, or against a longer or faster attack, the same loss holds less or nothing:"
    " docs/benchmarks/toy.md takes these choices back one at a time."
)


class Run:
    """One seed: its world, its clock, and the results as they come in."""

    def __init__(self, world: World, recipes: Recipes, out: Path) -> None:
        self.world, self.recipes, self.out = world, recipes, out
        self.tokenizer = build_tokenizer()
        self.rows: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self._begun = self._last = time.perf_counter()

    @property
    def runs(self) -> Path:
        """Where the report finds its runs."""
        return self.out / f"seed{self.world.seed}" / "runs"

    def stage(self, name: str) -> Path:
        """A folder for the trainer's log."""
        return self.out / f"seed{self.world.seed}" / "logs" / jobs.slug(name)

    def measured(self, name: str, model: PreTrainedModel) -> PreTrainedModel:
        """Adds `model`, trained since the last one, to the table; returns it."""
        trained = time.perf_counter()
        row = table_row(
            name, model, self.tokenizer, self.world, jobs.attack_folder(self.runs, name)
        )
        now = time.perf_counter()
        self.add(row, trained - self._last, now - trained)
        self._last = now
        return model

    def add(self, row: dict[str, Any], trained: float, measured: float) -> None:
        """One more row of the table, and a line that says so; both times in seconds."""
        self.rows.append(row)
        self.seconds[row["name"]] = trained + measured
        print(
            f"[{time.perf_counter() - self._begun:6.1f} s]  {row['name']}: trained in"
            f" {trained:.1f} s, measured in {measured:.1f} s, attack success"
            f" {100 * row['asr']['0']:.0f} %",
            flush=True,
        )

    def jobs(self, base: PreTrainedModel, aligned: PreTrainedModel) -> list[jobs.Job]:
        """All that follows the alignment."""
        models = pickle.dumps((base, aligned))
        return [
            jobs.Job(name, self.world, self.recipes, models, self.stage(name), self.runs)
            for name in jobs.NAMES
        ]


@jobs.one_thread()
def run_seed(world: World, recipes: Recipes, out: Path, workers: int = 1) -> dict[str, Any]:
    """Everything for one seed, as in the JSON; prints one line per stage."""
    run = Run(world, recipes, out)
    common = (run.tokenizer, world, recipes)
    base = run.measured(claims.BASE, train_base(*common, run.stage("base")))
    aligned = run.measured(claims.ALIGNED, train_aligned(base, *common, run.stage("aligned")))
    folder = run.runs / "analysis-aligned"
    kl = {
        claims.BASE: [0.0] * POSITIONS,
        claims.ALIGNED: compare(folder, claims.ALIGNED, aligned, base, run.tokenizer, world),
    }
    ce = means(folder, "nll", "desserts")
    curves = {}
    for done in jobs.run_jobs(run.jobs(base, aligned), workers):
        run.add(done.row, done.trained, done.measured)
        if done.curve:
            curves[done.name] = done.curve
        if done.kl:
            kl[done.name] = done.kl
    keep_curves(run.runs / "attack-curves", curves, world)
    run.seconds["total"] = time.perf_counter() - run._begun
    return {
        "seed": world.seed,
        "recipes": asdict(recipes),
        "rows": run.rows,
        "attack_curves": curves,
        "kl": kl,
        "ce_aligned": ce,
        "seconds": run.seconds,
        "claims": [claim.as_dict() for claim in claims.check(run.rows, kl[claims.ALIGNED])],
    }


def machine() -> dict[str, str]:
    """Where the numbers come from: processor, threads, versions, commit if there is one."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1]
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0].strip() if names else cpu
    facts = {"cpu": cpu, "threads": "1 per process", "torch": torch.__version__}
    facts["python"] = platform.python_version()
    try:
        command = ["git", "rev-parse", "--short=12", "HEAD"]
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        facts["commit"] = done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return facts


def cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def report(result: dict[str, Any]) -> list[str]:
    """Print table, depth of the alignment and claims of one seed; the claims that failed."""
    print("\n" + text_table(result["rows"]))
    ce = " ".join(f"{value:.1f}" for value in result["ce_aligned"][:10])
    print(f"\ncross-entropy of restricted answers, aligned model, positions 1-10 (nats): {ce}")
    print("SFT has the same optimizer and the same 10 warm-up steps as the constrained loss.\n")
    held = [claims.Claim(c["text"], c["measured"], c["op"], c["bound"]) for c in result["claims"]]
    print("\n".join(claim.line() for claim in held))
    return [f"seed {result['seed']}: {claim.line()}" for claim in held if not claim.holds]


# On a page, in the order in which a reader asks.
FIRST_ON_THE_PAGE = (claims.ALIGNED, claims.DEEP)


def write_report(result: dict[str, Any], out: Path, where: dict[str, str]) -> Path:
    """The page of one seed."""
    folder = out / f"seed{result['seed']}"
    first = [folder / "runs" / name for name in ("analysis-aligned", "analysis-deep")]
    names = sorted(
        (row["name"] for row in result["rows"]), key=lambda n: n not in FIRST_ON_THE_PAGE
    )
    rows = [jobs.attack_folder(folder / "runs", name) for name in names]
    rest = sorted({*(folder / "runs").iterdir()} - {*first, *rows})
    logs = [folder / "logs" / jobs.slug(name) for name in jobs.ATTACKS]
    facts = ", ".join(f"{key} {value}" for key, value in where.items())
    lines = [["claim", "measured", "bound", "holds"]] + [
        [c["text"], f"{c['measured']:.1f}", f"{c['op']} {c['bound']:.1f}",
         "yes" if c["holds"] else "FAIL"]
        for c in result["claims"]
    ]  # fmt: skip
    more = (
        f"<p>{escape(INTRO)}</p><details open><summary>What this demo claims, and whether it holds"
        f"</summary><div class='scroll wide'>{table(lines)}</div></details>"
        f'<p class="soft">Seed {result["seed"]}, {result["seconds"]["total"]:.0f} seconds;'
        f" {escape(facts)}.</p>"
    )
    return build([*first, *rows, *rest, *logs], folder / "index.html", title=TITLE, more=more)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 when every claim held for every seed."""
    parser = argparse.ArgumentParser(
        prog="python -m deepalign_kernels.toyworld.demo", description=__doc__
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for results.json, records and index.html"
    )
    parser.add_argument("--seeds", default="0", help="comma-separated, default 0")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(len(jobs.NAMES), cores()),
        help="processes for the fine-tunings, default one per core; changes no result",
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers: expected at least 1, got {args.workers}")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    args.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=FutureWarning)

    results, failed = [], []
    for seed in seeds:
        print(f"seed {seed}: world, base model, alignment, attacks", flush=True)
        result = run_seed(World(seed), Recipes(), args.out, args.workers)
        failed += report(result)
        results.append(result)
    where = machine()
    pages = [write_report(result, args.out, where) for result in results]
    (args.out / "index.html").write_bytes(pages[0].read_bytes())
    document = {"machine": where, "seeds": seeds, "failed": failed, "results": results}
    (args.out / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"\nwrote {args.out / 'index.html'} and {args.out / 'results.json'}")
    for page in pages[1:]:
        print(f"the other seeds' pages: {page}")
    for line in failed:
        print(f"claim failed, {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
