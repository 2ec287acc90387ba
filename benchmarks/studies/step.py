"""A step of full fine-tuning: this library's loop beside trl's SFTTrainer and a plain loop.

Models with the shapes of real ones and random weights, torch's AdamW or the optimizer that the
setting names, one thread, the same rows in the same order, half of each trained. Every way runs in
a process of its own, in turns: peak bytes of torch's allocator from building the model to the end
of the second step, and, without the profiler, processor seconds from one step's forward to the
next's. `--only WORDS` takes the rows that have all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import machine, report
from benchmarks.studies.plan import MIB, MODELS, SETTINGS

SIZES = {"SmolLM2-135M": (1, 256), "Gemma-3-270M": (1, 256)}
RATE = 1e-5
Rows = list[dict[str, list[int]]]
Setting = dict[str, Any]  # as in `plan`; without a key: fp32 weights and torch's AdamW


def rows_of(batch: int, length: int, steps: int) -> Rows:
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, 1000, (batch * steps, length), generator=generator).tolist()
    half = length // 2
    return [{"input_ids": ids, "labels": [-100] * half + ids[half:]} for ids in tokens]


class Tokenizer:
    pad_token_id = eos_token_id = 2


def ours(objective: str) -> Callable[..., None]:
    def run(model: Any, rows: Rows, batch: int, folder: str, setting: Setting) -> None:
        from deepalign_kernels.data import Example
        from deepalign_kernels.train import TrainConfig, TrainingRun

        half = len(rows[0]["labels"]) // 2
        places = [0] * half + list(range(1, len(rows[0]["labels"]) - half + 1))
        data = [Example(row["input_ids"], row["labels"], places) for row in rows]
        chosen = {k: v for k, v in setting.items() if k not in ("dtype", "autocast")}
        config = TrainConfig(
            folder, objective=objective, batch_size=batch, gradient_accumulation_steps=1, epochs=1,
            warmup_steps=0, learning_rate=RATE, save_every=None, progress=False,
            autocast_dtype="bfloat16" if setting.get("autocast") else None, **chosen,
        )  # fmt: skip
        TrainingRun(model, Tokenizer(), config, data).train()

    return run


def trls(model: Any, rows: Rows, batch: int, folder: str, setting: Setting) -> None:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from deepalign_kernels import toyworld

    tokenizer: PreTrainedTokenizerFast = toyworld.build_tokenizer()
    optimizer = {None: "adamw_torch_fused", "adamw_8bit": "adamw_torch_8bit"}
    config = SFTConfig(
        folder, per_device_train_batch_size=batch, num_train_epochs=1, learning_rate=RATE,
        max_length=None, max_grad_norm=0.0, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, shuffle_dataset=False, logging_steps=1,
        bf16=setting.get("autocast", False), optim=optimizer[setting.get("optimizer")],
        gradient_checkpointing=setting.get("gradient_checkpointing", False),
    )  # fmt: skip
    data = Dataset.from_list(rows)
    SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer).train()


def plain(model: Any, rows: Rows, batch: int, folder: str, setting: Setting) -> None:
    import torch

    assert not setting, setting
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.5, 0.999), fused=True)
    model.train()
    for at in range(0, len(rows), batch):
        few = rows[at : at + batch]
        inputs = {name: torch.tensor([row[name] for row in few]) for name in few[0]}
        model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


TRAINERS: dict[str, Callable[..., None]] = {
    "plain loop": plain,
    "trl SFTTrainer": trls,
    "this library, sft": ours("sft"),
    "this library, constrained": ours("constrained"),
}
# What trl can do with the same weights and optimizer stands above each setting of this library.
ALIKE = ("fp32", "fp32 + autocast", "fp32 + checkpointing", "bf16 + 8 bits + checkpointing")
FASTEST = "this library, constrained"
WAYS = [
    *((trainer, "fp32") for trainer in ("plain loop", "this library, sft")),
    *(
        (trainer, setting)
        for setting in SETTINGS
        for trainer in ("trl SFTTrainer", FASTEST)
        if trainer == FASTEST or setting in ALIKE
    ),
]


def one(model: str, trainer: str, setting: str, steps: int, length: int, profiled: bool) -> float:
    """Peak bytes of two steps, or processor seconds of a step, the median without the last."""
    import torch
    import transformers

    from deepalign_kernels._memory import measure

    torch.set_num_threads(1)
    kind, options = MODELS[model]
    config, chosen = getattr(transformers, kind)(**options), SETTINGS[setting]
    dtype = getattr(torch, chosen.get("dtype", "float32"))
    batch = SIZES[model][0]
    rows, starts = rows_of(batch, length, steps), []
    with tempfile.TemporaryDirectory() as folder:

        def run() -> None:
            built = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
            clock = lambda *_: starts.append(time.process_time())  # noqa: E731
            built.get_input_embeddings().register_forward_pre_hook(clock)
            TRAINERS[trainer](built, rows, batch, folder, chosen)

        peak = measure(run)[1].peak if profiled else run()
    if peak is not None:
        return float(peak)
    assert len(starts) >= steps, (trainer, setting, len(starts))  # a reference comes before them
    steps_only = starts[-steps:]
    return statistics.median(b - a for a, b in zip(steps_only, steps_only[1:], strict=False))


def values(timed: dict[str, Any], longer: dict[str, Any]) -> dict[str, str]:
    """What the page's template asks for: times and peaks of `timed`, peaks of `longer`, the same
    ways with longer rows where they were measured."""
    rows, far = timed["rows"], longer["rows"]
    speed = {(r["model"], r["way"], r["setting"]): min(r["seconds"]) for r in rows}
    peaks = {(r["model"], r["way"], r["setting"]): f"{r['peak'] / MIB:.0f}" for r in far}
    lengths = (f"{r[0]['batch'] * r[0]['length']} tokens" for r in (rows, far))
    header = ["setting", "way", *(f"peak MiB, {text}" for text in lengths)]
    header += ["tokens a processor second", "of trl's time"]
    parts = []
    for model in MODELS:
        lines = []
        for r in (r for r in rows if r["model"] == model):
            key = model, r["way"], r["setting"]
            trl = speed.get((model, "trl SFTTrainer", r["setting"]))
            lines.append(
                [r["setting"], r["way"], f"{r['peak'] / MIB:.0f}", peaks.get(key, "-"),
                 f"{r['batch'] * r['length'] / speed[key]:.1f}",
                 f"{speed[key] / trl:.2f}" if trl else "-"]
            )  # fmt: skip
        if lines:
            vocab = MODELS[model][1]["vocab_size"]
            shown = report.table(header, lines, markdown=True)
            parts.append(f"## {model}: a vocabulary of {vocab}\n\n{shown}")
    return {"tables": "\n\n".join(parts)}


def command(arguments: list[str]) -> int:
    """Run the rows, print a table and write step.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks step", description=__doc__)
    parser.add_argument("--only", nargs="*", default=(), help="words of a row's model and way")
    parser.add_argument(
        "--rounds", type=int, default=2, help="of the clock; the least counts; 0: none"
    )
    parser.add_argument("--length", type=int, help="tokens of a row; default 256")
    parser.add_argument("--steps", type=int, default=3, help="in a round")
    parser.add_argument("--out", type=pathlib.Path, help="folder for step.json")
    options = parser.parse_args(arguments)
    found = [(m, *way) for m in MODELS for way in WAYS]
    found = [row for row in found if all(word in " ".join(row) for word in options.only)]
    seconds: dict[tuple[str, str, str], list[float]] = {row: [] for row in found}
    for _ in range(options.rounds):
        for row in found:
            length = options.length or SIZES[row[0]][1]
            seconds[row].append(_apart(*row, options.steps, length, False))
    rows = []
    print("| model | way | setting | tokens | peak MiB | tokens per processor second |")
    print("|---|---|---|--:|--:|--:|")
    for model, way, setting in found:
        batch, length = SIZES[model][0], options.length or SIZES[model][1]
        peak, took = _apart(model, way, setting, 2, length, True), seconds[model, way, setting]
        about = {"model": model, "way": way, "setting": setting, "batch": batch, "length": length}
        rows.append({**about, "peak": peak, "seconds": took})
        print(
            f"| {model} | {way} | {setting} | {batch} x {length} | {peak / MIB:.0f}"
            f" | {batch * length / min(took, default=math.nan):.1f} |",
            flush=True,
        )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": machine.describe("cpu"), "rows": rows}, indent=1)
        (options.out / "step.json").write_text(text + "\n")
    return 0


def _apart(*arguments: Any) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(one, arguments)
