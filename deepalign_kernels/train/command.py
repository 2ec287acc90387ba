"""`deepalign train`: fine-tunes a causal language model and writes it, with its tokenizer.

The options are the fields of `TrainConfig`, of its beta schedule, of `Lora` and of
`RecoveryAugmentation`, with the texts that those have: nothing is said twice.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch

from deepalign_kernels.data import RecoveryAugmentation
from deepalign_kernels.data.columns import PART_WEIGHTINGS
from deepalign_kernels.data.examples import BAD_RECORDS, ORIGINS, TOO_LONG, TRAIN_ON
from deepalign_kernels.data.reading import rows_of
from deepalign_kernels.data.records import UNKNOWN_KEYS, check_record
from deepalign_kernels.data.recovery import GLUES
from deepalign_kernels.data.template import ChatTemplate, tokenizer_of
from deepalign_kernels.losses import BetaSchedule
from deepalign_kernels.rules import RULES
from deepalign_kernels.train import config as choices
from deepalign_kernels.train.checkpoint import checkpoints
from deepalign_kernels.train.config import TrainConfig
from deepalign_kernels.train.load import config_of, load_model, outline_of
from deepalign_kernels.train.loop import TrainingRun
from deepalign_kernels.train.lora import Lora
from deepalign_kernels.train.optimizers import OPTIMIZERS, make_optimizer
from deepalign_kernels.train.ranks import PARALLEL, SHARDED, ProcessLost, way_of
from deepalign_kernels.train.session import Terminated, prompt_stops

# The augmentation makes a model differ from what it was, so nothing holds it there, and the paper
# trains it with Adam's usual betas and no warm-up.
WITH_RECOVERY: dict[str, Any] = {
    "objective": "sft",
    "adam_betas": (0.9, 0.999),
    "warmup_steps": 0,
}
GIVEN_ELSEWHERE = ("output_dir", "beta", "recovery", "tokenizer", "anchors", "seed")
ALLOWED = {
    "objective": (*choices.OBJECTIVES, *RULES),
    "reference": choices.REFERENCES,
    "reference_dtype": choices.CACHED_DTYPES,
    "head": choices.HEADS,
    "kl_direction": choices.KL_DIRECTIONS,
    "optimizer": tuple(OPTIMIZERS),
    "parallel": PARALLEL,
    "best_by": choices.BEST_BY,
    "lr_schedule": choices.SCHEDULES,
    "position_origin": ORIGINS,
    "on_too_long": TOO_LONG,
    "train_on": TRAIN_ON,
    "unknown_keys": UNKNOWN_KEYS,
    "on_bad_record": BAD_RECORDS,
    "weighting": PART_WEIGHTINGS,
    "glue": GLUES,
    "autocast_dtype": ("bfloat16",),
    "dtype": ("float32", "bfloat16"),
    "resume": ("no", "yes", "auto"),
}
SEVERAL = ("beta_table", "lora_target_modules")  # values of one option


@dataclass(frozen=True)
class Option:
    """One option, for any parser."""

    name: str
    kind: type  # of one value
    default: Any  # MISSING: must be given
    text: str

    @property
    def allowed(self) -> tuple[str, ...]:
        return ALLOWED.get(self.name, ())

    @property
    def annotation(self) -> Any:
        one: Any = Literal[self.allowed] if self.allowed else self.kind
        if self.name == "adam_betas":
            one = tuple[float, float]
        if self.name in SEVERAL:
            one = tuple[self.kind, ...]  # type: ignore[name-defined]
        return one | None if self.default is None else one


def options_of() -> list[Option]:
    """All: of the command itself, `TrainConfig`, the schedule, LoRA and the augmentation."""
    local = os.environ.get("LOCAL_RANK", "0")  # under a launcher: this process's device
    device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    out = [
        Option("model", str, MISSING, "folder or hub name of a causal LM with its tokenizer"),
        Option("data", str, MISSING, "conversations: JSONL or Parquet, folder, name of a data set"),
        Option("output", str, MISSING, "folder for log, checkpoints and the trained model"),
        Option("eval_data", str, None, "held-out data, as data; the best state goes to best.pt"),
        Option("chat_template", str, None, "file of another chat template; saved with the model"),
        Option("recovery", str, None, "JSONL of prompt, answer, refusal; data are then anchors"),
        Option("ref_model", str, None, "model to be constrained to; None: the model itself"),
        Option("dtype", str, "float32", "of the weights; bfloat16 needs an optimizer for it"),
        Option("device", str, device, "where the model is trained"),
        Option("resume", str, "no", "yes: go on from the newest checkpoint; auto: if there is one"),
        Option("dry_run", bool, False, "only tell tokens, steps, memory, the first example"),
    ]
    told = described(BetaSchedule.__doc__)
    for f in fields(BetaSchedule):
        kind = int if f.name == "prefix_length" else float
        usual = f" Default {f.default}." * (f.default is not None)
        out.append(Option(f"beta_{f.name}", kind, None, told[f.name] + usual))
    told = described(TrainConfig.__doc__)
    for f in fields(TrainConfig):
        if f.name not in GIVEN_ELSEWHERE or f.name == "seed":
            kind = next((k for k in (bool, float, int) if k.__name__ in str(f.type)), str)
            default, text = f.default, told[f.name]
            if f.name in WITH_RECOVERY:
                text += f" Default {default}, with recovery {WITH_RECOVERY[f.name]}."
                default = None
            out.append(Option(f.name, kind, default, text))
    told = described(Lora.__doc__)
    kinds = {"rank": int, "target_modules": str, "merge": bool}
    for f in fields(Lora):
        text = f"LoRA: {told[f.name]}"
        out.append(Option(f"lora_{f.name}", kinds.get(f.name, float), f.default, text))
    taken, told = {option.name for option in out}, described(RecoveryAugmentation.__doc__)
    for p in signature(RecoveryAugmentation).parameters.values():
        if p.name not in taken and p.name not in GIVEN_ELSEWHERE:
            kind = type(p.default) if p.default is not None else str
            out.append(Option(p.name, kind, p.default, f"Of recovery: {told.get(p.name, '')}"))
    return out


def described(docstring: str | None) -> dict[str, str]:
    """{argument: what the section Args of a docstring says of it}."""
    doc = inspect.cleandoc(docstring or "")  # Python 3.13 has done that, those before have not
    body = re.split(r"\n\s*(?:Raises|Returns|Attributes):\n", doc.split("Args:\n")[1])
    found = re.findall(r"^ {4}(\w+): (.+(?:\n {5,}.+)*)", body[0], re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _class() -> Any:
    every = options_of()
    doc = "Fine-tune a causal language model with the constrained loss (arXiv 2406.05946).\n\n"
    doc += "Attributes:\n" + "\n".join(f"    {o.name}: {o.text}" for o in every)
    made = [
        (o.name, o.annotation, field(**({} if o.default is MISSING else {"default": o.default})))
        for o in every
    ]
    return make_dataclass("Options", made, kw_only=True, namespace={"__doc__": doc})


Options: Any = _class()


def settle(options: Any) -> str | None:
    """Put in what depends on recovery; what to tell about it."""
    usual, named = {f.name: f.default for f in fields(TrainConfig)}, vars(options)
    chosen = [name for name in WITH_RECOVERY if named[name] is None]
    for name in chosen:
        named[name] = (WITH_RECOVERY if options.recovery else usual)[name]
    if not options.recovery or not chosen:
        return None
    told = ", ".join(f"{name} {named[name]}" for name in chosen)
    return f"--recovery: as in the paper, {told}; give these options for another choice"


def build(options: Any, refuse: Callable[[TrainConfig], None] = lambda config: None) -> TrainingRun:
    """The run that the options describe; with `dry_run` of a model without weights.

    Args:
        options: an instance of `Options`.
        refuse: what else may be wrong with the configuration, for the caller to say.

    Raises:
        ValueError: whatever is wrong with them; before a model is loaded, if that is possible.
    """
    if (note := settle(options)) and main_process():
        print(note, file=sys.stderr)
    named, dry, dtype = vars(options), options.dry_run, getattr(torch, options.dtype)
    beta = schedule_of(options)
    rest = {f.name: named[f.name] for f in fields(TrainConfig) if f.name in named}
    rest["adam_betas"] = tuple(options.adam_betas)
    if dry:
        rest["data_cache"] = None  # nothing is written
    config = TrainConfig(options.output, beta=beta, **rest)
    refuse(config)
    lora = lora_of(options)
    _check_paths(options, config)
    _check_lora(options, config, lora)
    way, _ = way_of(config.parallel, config.cpu_offload, config.autocast_dtype is not None)

    def load(name: str) -> Any:
        own = lora if name == "model" else Lora()
        if dry:
            return own.adapt(outline_of(named[name], dtype, name), config.seed)
        # What is sharded goes to its device layer by layer.
        model = own.adapt(load_model(named[name], dtype), config.seed)
        return model.to("cpu" if way in SHARDED else options.device)

    tokenizer = tokenizer_of(options.model, options.chat_template)
    ChatTemplate(tokenizer)  # refuses what it cannot train with, before a large model is loaded
    data: Any = options.data
    if options.recovery:
        given = signature(RecoveryAugmentation).parameters
        about = {name: named[name] for name in given if name in named}
        about |= {"recovery": options.recovery, "tokenizer": tokenizer, "anchors": data}
        data = RecoveryAugmentation(**about)
    reference = load("ref_model") if options.ref_model else None
    return TrainingRun(
        load("model"), tokenizer, config, data, reference, eval_data=options.eval_data
    )


def schedule_of(options: Any) -> BetaSchedule:
    """Beta by position, as the options say.

    Raises:
        ValueError: they are wrong, or say it in two ways.
    """
    given = {f.name: getattr(options, f"beta_{f.name}") for f in fields(BetaSchedule)}
    given = {name: value for name, value in given.items() if value is not None}
    if "table" in given and len(given) > 1:
        other = ", ".join(f"beta_{name}" for name in given if name != "table")
        raise ValueError(f"beta_table: it says beta of every token; leave out {other}")
    return BetaSchedule(**given)


def lora_of(options: Any) -> Lora:
    """As the options say.

    Raises:
        ValueError: they are wrong, or of no use without a rank.
    """
    return Lora(**{f.name: getattr(options, f"lora_{f.name}") for f in fields(Lora)})


def _check_lora(options: Any, config: TrainConfig, lora: Lora) -> None:
    """Raises ValueError: what does not go with adapters, or only with them."""
    if config.reference == "adapter_off" and config.needs_reference and lora.rank is None:
        raise ValueError(
            "reference: 'adapter_off' is a model without its adapters; give lora_rank, or"
            " 'precomputed'"
        )
    if lora.merge and way_of(config.parallel, config.cpu_offload, False)[0] in SHARDED:
        raise ValueError(
            f"lora_merge: not with parallel={config.parallel!r}, which shares the weights out;"
            " write the adapters alone, and merge them in one process (peft's merge_and_unload)"
        )
    if lora.rank is not None:
        lora.adapt(outline_of(options.model, getattr(torch, options.dtype)))


def _check_paths(options: Any, config: TrainConfig) -> None:
    """Raises ValueError: a device, data, models or packages that are not there, told before a large
    model is loaded."""
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA has the latter
        why = str(error).splitlines()[0]
        raise ValueError(f"device: {options.device!r} cannot be used here: {why}") from error
    if config.early_stop is not None and options.eval_data is None:
        raise ValueError("early_stop: it counts evaluations on eval_data, and there are none")
    for name in ("data", "eval_data"):
        if (value := getattr(options, name)) is not None:
            for row, where in rows_of(value, name, keep_broken=True):
                if config.on_bad_record == "skip":
                    break
                check_record(row, where, config.unknown_keys)
    for name in ("model", "ref_model"):
        if (value := getattr(options, name)) is not None:
            config_of(value, name)
    make_optimizer(
        config.optimizer,
        [torch.nn.Parameter(torch.zeros(1, 1, device="meta"))],
        learning_rate=config.learning_rate,
        betas=config.adam_betas,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )


def run(options: Any) -> int:
    """Train; the exit status: 2 for a mistake, 1 for another process that ended, 130 and 143 for
    Ctrl-C and SIGTERM."""

    def saved() -> str:
        found = checkpoints(Path(options.output))
        if found:
            return f"--resume yes goes on from {found[-1]}"
        kept = Path(options.reference_cache or options.output)
        if any(kept.glob(".reference-*.part/done-*")) or any(kept.glob("reference-*")):
            return (
                f"before the first step; what is computed of the reference is kept in {kept}, and"
                " the same command goes on there"
            )
        return "nothing was saved yet"

    return ended(lambda: _train(options), saved)


def ended(act: Callable[[], str], saved: Callable[[], str]) -> int:
    """The exit status of a command that may run in several processes.

    Args:
        act: what it does; returns what to say at the end.
        saved: asked after Ctrl-C or SIGTERM, what is there and how to go on.
    """
    said, status, to, tells = "", 0, sys.stderr, main_process()
    try:
        with prompt_stops():
            said, to = act(), sys.stdout
    except (ValueError, OSError, FloatingPointError) as error:
        said, status = f"error: {error}", 2
    except ProcessLost as error:
        said, status, tells = f"error: {error}", 1, True
    except KeyboardInterrupt as stop:
        said, status = f"stopped; {saved()}", 143 if isinstance(stop, Terminated) else 130
    finally:
        dist = torch.distributed
        if dist.is_available() and dist.is_initialized() and "LOCAL_RANK" in os.environ:
            dist.destroy_process_group()
    if tells:
        print(said, file=to)
    return status


def main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _train(options: Any) -> str:
    folder, which = Path(options.output) / "model", "model"
    if folder.exists() and options.resume == "no":
        raise ValueError(f"output: {folder} is there already; choose another folder or remove it")
    run = build(options)
    if options.dry_run:
        from deepalign_kernels.train import dry_run  # which asks plan, which asks this room

        lora = lora_of(options)
        adapt = None if lora.rank is None else lora.adapt
        return dry_run.as_text(run, dry_run.facts(run, options.dtype, adapt))
    result = run.train(resume={"no": False, "yes": True, "auto": "auto"}[options.resume])
    if options.early_stop is not None:
        which = f"model of step {run.load_best()['step']}, the best,"
    if options.lora_merge:
        merged: Any = run.model
        run.model = merged.merge_and_unload()
    run.save_model(folder)
    nll = f"nll {result.metrics['nll']:.4g}"
    return f"{result.steps} steps, {nll}; {which} in {folder}, log in {result.log_path}"
