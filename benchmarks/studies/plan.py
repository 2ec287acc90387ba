"""Peak memory of full fine-tuning: what `deepalign plan` predicts, what the allocator counts.

Two steps of `deepalign_kernels.train` on random tokens, half of them trained, for models with the
shapes of real ones and random weights. `--only WORDS` takes the rows that have all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import pathlib
import tempfile
from typing import Any

from benchmarks.harness import machine

MIB = 2**20
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # config class, what differs from its defaults
    "SmolLM2-135M": (
        "LlamaConfig",
        {
            "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "Gemma-3-270M": (
        "Gemma3TextConfig",
        {
            "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "head_dim": 256,
            "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1,
        },
    ),
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32 + autocast": {"autocast": True},
    "fp32 + checkpointing": {"gradient_checkpointing": True},
    "fp32 + autocast + checkpointing": {"autocast": True, "gradient_checkpointing": True},
    "bf16 + Kahan + checkpointing": {
        "dtype": "bfloat16", "optimizer": "adamw_kahan", "gradient_checkpointing": True,
    },
    "bf16 + 8 bits + checkpointing": {
        "dtype": "bfloat16", "optimizer": "adamw_8bit", "gradient_checkpointing": True,
    },
    "bf16 + 8 bits + checkpointing + release": {
        "dtype": "bfloat16", "optimizer": "adamw_8bit", "gradient_checkpointing": True,
        "release_gradients": True,
    },
}  # fmt: skip
SIZES = {"SmolLM2-135M": (2, 256), "Gemma-3-270M": (1, 512)}


def one(model: str, name: str) -> dict[str, Any]:
    """Predicted and measured peak in bytes of one row."""
    import torch
    import transformers

    from deepalign_kernels import plan
    from deepalign_kernels._memory import measure
    from deepalign_kernels.data import Example
    from deepalign_kernels.train import TrainConfig, TrainingRun

    kind, options = MODELS[model]
    config, setting = getattr(transformers, kind)(**options), plan.Setting(**SETTINGS[name])
    batch, length = SIZES[model]
    sizes = {"batch": batch, "length": length, "trained_share": 0.5}
    expected = plan.estimate(plan.shape_of(config), setting, device="cpu", **sizes)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, 1000, (batch, length), generator=generator).tolist()
    half = length // 2
    places = [0] * half + list(range(1, length - half + 1))
    rows = [Example(ids, [-100] * half + ids[half:], places) for ids in tokens]

    class Tokenizer:
        pad_token_id = eos_token_id = 2

    with tempfile.TemporaryDirectory() as folder:
        chosen = {
            f: getattr(setting, f)
            for f in ("optimizer", "release_gradients", "gradient_checkpointing")
        }
        run_config = TrainConfig(
            folder, max_steps=2, batch_size=batch, gradient_accumulation_steps=1, warmup_steps=0,
            save_every=None, progress=False, learning_rate=1e-3,
            autocast_dtype="bfloat16" if setting.autocast else None, **chosen,
        )  # fmt: skip

        def run() -> None:
            dtype = getattr(torch, setting.dtype)
            built = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
            TrainingRun(built, Tokenizer(), run_config, rows).train()

        measured = measure(run)[1].peak
    whole = dataclasses.asdict(expected)
    return {"model": model, "setting": name, **sizes, "predicted": whole, "measured": measured}


def command(arguments: list[str]) -> int:
    """Run the rows, each in a process of its own, print a table and write plan.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plan", description=__doc__)
    parser.add_argument("--only", nargs="*", default=(), help="words of a row's model and setting")
    parser.add_argument("--out", type=pathlib.Path, help="folder for plan.json")
    options = parser.parse_args(arguments)
    rows = []
    print("| model | setting | tokens | predicted MiB | measured MiB | predicted / measured |")
    print("|---|---|--:|--:|--:|--:|")
    for model in MODELS:
        for name in SETTINGS:
            if not all(word in f"{model} {name}" for word in options.only):
                continue
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(one, (model, name))
            rows.append(row)
            expected, measured = row["predicted"]["peak"], row["measured"]
            print(
                f"| {model} | {name} | {row['batch']} x {row['length']} | {expected / MIB:.0f} |"
                f" {measured / MIB:.0f} | {expected / measured:.2f} |",
                flush=True,
            )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": machine.describe("cpu"), "rows": rows}, indent=1)
        (options.out / "plan.json").write_text(text + "\n")
    return 0
