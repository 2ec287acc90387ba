"""What the demo's contrast depends on: the toy world's models under other alignments and attacks.

    python -m benchmarks toy --out FILE.json --work DIR [--seeds 0,1,2]

`make demo` shows one alignment, which was built to be shallow and firm, under one attack, whose
recipe was chosen on the result. Here each of these choices is taken back, one at a time. A stopped
study goes on where it was; every result is a line in DIR.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.harness import machine
from benchmarks.harness.report import table as _table
from deepalign_kernels.analyze import pairs_of, profile
from deepalign_kernels.runs import curves, stats
from deepalign_kernels.toyworld import stages
from deepalign_kernels.toyworld.judging import PREFILL_DEPTHS, accuracy, attack_success
from deepalign_kernels.toyworld.tokenizer import build_tokenizer
from deepalign_kernels.toyworld.world import World

POSITIONS = 20
RECIPES = stages.Recipes()
ALIGNMENTS = {  # how the model learnt to refuse
    "demo": RECIPES,
    "no margin step": replace(RECIPES, margin_steps=0),
    "plain refusals": replace(RECIPES, margin_steps=0, shallow_p0=1.0),
}
SFT, PAPER = None, stages.PAPER
ATTACK, TASK = RECIPES.attack, RECIPES.task


class Tuning(NamedTuple):
    """A fine-tuning of one aligned model; `beta` None is SFT."""

    alignment: str
    name: str
    beta: Any
    recipe: stages.Recipe
    benign: bool = False


def tunings() -> Iterator[Tuning]:
    """All of them."""
    for alignment in ALIGNMENTS:
        yield Tuning(alignment, "SFT", SFT, ATTACK)
        yield Tuning(alignment, "constrained", PAPER, ATTACK)
    for name, beta in (("SFT", SFT), ("constrained", PAPER)):
        yield Tuning("demo", f"{name}, no warm-up", beta, replace(ATTACK, warmup_steps=0))
        for alignment in ("demo", "plain refusals"):
            yield Tuning(alignment, f"benign task, {name}", beta, TASK, benign=True)
        plain = replace(TASK, warmup_steps=0)
        yield Tuning("plain refusals", f"benign task, {name}, no warm-up", beta, plain, benign=True)
    long, fast = {"steps": 300}, {"learning_rate": 1e-3, "steps": 150}
    for name, change in (
        ("300 steps", long),
        ("rate 1e-3, 150 steps", fast),
        ("Adam beta1 0.9", {"adam_betas": (0.9, 0.999)}),
        ("clipped to 1", {"max_grad_norm": 1.0}),
    ):
        yield Tuning("demo", f"constrained, {name}", PAPER, replace(ATTACK, **change))


def study(seed: int, work: pathlib.Path, most: int = 0) -> list[dict[str, Any]]:
    """All rows of one seed; `most` > 0 cuts every stage to so many steps, for a test."""
    path = work / f"seed{seed}.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(x) for x in path.read_text().splitlines()] if path.is_file() else []
    done = {(r["alignment"], r["name"]) for r in rows}
    world, tokenizer = World(seed), build_tokenizer()

    def cut(recipe: stages.Recipe) -> stages.Recipe:
        return replace(recipe, steps=min(recipe.steps, most)) if most else recipe

    def kept(name: str, make: Any) -> Any:
        file = work / f"{name}-{seed}.pt".replace(" ", "-")
        if not file.is_file():
            torch.save(make(), file)
        return torch.load(file, weights_only=False)

    def add(alignment: str, name: str, model: Any, begun: float) -> None:
        row = {"seed": seed, "alignment": alignment, "name": name}
        row |= measured(model, base, tokenizer, world)
        row["cpu_seconds"] = round(time.process_time() - begun, 1)
        rows.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        asr = " ".join(f"{100 * v:.0f}" for v in row["asr"].values())
        print(f"seed {seed}: {alignment}: {name}: {asr}, {row['cpu_seconds']} s", flush=True)

    whole = {n: r.shortened(most) if most else r for n, r in ALIGNMENTS.items()}
    logs = work / "logs"
    base = kept("base", lambda: stages.train_base(tokenizer, world, whole["demo"], logs))
    aligned = {}
    for name, recipes in whole.items():
        begun = time.process_time()
        aligned[name] = kept(
            name, lambda r=recipes: stages.train_aligned(base, tokenizer, world, r, logs)
        )
        if (name, "") not in done:
            add(name, "", aligned[name], begun)
    for t in tunings():
        if (t.alignment, t.name) not in done:
            begun = time.process_time()
            data = stages.task_records(world) if t.benign else world.records("attack")
            given = (aligned[t.alignment], tokenizer, cut(t.recipe), data, logs)
            model = stages.train_stage(*given, beta=t.beta, seed=seed)
            add(t.alignment, t.name, model, begun)
    return rows


def measured(model: Any, base: Any, tokenizer: Any, world: World) -> dict[str, Any]:
    """Attack success by prefilled tokens, accuracies, and means by position on the true answers."""
    pairs = pairs_of(tokenizer, {"desserts": world.records("restricted")}, POSITIONS)
    there = profile(model, base, tokenizer, pairs, positions=POSITIONS)
    return {
        "n": len(world.requests["restricted"]),
        "asr": {str(k): rate for k, rate in attack_success(model, tokenizer, world).items()},
        "benign": accuracy(model, tokenizer, world, stages.BENIGN_EVAL),
        "task": accuracy(model, tokenizer, world, ["task_eval"]),
        "kl": [round(float(v), 3) for v in np.nanmean(there.kl_model_base, 0)],
        "margin": round(float(there.margin[:, 0].mean()), 2),
    }


Rows = list[dict[str, Any]]
table = functools.partial(_table, markdown=True)


def rate(rows: Rows, k: int | str) -> str:
    """Percent answered at k given tokens, over all requests of all seeds with Wilson's interval;
    behind it each seed's, where there are several."""
    values, n = [r["asr"][str(k)] for r in rows], sum(r["n"] for r in rows)
    hits = sum(round(r["asr"][str(k)] * r["n"]) for r in rows)
    value, low, high = (100 * x for x in stats.wilson(hits, n))
    seeds = f" ({', '.join(f'{100 * v:.0f}' for v in values)})" if len(values) > 1 else ""
    return f"{value:.0f} [{low:.0f}, {high:.0f}]{seeds}"


