"""Full fine-tuning of a model of 8 billion parameters under limits on the memory of one GPU.

Under each limit the most exact recipes of `deepalign plan` run that it predicts to fit one GPU
without FSDP: random weights in the shape of Llama-3.1-8B, random tokens, half of them trained, the
constrained objective. Each runs in a process of its own, whose allocator refuses more than the
limit. Beside what was predicted: the allocator's peak, the most of the device that was in use, host
memory, tokens a second. torchtune's own figures for this model are of other cards: one RTX 4090:
18.9 GiB, 1650 tokens/s; one A6000: 37.4 GiB, 2579 tokens/s.

`--tiny` plays it on a CPU, where nothing enforces the limit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pathlib
import resource
import statistics
import tempfile
import time
from typing import Any

from benchmarks.harness import machine

GIB = 2**30
RESERVED = GIB  # for the driver and the allocator, as `deepalign plan` leaves
SHAPE: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
HEADER = """\
| limit GiB | recipe | tokens | predicted GiB | peak | device | host | tokens/s |
|--:|---|--:|--:|--:|--:|--:|--:|"""


def recipes(shape: dict[str, Any], limit: float, batch: int, length: int, device: str) -> list[str]:
    """Names of those that fit, the most exact first."""
    import transformers

    from deepalign_kernels import plan

    sizes = plan.shape_of(transformers.LlamaConfig(**shape))
    free, found, kind = limit * GIB - RESERVED, [], device.partition(":")[0]
    for recipe in plan.RECIPES:
        setting = recipe.setting
        if setting.cpu_offload or (device == "cpu" and setting.optimizer == "adamw_offload"):
            continue  # FSDP's; and on a CPU there is nothing to move states away from
        if plan.estimate(sizes, setting, batch=batch, length=length, device=kind).peak <= free:
            found.append(recipe.name)
    return found


def one(
    name: str, shape: dict[str, Any], limit: float, batch: int, length: int, steps: int, device: str
) -> dict[str, Any]:
    """A row of the table; a recipe that runs out of memory gives its message as `failed`."""
    import torch
    import transformers

    from benchmarks.studies.step import Tokenizer, rows_of
    from deepalign_kernels import plan
    from deepalign_kernels._memory import measure
    from deepalign_kernels.data import Example
    from deepalign_kernels.train import TrainConfig, TrainingRun

    setting = next(r.setting for r in plan.RECIPES if r.name == name)
    config = transformers.LlamaConfig(**shape)
    sizes: dict[str, Any] = {"batch": batch, "length": length}
    sizes |= {"trained_share": 0.5, "device": device.partition(":")[0]}
    expected = plan.estimate(plan.shape_of(config), setting, **sizes)
    row = {"recipe": name, "limit_gib": limit, "batch": batch, "length": length}
    row |= {"predicted": expected.peak}
    row |= {"predicted_host": expected.host}
    on_gpu, used, starts = device != "cpu", [0], []
    if on_gpu:
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(limit * GIB / whole, 1.0), device)
        before = torch.cuda.mem_get_info(device)[0]  # free: others and our own context are in use
    else:
        torch.set_num_threads(1)

    def at_a_step(*_: Any) -> None:
        if on_gpu:
            torch.cuda.synchronize(device)
            used.append(before - torch.cuda.mem_get_info(device)[0])
        starts.append(time.perf_counter())

    half = length // 2
    places = [0] * half + list(range(1, length - half + 1))
    data = [Example(r["input_ids"], r["labels"], places) for r in rows_of(batch, length, steps + 1)]
    fields = ("optimizer", "release_gradients", "gradient_checkpointing", "offload_activations")

    def run() -> None:
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, setting.dtype)
            )
        model.get_input_embeddings().register_forward_pre_hook(at_a_step)
        with tempfile.TemporaryDirectory() as folder:
            run_config = TrainConfig(
                folder, batch_size=batch, gradient_accumulation_steps=1, epochs=1, warmup_steps=0,
                learning_rate=1e-5, save_every=None, progress=False,
                autocast_dtype="bfloat16" if setting.autocast else None,
                **{f: getattr(setting, f) for f in fields},
            )  # fmt: skip
            TrainingRun(model, Tokenizer(), run_config, data).train()

    try:
        row["peak"] = measure(run)[1].peak
    except torch.OutOfMemoryError as error:
        return row | {"failed": str(error).partition(". ")[0]}
    # The reference comes before the steps, the compilation of an optimizer into the first one.
    between = [b - a for a, b in zip(starts[-steps:], starts[-steps:][1:], strict=False)]
    row |= {"seconds": between, "device_used": max(used)}
    return row | {"host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def line(row: dict[str, Any]) -> str:
    """Of the table."""
    fits = f"| {row['limit_gib']:g} | {row['recipe']} | {row['batch']} x {row['length']} "
    fits += f"| {row['predicted'] / GIB:.2f} | "
    if "failed" in row:
        return f"{fits}{row['failed']} | | | |"
    speed = row["batch"] * row["length"] / statistics.median(row["seconds"])
    sizes = (f"{row[name] / GIB:.2f}" for name in ("peak", "device_used", "host_peak"))
    return f"{fits}{' | '.join(sizes)} | {speed:.0f} |"


def command(arguments: list[str]) -> int:
    """Run the recipes, print a table and write the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks capped", description=__doc__)
    parser.add_argument("--limits", default="24,48", help="GiB, with commas")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of a few kB on a CPU")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=5, help="of which all but the first count")
    parser.add_argument("--recipes", type=int, default=2, help="so many under each limit")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args(arguments)
    if options.steps < 3:
        parser.error(f"--steps: expected at least 3, got {options.steps}")
    if options.recipes < 1:
        parser.error(f"--recipes: expected at least 1, got {options.recipes}")
    shape, device = (TINY, "cpu") if options.tiny else (SHAPE, options.device)
    batch, length = options.batch, options.length
    rows: list[dict[str, Any]] = []
    print(HEADER)
    for limit in map(float, options.limits.split(",")):
        for name in recipes(shape, limit, batch, length, device)[: options.recipes]:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                given = (name, shape, limit, batch, length, options.steps, device)
                rows.append(pool.apply(one, given))
            print(line(rows[-1]), flush=True)
            if options.json:  # after each, so that a run that is stopped leaves what it has
                text = json.dumps({"machine": machine.describe(device), "rows": rows}, indent=1)
                options.json.write_text(text + "\n")
    return 1 if not rows or any("failed" in row for row in rows) else 0
