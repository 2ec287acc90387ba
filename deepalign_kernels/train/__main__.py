"""`python -m deepalign_kernels.train --model PATH --data FILE.jsonl --output DIR ...`

Fine-tunes a causal LM and writes it, with its tokenizer, to DIR/model. Every field of
`TrainConfig` is an option.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch

from deepalign_kernels.data import RecoveryAugmentation, load_chat_data
from deepalign_kernels.data.examples import ORIGINS, TOO_LONG
from deepalign_kernels.losses import BetaSchedule
from deepalign_kernels.rules import RULES
from deepalign_kernels.train import config as choices
from deepalign_kernels.train.checkpoint import checkpoints
from deepalign_kernels.train.config import TrainConfig
from deepalign_kernels.train.loop import TrainingRun
from deepalign_kernels.train.optimizers import OPTIMIZERS
from deepalign_kernels.train.ranks import PARALLEL, ProcessLost
from deepalign_kernels.train.session import Terminated

BY_HAND = ("output_dir", "beta", "adam_betas")
# The augmentation makes a model differ from what it was, so nothing holds it there, and the paper
# trains it with Adam's usual betas and no warm-up.
WITH_RECOVERY: dict[str, Any] = {
    "objective": "sft",
    "adam_betas": (0.9, 0.999),
    "warmup_steps": 0,
}
GIVEN_ELSEWHERE = ("recovery", "tokenizer", "anchors", "seed", "position_origin")
ALLOWED = {
    "objective": (*choices.OBJECTIVES, *RULES),
    "reference": choices.REFERENCES,
    "head": choices.HEADS,
    "kl_direction": choices.KL_DIRECTIONS,
    "parallel": PARALLEL,
    "best_by": choices.BEST_BY,
    "optimizer": tuple(OPTIMIZERS),
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
    out.add_argument("--eval-data", help="held-out data, as --data; the best state goes to best.pt")
    out.add_argument(
        "--output", required=True, help="folder for log, checkpoints and the trained model"
    )
    out.add_argument(
        "--recovery", help="JSONL of prompt, answer, refusal: augmentation, --data as anchors"
    )
    out.add_argument("--ref-model", help="model to be constrained to (default: --model itself)")
    out.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights"
    )
    local = os.environ.get("LOCAL_RANK", "0")  # under a launcher: this process's device
    out.add_argument("--device", default=f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    out.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        choices=("auto",),
        help="go on from the newest checkpoint in --output; auto: if there is one, else begin",
    )
    for p in _recovery_parameters():
        out.add_argument(
            f"--{_dashed(p.name)}",
            type=type(p.default),
            default=p.default,
            help=f"of --recovery (default {p.default!r})",
        )
    for f in fields(BetaSchedule):
        kind = int if f.name == "prefix_length" else float
        out.add_argument(
            f"--beta-{_dashed(f.name)}", type=kind, default=f.default, help=f"default {f.default}"
        )
    out.add_argument(
        "--adam-betas", type=float, nargs=2, metavar=("B1", "B2"), help=_usual("adam_betas")
    )
    for f in fields(TrainConfig):
        if f.name not in BY_HAND:
            _add(out, f)
    return out


def _recovery_parameters() -> list[Parameter]:
    """Those of `RecoveryAugmentation` that are not said by another option."""
    every = signature(RecoveryAugmentation).parameters.values()
    return [p for p in every if p.name not in GIVEN_ELSEWHERE]


def _add(out: argparse.ArgumentParser, f: Field[Any]) -> None:
    assert f.default is not MISSING
    name, default, text = f"--{_dashed(f.name)}", f.default, f"default {f.default}"
    if f.name in WITH_RECOVERY:
        default, text = None, _usual(f.name)
    if isinstance(default, bool):
        out.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=text)
    elif f.name in ALLOWED:
        out.add_argument(name, choices=ALLOWED[f.name], default=default, help=text)
    else:
        kind = next((k for k in (float, int) if k.__name__ in str(f.type)), str)
        out.add_argument(name, type=kind, default=default, help=text)


def _usual(name: str) -> str:
    default = next(f.default for f in fields(TrainConfig) if f.name == name)
    return f"default {default}, with --recovery {WITH_RECOVERY[name]}"


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def settle(options: argparse.Namespace) -> str | None:
    """Put in what depends on --recovery; what to tell about it."""
    usual = {f.name: f.default for f in fields(TrainConfig)}
    named = vars(options)
    chosen = [name for name in WITH_RECOVERY if named[name] is None]
    for name in chosen:
        named[name] = (WITH_RECOVERY if options.recovery else usual)[name]
    if not options.recovery or not chosen:
        return None
    told = ", ".join(f"{name} {named[name]}" for name in chosen)
    return f"--recovery: as in the paper, {told}; give these options for another choice"


def build(options: argparse.Namespace) -> TrainingRun:
    """The run that the options describe."""
    if (note := settle(options)) and os.environ.get("RANK", "0") == "0":
        print(note, file=sys.stderr)
    named = vars(options)
    beta = BetaSchedule(**{f.name: named[f"beta_{f.name}"] for f in fields(BetaSchedule)})
    rest = {f.name: named[f.name] for f in fields(TrainConfig) if f.name not in BY_HAND}
    config = TrainConfig(options.output, beta=beta, adam_betas=tuple(options.adam_betas), **rest)
    result = Path(options.output) / "model"
    if result.exists() and not options.resume:
        raise ValueError(f"output: {result} is there already; choose another folder or remove it")

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
            seed=config.seed,
            position_origin=config.position_origin,
            **{p.name: named[p.name] for p in _recovery_parameters()},
        )
    reference = load(options.ref_model) if options.ref_model else None
    return TrainingRun(
        load(options.model), tokenizer, config, data, reference, eval_data=options.eval_data
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return _run(options)
    finally:
        dist = torch.distributed
        if dist.is_available() and dist.is_initialized() and "LOCAL_RANK" in os.environ:
            dist.destroy_process_group()


def _run(options: argparse.Namespace) -> int:
    main_process = os.environ.get("RANK", "0") == "0"
    try:
        run = build(options)
        result = run.train(resume=options.resume)
        folder = Path(options.output) / "model"
        run.save_model(folder)
    except (ValueError, OSError, FloatingPointError) as error:
        if main_process:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except ProcessLost as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        saved = checkpoints(Path(options.output))
        then = f"--resume goes on from {saved[-1]}" if saved else "nothing was saved yet"
        if main_process:
            print(f"stopped; {then}", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    if main_process:
        nll = f"nll {result.metrics['nll']:.4g}"
        print(f"{result.steps} steps, {nll}; model in {folder}, log in {result.log_path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
