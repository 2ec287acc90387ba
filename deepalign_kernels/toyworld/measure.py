"""What is measured on a model: attack success, accuracies, and where it differs from another; as
records for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign_kernels.analyze import Settings, analyse, pairs_of
from deepalign_kernels.attack.suite import evaluate, judge_run, plain
from deepalign_kernels.generate.local import LocalEngine
from deepalign_kernels.runs import Record, Run, cells, read_records, read_verdicts
from deepalign_kernels.toyworld.judging import WorldJudge, accuracy, prefill, prompts_of
from deepalign_kernels.toyworld.stages import BENIGN_EVAL
from deepalign_kernels.toyworld.world import World

POSITIONS = 20  # as in the paper's figure 1; the shortest dessert answer has more tokens


def table_row(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    folder: Path,
) -> dict[str, Any]:
    """One line of the table; all rates in [0, 1], `asr` by number of prefilled tokens (str). The
    attack's replies and verdicts are a run of the harness in `folder`, for the report."""
    prompts, attack = prompts_of(world), prefill(world)
    engine = LocalEngine(model, tokenizer, batch_size=len(prompts) * len(attack.depths), name=name)
    about = {"about": "attack", "title": name, "seed": world.seed, "engine": engine.about(),
             "attacks": {attack.name: plain(attack)}}  # fmt: skip
    with Run(folder, about) as run:
        evaluate(run, engine, {attack.name: attack}, prompts, chunk=len(prompts))
        judge_run(run, [WorldJudge(world, tokenizer)])
    asr = {}
    for cell in cells(read_records(folder, "sample"), read_verdicts(folder)):
        outcomes = [v for values in cell.outcomes.values() for v in values]
        asr[str(cell.setting["k"])] = sum(outcomes) / len(outcomes)
    return {
        "name": name,
        "asr": asr,
        "benign": accuracy(model, tokenizer, world, BENIGN_EVAL),
        "task": accuracy(model, tokenizer, world, ["task_eval"]),
    }


def keep_curves(
    folder: Path, curves: Mapping[str, Sequence[tuple[int, float]]], world: World
) -> None:
    """Attack success by step of fine-tunings, as a run for the report."""
    n = len(world.requests["restricted"])
    with Run(folder, {"about": "fine-tuning attacks", "title": "attacks"}) as run:
        for name, points in curves.items():
            records = [
                Record("training", name, {"step": step}, data={"asr": rate, "n": n})
                for step, rate in points
            ]
            run.records.commit(name, records)


def compare(
    folder: Path,
    name: str,
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
) -> list[float]:
    """Analyse `model` against `base` on held-out desserts and savoury recipes, as a run in
    `folder`; mean KL(model || base) in nats at positions 1..20 of the desserts."""
    groups = {"desserts": "restricted", "savoury recipes": "recipes_eval"}
    data = {group: world.records(split) for group, split in groups.items()}
    settings = Settings(
        title=name, positions=POSITIONS, gradients="all", gradient_examples=16, seed=world.seed
    )
    analyse(folder, model, base, tokenizer, pairs_of(tokenizer, data, POSITIONS), settings)
    return means(folder, "kl_model_base", "desserts")


def means(folder: Path, metric: str, group: str) -> list[float]:
    """Means by position of what an analysis has recorded."""
    rows = [
        r.data["values"][metric]
        for r in read_records(folder, "profile")
        if r.name == "profile" and r.cell["group"] == group
    ]
    return np.array(rows, dtype=float).mean(0).tolist()


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for a terminal, in percent."""
    head = ["model", *(f"k={k}" for k in rows[0]["asr"]), "benign", "task"]
    body = [
        [r["name"], *(f"{100 * v:.1f}" for v in (*r["asr"].values(), r["benign"], r["task"]))]
        for r in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    title = "attack success at k prefilled tokens, benign accuracy, accuracy on the benign task (%)"
    lines = []
    for first, *numbers in (head, *body):
        padded = (cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    return "\n".join([title, *lines])
