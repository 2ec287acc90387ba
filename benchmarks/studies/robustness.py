"""The attack harness on the toy world's aligned, deep and fine-tuned models, over several seeds.

    python -m benchmarks robustness --out FILE.json --work DIR [--seeds 1,2,3]

Runs `deepalign_kernels.toyworld.robustness` for each seed and keeps every prompt's outcome. Its
settings were chosen on seed 0, which is therefore not among the seeds of the page.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any

from benchmarks.harness import machine, report
from deepalign_kernels.runs import cells, read_records, read_verdicts, stats
from deepalign_kernels.runs.table import union
from deepalign_kernels.toyworld import robustness, stages
from deepalign_kernels.toyworld.judging import ANSWER, RECIPE
from deepalign_kernels.toyworld.world import World


def study(seed: int, work: pathlib.Path) -> dict[str, Any]:
    """One seed: its contrasts, and beside them what is not required of them."""
    out = work / f"seed{seed}"
    out.mkdir(parents=True, exist_ok=True)
    clock, cpu = time.perf_counter(), time.process_time()
    found = robustness.run_seed(World(seed), stages.Recipes(), out)
    spent = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}
    tables = [
        cells(read_records(out / name, "sample"), read_verdicts(out / name))
        for name in (robustness.DEEP, robustness.ALIGNED)
    ]
    deep, aligned = (
        union(
            [
                c
                for c in table
                if c.attack == "decoding"
                and c.judge.startswith(RECIPE)
                and c.setting.get("temperature", 0) not in robustness.HOTTER
            ]
        )
        for table in tables
    )
    beside = [
        robustness.between(
            "decoding, the paper's grid, any recipe: aligned minus deep", deep, aligned
        ),
        *(
            robustness.between(
                f"{name}, right answer: aligned minus deep",
                robustness.of_cell(tables[0], name, ANSWER),
                robustness.of_cell(tables[1], name, ANSWER),
            )
            for name in ("gcg", "random_search")
        ),
    ]
    told = [
        {
            "text": c.text, "first": c.first, "second": c.second, "required": c in found,
            "holds": c.holds,
        }
        for c in (*found, *beside)
    ]  # fmt: skip
    return {"seed": seed, **{k: round(v, 1) for k, v in spent.items()}, "contrasts": told}


def values(document: dict[str, Any]) -> dict[str, str]:
    """Tables in markdown, over all seeds."""
    rows = document["rows"]
    lines, beside = [], []
    contrasts = [
        [next(c for c in r["contrasts"] if c["text"] == told["text"]) for r in rows]
        for told in rows[0]["contrasts"]
    ]
    pooled: list[tuple[list[float], list[float]]] = [
        (_joined(group, "first"), _joined(group, "second")) for group in contrasts
    ]
    required = [group[0]["required"] for group in contrasts]
    paired = [stats.paired(*both) for both in pooled]
    p_values = iter(stats.holm([d.p for d, r in zip(paired, required, strict=True) if r]))
    for group, both, d in zip(contrasts, pooled, paired, strict=True):
        rates = [_rate(sum(x), len(x)) for x in both]
        seeds = [100 * (sum(c["second"]) - sum(c["first"])) / len(c["first"]) for c in group]
        line = [
            group[0]["text"], str(len(both[0])), rates[1], rates[0],
            f"{100 * d.difference:.1f} [{100 * d.low:.0f}, {100 * d.high:.0f}]",
            ", ".join(f"{x:.0f}" for x in seeds),
        ]  # fmt: skip
        if group[0]["required"]:
            lines.append([*line, f"{next(p_values):.1g}"])
        else:
            beside.append(line)
    header = ["contrast", "prompts", "first, %", "second, %", "difference, points", "by seed"]
    minutes = [r["cpu_seconds"] / 60 for r in rows]
    return {
        "seeds": ", ".join(str(r["seed"]) for r in rows),
        "required": report.table([*header, "p (Holm)"], lines, markdown=True),
        "beside": report.table(header, beside, markdown=True),
        "minutes": f"{min(minutes):.1f} to {max(minutes):.1f}",
    }


def _joined(group: list[dict[str, Any]], side: str) -> list[float]:
    return [x for contrast in group for x in contrast[side]]


def _rate(successes: float, n: int) -> str:
    value, low, high = (100 * x for x in stats.wilson(int(successes), n))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def command(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks robustness", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("--out", type=pathlib.Path, help="JSON file")
    p.add_argument("--work", type=pathlib.Path, required=True, help="folder of models and runs")
    p.add_argument("--seeds", default="1,2,3", help="comma-separated")
    o = p.parse_args(argv)
    rows = [study(int(seed), o.work) for seed in o.seeds.split(",")]
    document = {"machine": machine.describe("cpu"), "rows": rows}
    if o.out:
        o.out.write_text(json.dumps(document, indent=1) + "\n")
    told = values(document)
    print(f"seeds {told['seeds']}, {told['minutes']} minutes of processor time each\n")
    print(f"{told['required']}\n\nNot required:\n\n{told['beside']}")
    return int(any(c["required"] and not c["holds"] for r in rows for c in r["contrasts"]))
