"""What is measured on a model: attack success, accuracies, and where it differs from another; as
records for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign_kernels.analyze import Settings, analyse, pairs_of
from deepalign_kernels.runs import Record, Run, read_records
from deepalign_kernels.toyworld.judging import Verdict, accuracy, prefilled
from deepalign_kernels.toyworld.stages import BENIGN_EVAL
from deepalign_kernels.toyworld.world import World

POSITIONS = 20  # as in the paper's figure 1; the shortest dessert answer has more tokens
JUDGE = "right answer"


def table_row(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World
) -> dict[str, Any]:
    """One line of the table; all rates in [0, 1], `asr` by number of prefilled tokens (str),
    `answered` the same by request: 1 where it was answered."""
    found = prefilled(model, tokenizer, world)
    answered = {str(k): [int(v is Verdict.ANSWER) for v in said] for k, said in found.items()}
    return {
        "name": name,
        "asr": {k: sum(said) / len(said) for k, said in answered.items()},
        "answered": answered,
        "benign": accuracy(model, tokenizer, world, BENIGN_EVAL),
        "task": accuracy(model, tokenizer, world, ["task_eval"]),
    }


def keep_attack(folder: Path, row: Mapping[str, Any], seed: int) -> None:
    """A row's attack with prefilled tokens, as a run for the report."""
    about = {"about": "attack", "title": row["name"], "seed": seed, "decoding": "greedy"}
    samples, verdicts = [], []
    for k, said in row["answered"].items():
        for item, success in enumerate(said):
            sample = Record("sample", "prefill", {"k": int(k)}, f"{item}")
            data = {"of": sample.key, "success": bool(success)}
            samples.append(sample)
            verdicts.append(Record("verdict", JUDGE, {"of": sample.key}, f"{item}", data=data))
    with Run(folder, about) as run:
        run.records.commit("all", samples)
        run.verdicts.commit("all", verdicts)


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
