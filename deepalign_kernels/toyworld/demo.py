"""The whole method on a toy model, in minutes on a CPU.

    python -m deepalign_kernels.toyworld.demo --out DIR [--seeds 0,1,2]

Trains base -> aligned -> deep, attacks the aligned model by fine-tuning, measures every model, and
writes table, figures, `results.json` and `index.html` to DIR. All training goes through `hf.attach`
but the short preference step; what follows the alignment runs side by side in --workers processes.
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
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deepalign_kernels.toyworld import claims, figures, jobs, page
from deepalign_kernels.toyworld.measure import ce_by_position, kl_by_position, table_row
from deepalign_kernels.toyworld.stages import Recipes, train_aligned, train_base
from deepalign_kernels.toyworld.tokenizer import build_tokenizer
from deepalign_kernels.toyworld.world import World


class Run:
    """One seed: its world, its clock, and the results as they come in."""

    def __init__(self, world: World, recipes: Recipes, out: Path) -> None:
        self.world, self.recipes, self.out = world, recipes, out
        self.tokenizer = build_tokenizer()
        self.rows: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self._begun = self._last = time.perf_counter()

    def stage(self, name: str) -> Path:
        """A folder for the trainer's log."""
        slug = "".join(c if c.isalnum() else "-" for c in name)
        return self.out / "logs" / f"seed{self.world.seed}" / slug

    def measured(self, name: str, model: PreTrainedModel) -> PreTrainedModel:
        """Adds `model`, trained since the last one, to the table; returns it."""
        trained = time.perf_counter()
        row = table_row(name, model, self.tokenizer, self.world)
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
            jobs.Job(name, self.world, self.recipes, models, self.stage(name))
            for name in jobs.NAMES
        ]


@jobs.one_thread()
def run_seed(world: World, recipes: Recipes, out: Path, workers: int = 1) -> dict[str, Any]:
    """Everything for one seed, as in the JSON; prints one line per stage."""
    run = Run(world, recipes, out)
    common = (run.tokenizer, world, recipes)
    base = run.measured(claims.BASE, train_base(*common, run.stage("base")))
    aligned = run.measured(claims.ALIGNED, train_aligned(base, *common, run.stage("aligned")))
    kl = {
        claims.BASE: kl_by_position(base, base, run.tokenizer, world),
        claims.ALIGNED: kl_by_position(aligned, base, run.tokenizer, world),
    }
    ce = ce_by_position(aligned, run.tokenizer, world)
    curves = {}
    for done in jobs.run_jobs(run.jobs(base, aligned), workers):
        run.add(done.row, done.trained, done.measured)
        if done.curve:
            curves[done.name] = done.curve
        if done.kl:
            kl[done.name] = done.kl
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
    print("\n" + page.text_table(result["rows"]))
    ce = " ".join(f"{value:.1f}" for value in result["ce_aligned"][:10])
    print(f"\ncross-entropy of restricted answers, aligned model, positions 1-10 (nats): {ce}")
    print("SFT has the same optimizer and the same 10 warm-up steps as the constrained loss.\n")
    held = [claims.Claim(c["text"], c["measured"], c["op"], c["bound"]) for c in result["claims"]]
    print("\n".join(claim.line() for claim in held))
    return [f"seed {result['seed']}: {claim.line()}" for claim in held if not claim.holds]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 when every claim held for every seed."""
    parser = argparse.ArgumentParser(
        prog="python -m deepalign_kernels.toyworld.demo", description=__doc__
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for results.json, index.html and figures"
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
        drawn = figures.draw(result, args.out / f"seed{seed}")
        result["figures"] = {caption: str(path) for caption, path in drawn.items()}
        failed += report(result)
        results.append(result)
    where = machine()
    document = {"machine": where, "seeds": seeds, "failed": failed, "results": results}
    (args.out / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    page.write_page(results, where, args.out / "index.html")
    print(f"\nwrote {args.out / 'index.html'} and {args.out / 'results.json'}")
    for line in failed:
        print(f"claim failed, {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
