"""A step of full fine-tuning: this library's loop beside trl's SFTTrainer and a plain loop.

Models with the shapes of real ones and random weights, fp32, torch's AdamW, one thread, the same
rows in the same order, half of each trained. Every way runs in a process of its own, in turns:
peak bytes of torch's allocator from building the model to the end of the second step, and, without
the profiler, processor seconds from one optimizer step to the next. `--only WORDS` takes the rows
that have all of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import machine
from benchmarks.studies.plan import MIB, MODELS

SIZES = {"SmolLM2-135M": (1, 128), "Gemma-3-270M": (1, 128)}
RATE = 1e-5


def rows_of(batch: int, length: int, steps: int) -> list[dict[str, list[int]]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, 1000, (batch * steps, length), generator=generator).tolist()
    half = length // 2
    return [{"input_ids": ids, "labels": [-100] * half + ids[half:]} for ids in tokens]


class Tokenizer:
    pad_token_id = eos_token_id = 2


def ours(objective: str) -> Callable[..., None]:
    def run(model: Any, rows: list[dict[str, list[int]]], batch: int, folder: str) -> None:
        from deepalign_kernels.data import Example
        from deepalign_kernels.train import TrainConfig, TrainingRun

        half = len(rows[0]["labels"]) // 2
        places = [0] * half + list(range(1, len(rows[0]["labels"]) - half + 1))
        data = [Example(row["input_ids"], row["labels"], places) for row in rows]
        config = TrainConfig(
            folder, objective=objective, batch_size=batch, gradient_accumulation_steps=1, epochs=1,
            warmup_steps=0, learning_rate=RATE, save_every=None, progress=False,
        )  # fmt: skip
        TrainingRun(model, Tokenizer(), config, data).train()

    return run


def trls(model: Any, rows: list[dict[str, list[int]]], batch: int, folder: str) -> None:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from deepalign_kernels import toyworld

    tokenizer: PreTrainedTokenizerFast = toyworld.build_tokenizer()
    config = SFTConfig(
        folder, per_device_train_batch_size=batch, num_train_epochs=1, learning_rate=RATE,
        max_length=None, max_grad_norm=0.0, gradient_checkpointing=False, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", disable_tqdm=True, shuffle_dataset=False,
        optim="adamw_torch_fused", logging_steps=1,
    )  # fmt: skip
    data = Dataset.from_list(rows)
    SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer).train()


def plain(model: Any, rows: list[dict[str, list[int]]], batch: int, folder: str) -> None:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.5, 0.999), fused=True)
    model.train()
    for at in range(0, len(rows), batch):
        few = rows[at : at + batch]
        inputs = {name: torch.tensor([row[name] for row in few]) for name in few[0]}
        model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


WAYS: dict[str, Callable[..., None]] = {
    "plain loop": plain,
    "trl SFTTrainer": trls,
    "this library, sft": ours("sft"),
    "this library, constrained": ours("constrained"),
}


def one(model: str, way: str, steps: int, profiled: bool) -> float:
    """Peak bytes of two steps, or processor seconds of a step, the median after the first."""
    import torch
    import transformers
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from deepalign_kernels._memory import measure

    torch.set_num_threads(1)
    kind, options = MODELS[model]
    config = getattr(transformers, kind)(**options)
    batch, length = SIZES[model]
    rows, ends = rows_of(batch, length, steps), []
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(time.process_time()))
    with tempfile.TemporaryDirectory() as folder:

        def run() -> None:
            built = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            WAYS[way](built, rows, batch, folder)

        peak = measure(run)[1].peak if profiled else run()
    hook.remove()
    if peak is not None:
        return float(peak)
    assert len(ends) == steps, (way, len(ends))
    return statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False))


def command(arguments: list[str]) -> int:
    """Run the rows, print a table and write step.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks step", description=__doc__)
    parser.add_argument("--only", nargs="*", default=(), help="words of a row's model and way")
    parser.add_argument("--rounds", type=int, default=2, help="of the clock; the least counts")
    parser.add_argument("--steps", type=int, default=3, help="in a round")
    parser.add_argument("--out", type=pathlib.Path, help="folder for step.json")
    options = parser.parse_args(arguments)
    found = [(m, w) for m in MODELS for w in WAYS]
    found = [pair for pair in found if all(word in " ".join(pair) for word in options.only)]
    seconds: dict[tuple[str, str], list[float]] = {pair: [] for pair in found}
    for _ in range(options.rounds):
        for pair in found:
            seconds[pair].append(_apart(*pair, options.steps, False))
    rows = []
    print("| model | way | tokens | peak MiB | tokens per processor second |")
    print("|---|---|--:|--:|--:|")
    for model, way in found:
        batch, length = SIZES[model]
        peak, least = _apart(model, way, 2, True), min(seconds[model, way])
        about = {"model": model, "way": way, "batch": batch, "length": length}
        rows.append({**about, "peak": peak, "seconds": seconds[model, way]})
        speed = batch * length / least
        print(
            f"| {model} | {way} | {batch} x {length} | {peak / MIB:.0f} | {speed:.1f} |", flush=True
        )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": machine.describe("cpu"), "rows": rows}, indent=1)
        (options.out / "step.json").write_text(text + "\n")
    return 0


def _apart(*arguments: Any) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(one, arguments)
