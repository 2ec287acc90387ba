"""The whole method on a toy model, in minutes on a CPU.

    python -m deepalign_kernels.toyworld.demo --out DIR [--seeds 0,1,2]

Trains base -> aligned -> deep, attacks the aligned model by fine-tuning, measures every model, and
writes table, figures, `results.json` and `index.html` to DIR. Exits with 1, naming the claim, if
one does not hold.
"""

from __future__ import annotations

import argparse
import json
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

from deepalign_kernels.losses import BetaSchedule
from deepalign_kernels.toyworld import claims, figures, page
from deepalign_kernels.toyworld.judging import attack_success
from deepalign_kernels.toyworld.measure import ce_by_position, kl_by_position, table_row
from deepalign_kernels.toyworld.stages import (
    ALL_TWO,
    PAPER,
    UNIFORM,
    Recipe,
    Recipes,
    StepCallback,
    task_records,
    train_aligned,
    train_base,
    train_deep,
    train_stage,
)
from deepalign_kernels.toyworld.tokenizer import build_tokenizer
from deepalign_kernels.toyworld.world import Record, World

ATTACKS = {
    claims.ATTACK_SFT: None,
    claims.ATTACK_PAPER: PAPER,
    claims.ATTACK_TWO: ALL_TWO,
    claims.ATTACK_UNIFORM: UNIFORM,
}
TASKS = {claims.TASK_SFT: None, claims.TASK_PAPER: PAPER}


class Run:
    """One seed: its world, its clock, and the results as they come in."""

    def __init__(self, world: World, recipes: Recipes, out: Path) -> None:
        self.world, self.recipes, self.out = world, recipes, out
        self.tokenizer = build_tokenizer()
        self.rows: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self._begun = self._last = time.perf_counter()

    def stage(self, name: str) -> Path:
        """A folder for the trainer's log."""
        slug = "".join(c if c.isalnum() else "-" for c in name)
        return self.out / "logs" / f"seed{self.world.seed}" / slug

    def measured(self, name: str, model: PreTrainedModel) -> PreTrainedModel:
        """Adds `model` to the table and says so; returns it."""
        trained = time.perf_counter() - self._last
        row = table_row(name, model, self.tokenizer, self.world)
        now = time.perf_counter()
        self.rows.append(row)
        self.seconds[name] = now - self._last
        print(
            f"[{now - self._begun:6.1f} s]  {name}: trained in {trained:.1f} s, measured in"
            f" {now - self._last - trained:.1f} s, attack success {100 * row['asr']['0']:.0f} %",
            flush=True,
        )
        self._last = now
        return model

    def tuned(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        data: list[Record],
        name: str,
        beta: BetaSchedule | None,
        on_step: StepCallback | None = None,
    ) -> PreTrainedModel:
        """`model` fine-tuned: SFT when `beta` is None, else constrained to itself."""
        out, seed = self.stage(name), self.world.seed
        return train_stage(
            model, self.tokenizer, recipe, data, out, beta=beta, seed=seed, on_step=on_step
        )

    def watch(self, name: str, aligned: PreTrainedModel) -> StepCallback:
        """Attack success without prefill now and, by the callback, at every fifth step."""
        points = self.curves[name] = [
            (0, attack_success(aligned, self.tokenizer, self.world, depths=(0,))[0])
        ]

        def on_step(model: PreTrainedModel, step: int) -> None:
            if step % 5 == 0 or step == self.recipes.attack.steps:
                points.append(
                    (step, attack_success(model, self.tokenizer, self.world, depths=(0,))[0])
                )

        return on_step


def run_seed(world: World, recipes: Recipes, out: Path) -> dict[str, Any]:
    """Everything for one seed, as in the JSON; prints one line per stage."""
    run = Run(world, recipes, out)
    common = (run.tokenizer, world, recipes)
    base = run.measured(claims.BASE, train_base(*common, run.stage("base")))
    aligned = run.measured(claims.ALIGNED, train_aligned(base, *common, run.stage("aligned")))
    deep = run.measured(claims.DEEP, train_deep(aligned, *common, run.stage("deep")))
    for name, beta in ATTACKS.items():
        pairs, watch = world.records("attack"), run.watch(name, aligned)
        run.measured(name, run.tuned(aligned, recipes.attack, pairs, name, beta, watch))
    for name, beta in TASKS.items():
        run.measured(name, run.tuned(aligned, recipes.task, task_records(world), name, beta))
    kl = {
        claims.BASE: kl_by_position(base, base, run.tokenizer, world),
        claims.ALIGNED: kl_by_position(aligned, base, run.tokenizer, world),
        claims.DEEP: kl_by_position(deep, base, run.tokenizer, world),
    }
    run.seconds["total"] = time.perf_counter() - run._begun
    return {
        "seed": world.seed,
        "recipes": asdict(recipes),
        "rows": run.rows,
        "attack_curves": run.curves,
        "kl": kl,
        "ce_aligned": ce_by_position(aligned, run.tokenizer, world),
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
    facts = {"cpu": cpu, "threads": str(torch.get_num_threads()), "torch": torch.__version__}
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
    args = parser.parse_args(argv)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    args.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=FutureWarning)

    results, failed = [], []
    for seed in seeds:
        print(f"seed {seed}: world, base model, alignment, attacks", flush=True)
        result = run_seed(World(seed), Recipes(), args.out)
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
