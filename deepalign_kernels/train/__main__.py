"""`python -m deepalign_kernels.train --model PATH --data FILE.jsonl --output DIR ...`

Fine-tunes a causal LM and writes it, with its tokenizer, to DIR/model. Every field of
`TrainConfig` is an option.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import torch

from deepalign_kernels.data import RecoveryAugmentation, load_chat_data
from deepalign_kernels.data.examples import ORIGINS, TOO_LONG
from deepalign_kernels.losses import BetaSchedule
from deepalign_kernels.rules import RULES
from deepalign_kernels.train import config as choices
from deepalign_kernels.train.config import TrainConfig
from deepalign_kernels.train.loop import TrainingRun

BY_HAND = ("output_dir", "beta", "adam_betas")
ALLOWED = {
    "objective": (*choices.OBJECTIVES, *RULES),
    "reference": choices.REFERENCES,
    "head": choices.HEADS,
    "lr_schedule": choices.SCHEDULES,
    "position_origin": ORIGINS,
    "on_too_long": TOO_LONG,
    "autocast_dtype": ("bfloat16",),
}


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m deepalign_kernels.train",
        description="Constrained fine-tuning of a causal language model (arXiv 2406.05946).",
    )
    out.add_argument(
        "--model", required=True, help="folder or hub name of a causal LM with its tokenizer"
    )
    out.add_argument("--data", required=True, help="JSONL of messages, or of prompt and completion")
    out.add_argument(
        "--output", required=True, help="folder for log, checkpoints and the trained model"
    )
    out.add_argument(
        "--recovery", help="JSONL of prompt, answer, refusal: augmentation, --data as anchors"
    )
    out.add_argument(
        "--alpha", type=float, default=0.2, help="weight of the recovery mean (default 0.2)"
    )
    out.add_argument("--ref-model", help="model to be constrained to (default: --model itself)")
    out.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights"
    )
    out.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    out.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --output"
    )
    for f in fields(BetaSchedule):
        kind = int if f.name == "prefix_length" else float
        out.add_argument(
            f"--beta-{_dashed(f.name)}", type=kind, default=f.default, help=f"default {f.default}"
        )
    out.add_argument(
        "--adam-betas", type=float, nargs=2, default=(0.5, 0.999), metavar=("B1", "B2")
    )
    for f in fields(TrainConfig):
        if f.name not in BY_HAND:
            _add(out, f)
    return out


def _add(out: argparse.ArgumentParser, f: Field[Any]) -> None:
    assert f.default is not MISSING
    name, text = f"--{_dashed(f.name)}", f"default {f.default}"
    if isinstance(f.default, bool):
        out.add_argument(name, action=argparse.BooleanOptionalAction, default=f.default, help=text)
    elif f.name in ALLOWED:
        out.add_argument(name, choices=ALLOWED[f.name], default=f.default, help=text)
    else:
        kind = float if "float" in str(f.type) else int
        out.add_argument(name, type=kind, default=f.default, help=text)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def build(options: argparse.Namespace) -> TrainingRun:
    """The run that the options describe."""
    named = vars(options)
    beta = BetaSchedule(**{f.name: named[f"beta_{f.name}"] for f in fields(BetaSchedule)})
    rest = {f.name: named[f.name] for f in fields(TrainConfig) if f.name not in BY_HAND}
    config = TrainConfig(options.output, beta=beta, adam_betas=tuple(options.adam_betas), **rest)

    data: Any = load_chat_data(options.data)  # wrong data are found before a large model is loaded

    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(path: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, options.dtype))
        return model.to(options.device)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if options.recovery:
        data = RecoveryAugmentation(
            options.recovery,
            tokenizer,
            anchors=data,
            alpha=options.alpha,
            seed=config.seed,
            position_origin=config.position_origin,
        )
    reference = load(options.ref_model) if options.ref_model else None
    return TrainingRun(load(options.model), tokenizer, config, data, ref_model=reference)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        run = build(options)
        result = run.train(resume=options.resume)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; --resume goes on from {options.output}", file=sys.stderr)
        return 130
    folder = Path(options.output) / "model"
    saved: tuple[Any, ...] = (run.model, run.tokenizer)
    for part in saved:
        part.save_pretrained(folder)
    nll = f"nll {result.metrics['nll']:.4g}"
    print(f"{result.steps} steps, {nll}; model in {folder}, log in {result.log_path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