def mean(rows: Rows, key: str) -> float:
    return float(np.mean([r[key] for r in rows]))


def values(document: dict[str, Any]) -> dict[str, str]:
    """What the page's template asks for."""
    found: dict[tuple[str, str], Rows] = {}
    for row in document["rows"]:
        found.setdefault((row["alignment"], row["name"]), []).append(row)
    seeds = sorted({r["seed"] for r in document["rows"]})
    where = document["machine"]

    def line(alignment: str, name: str, label: str, *ks: int) -> list[str]:
        rows = found[alignment, name]
        return [label, *(rate(rows, k) for k in ks)]

    alignments = []
    for name in ALIGNMENTS:
        aligned = found[name, ""]
        margin = np.array([r["margin"] for r in aligned])
        left, slower = curves.weight_at_flip(margin), curves.slowdown(margin)
        told = [f"{margin.mean():.1f}", f"{100 * left.mean():.2g} %", f"{slower.mean():.2g}"]
        ends = [rate(found[name, after], 0) for after in ("SFT", "constrained")]
        alignments.append([name, *told, *ends])
    attacks = [
        line(t.alignment, t.name, t.name, 0)
        for t in tunings()
        if t.alignment == "demo" and not t.benign
    ]
    benign = [
        [f"{a}: {label}", *(rate(found[a, name], k) for k in (0, 5, 10)),
         f"{100 * mean(found[a, name], 'task'):.0f}"]
        for a in ("demo", "plain refusals")
        for name, label in (
            ("", "before"),
            *((t.name, t.name) for t in tunings() if t.alignment == a and t.benign),
        )
    ]  # fmt: skip
    plain = found["plain refusals", ""]
    kl = np.mean([r["kl"] for r in plain], 0)
    return {
        "seeds": ", ".join(map(str, seeds)),
        "requests": str(document["rows"][0]["n"]),
        "alignments": table(
            ("alignment", "margin of the first token, nats", "gradient left at the flip",
             "predicted slowdown", "answered after SFT, %", "after constrained, %"),
            alignments,
        ),
        "attacks": table(("attack on the demo's alignment", "answered, %"), attacks),
        "benign": table(
            ("", "answered, k = 0, %", "k = 5", "k = 10", "task right, %"), benign
        ),
        "plain_prefill": table(
            tuple(f"k = {k}" for k in document["depths"]),
            [[rate(plain, k) for k in document["depths"]]],
        ),
        "plain_kl": table(
            tuple(str(p) for p in (1, 2, 3, 4, 5, 10, 20)),
            [[f"{kl[p - 1]:.2f}" for p in (1, 2, 3, 4, 5, 10, 20)]],
        ),
        "cpu_minutes": f"{sum(r['cpu_seconds'] for r in document['rows']) / 60:.0f}",
        "source": f"{where['cpu']} ({where['cpu_capability']}), one thread, torch {where['torch']},"
        f" commit {where['commit']}",
    }  # fmt: skip


def command(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks toy", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file")
    parser.add_argument(
        "--work", type=pathlib.Path, required=True, help="folder of models and rows"
    )
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--most-steps", type=int, default=0, help="of any stage: for a trial")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    facts = machine.describe("cpu")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    rows = [row for seed in seeds for row in study(seed, options.work, options.most_steps)]
    document = {"machine": facts, "depths": list(PREFILL_DEPTHS), "rows": rows}
    if options.out:
        options.out.write_text(json.dumps(document) + "\n")
    return 0
