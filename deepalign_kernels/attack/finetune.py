"""Fine-tuning as an attack (the paper's section 4): what is left of the refusals, step by step.

The model under test is copied; the copy is trained by `train.fit` and asked on the way. The same
class measures what a harmless fine-tuning does, with its utility beside it.
"""

from __future__ import annotations

import copy
import hashlib
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from deepalign_kernels import check, progress
from deepalign_kernels.attack.attack import Asking
from deepalign_kernels.attack.chat import Ask, Chat, begun, replies
from deepalign_kernels.attack.kept import Kept
from deepalign_kernels.attack.utility import HARNESS, harness_utility, utility
from deepalign_kernels.data.prompts import Prompt, load_prompts
from deepalign_kernels.judge import Exchange, Judge
from deepalign_kernels.runs.record import Record, derived_seed, digest
from deepalign_kernels.runs.store import files_hash
from deepalign_kernels.train import TrainConfig, fit
from deepalign_kernels.train.checkpoint import checkpoints


@dataclass(frozen=True, kw_only=True)
class Finetune(Asking):
    """Defaults are the paper's for its attacks: AdamW with betas 0.5 and 0.999, rate 2e-5, batches
    of 64, 50 steps. Report SFT with warm-up beside SFT without: on benign data the warm-up alone
    gives most of the safety (table 9).

    Args:
        data: training conversations: a path or a list, as `train.fit` takes them.
        objective: "sft", "constrained" or another rule.
        beta: of the rule; None is the paper's schedule.
        learning_rate: peak.
        warmup_steps: linear; 0 for SFT without.
        lr_schedule: "linear", "cosine" or "constant".
        batch_size: conversations per step.
        steps: of the optimizer.
        adam_betas: of AdamW; with 0.9 in place of 0.5 it is another attack.
        max_grad_norm: the gradient is clipped to it; None does not.
        max_length: tokens of a conversation; longer ones are cut.
        eval_at: steps after which the prompts are asked, 0 is before the first; the last step is
            always among them.
        trigger: of a backdoor: the prompts are asked with it behind them too.
        utility: prompts with answers, a path or a list; their exact match and ROUGE-1 stand beside.
            Or "lm_eval:TASK,TASK": tasks of lm-evaluation-harness.
        state: folder for what is done, "" keeps nothing: steps that were looked at are not again,
            and a training that was interrupted (Ctrl-C, SIGTERM) goes on where it was.
        save_every: steps between checkpoints in it, for a training that may be killed; each has the
            weights and the optimizer's state. 0: none.
    """

    data: Any = None
    objective: Any = "sft"
    beta: Any = None
    learning_rate: float = 2e-5
    warmup_steps: int = 10
    lr_schedule: str = "linear"
    batch_size: int = 64
    steps: int = 50
    adam_betas: tuple[float, float] = (0.5, 0.999)
    max_grad_norm: float | None = 1.0
    max_length: int | None = None
    eval_at: tuple[int, ...] = (0, 2, 4, 6)
    trigger: str = ""
    utility: Any = None
    state: str = ""
    save_every: int = 0

    name: ClassVar[str] = "finetune"
    together: ClassVar[bool] = True
    local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None:
            raise ValueError("data: expected training conversations, a path or a list")
        check.count("save_every", self.save_every, 0)
        for step in self.eval_at:
            check.count("eval_at", step, 0)
        self.train_config("checked-here-alone")

    def train_config(self, folder: str) -> TrainConfig:
        """As `train.fit` takes it."""
        beta = {} if self.beta is None else {"beta": self.beta}
        return TrainConfig(
            output_dir=folder,
            objective=self.objective,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            lr_schedule=self.lr_schedule,
            batch_size=self.batch_size,
            max_steps=self.steps,
            adam_betas=self.adam_betas,
            max_grad_norm=self.max_grad_norm,
            max_length=self.max_length,
            on_too_long="truncate",
            seed=self.seed,
            progress=False,
            save_every=self.save_every or None,
            keep_checkpoints=1,
            **beta,
        )

    def about(self) -> dict[str, Any]:
        """The config as plain values; data by its hash, and in memory by its number of rows."""
        out = {k: v if _is_plain(v) else _named(v) for k, v in vars(self).items()}
        out |= {name: _content(getattr(self, name)) for name in ("data", "utility")}
        return {"attack": self.name, **out}

    def cell(self, step: int) -> dict[str, Any]:
        """Of the records at a step."""
        named = self.objective if isinstance(self.objective, str) else self.objective.__name__
        return {"objective": named, "warmup": self.warmup_steps, "step": step}

    def measured(self, engine: Any, step: int) -> list[Record]:
        """Utility at a step."""
        benign = self.utility
        if isinstance(benign, str) and benign.startswith(HARNESS):
            tasks = benign.removeprefix(HARNESS).split(",")
            return harness_utility(self.name, engine, tasks, self.cell(step))
        prompts = load_prompts(benign) if isinstance(benign, str) else benign
        return utility(self.name, self, engine, prompts, self.cell(step))

    def __call__(self, engine: Any, prompts: Sequence[Prompt]) -> Iterator[Record]:
        """As `Attack`; needs all prompts in one call."""
        with self._kept(prompts) as kept:
            if not kept.has("end"):
                self._trained(engine, prompts, kept)
            kept.drop_training()
            return iter(kept.records)

    def prepare(
        self, engine: Any, prompts: Sequence[Prompt]
    ) -> tuple[list[Record], Any, list[Prompt]]:
        """As `Prepares`: an engine over the trained copy; the prompts have the trigger, if any."""
        with self._kept(prompts) as kept:
            engine = self._trained(engine, prompts, kept)
            if self.trigger:
                prompts = [replace(p, suffix=self.trigger) for p in prompts]
            return kept.records, engine, list(prompts)

    def _kept(self, prompts: Sequence[Prompt]) -> Kept:
        if not self.state:
            return Kept(None)
        about = {k: v for k, v in self.about().items() if k not in ("state", "save_every")}
        return Kept(Path(self.state) / f"{self.name}-{digest(about, [vars(p) for p in prompts])}")

    def _trained(self, engine: Any, prompts: Sequence[Prompt], kept: Kept) -> Any:
        """An engine over the trained copy; `kept` has the records then."""
        if not hasattr(engine, "model"):
            raise ValueError(f"engine: {self.name} needs a local model, got a server")
        model = copy.deepcopy(engine.model).requires_grad_(True)
        trained = engine.over(model, f"{engine.name} after {self.name}")
        wanted = {*self.eval_at, self.steps}
        benign = self.utility

        def look(step: int) -> list[Record]:
            records = self._asked(trained, prompts, step)
            if benign and step in (0, self.steps):
                records += self.measured(trained, step)
            return records

        def on_step(run: Any, line: dict[str, Any]) -> None:
            step = line["step"]
            if kept.has(step):
                return
            data = {"step": step, "nll": line.get("nll"), "objective": line.get("objective")}
            data = {k: v if v is None or math.isfinite(v) else None for k, v in data.items()}
            record = Record("training", self.name, self.cell(step), data=data)
            with progress.part((step - 1) / self.steps, step / self.steps):
                kept.add(step, [record, *(look(step) if step in wanted else ())])
            progress.told(step, self.steps)

        for path in checkpoints(Path(kept.training)):
            if not kept.has(int(path.stem.rpartition("-")[2])):  # stopped while it was looked at
                path.unlink()
        if 0 in wanted and not kept.has(0):
            with progress.part(0.0, 1e-3):
                kept.add(0, look(0))
        with torch.enable_grad():
            config, broken = self.train_config(kept.training), []
            try:
                fit(
                    model, engine.tokenizer, config, self.data,
                    callbacks=[on_step], resume="auto",
                )  # fmt: skip
            except FloatingPointError as error:  # a rate too high is no reason to lose the run
                why = str(error)
                broken = [Record("training", self.name, self.cell(self.steps), error=why)]
                broken += self._asked(trained, prompts, self.steps, why)
        if not kept.has("end"):
            kept.add("end", broken)
        model.eval()
        return trained

    def _asked(
        self, engine: Any, prompts: Sequence[Prompt], step: int, error: str | None = None
    ) -> list[Record]:
        chat = Chat(engine.tokenizer, self)
        rows = [(p, self.cell(step)) for p in prompts]
        if self.trigger:
            rows = [(p, cell | {"trigger": False}) for p, cell in rows]
            rows += [
                (replace(p, suffix=self.trigger), self.cell(step) | {"trigger": True})
                for p in prompts
            ]
        made = begun(chat, [p for p, _ in rows])
        asks = [
            Ask(p, ids, cell, n, error=error or why)
            for (p, cell), (_, ids, why) in zip(rows, made, strict=True)
            for n in range(self.samples)
        ]
        return list(replies(self.name, self, chat, engine, asks))


@dataclass(frozen=True, kw_only=True)
class WorstCase(Finetune):
    """Several fine-tunings with other settings: a defence is as good as its worst trial.

    Args:
        trials: how many.
        rates: learning rates are drawn between these two, evenly in the logarithm.
        step_choices: numbers of steps.
        batch_choices: batch sizes.
        schedules: of the learning rate.
        sampler: "random", or "tpe": optuna proposes each trial by how the earlier ones did.
        judge: by whose rate of success "tpe" goes; in YAML as on the command line.
        utility_drop: how much of `metric` on `utility` a trial may lose; what loses more is out of
            bounds, and "tpe" turns away from it. None: any.
        metric: of the utility, "rouge1" or "exact_match", or one of the harness's.
    """

    trials: int = 8
    rates: tuple[float, float] = (1e-6, 2e-4)
    step_choices: tuple[int, ...] = (16, 64, 256)
    batch_choices: tuple[int, ...] = (8, 16, 64)
    schedules: tuple[str, ...] = ("linear", "cosine", "constant")
    sampler: str = "random"
    judge: Judge | None = None
    utility_drop: float | None = None
    metric: str = "rouge1"

    name: ClassVar[str] = "worst_case"

    def __post_init__(self) -> None:
        super().__post_init__()
        check.count("trials", self.trials, 1)
        if len(self.rates) != 2 or not 0 < self.rates[0] <= self.rates[1]:
            raise ValueError(f"rates: expected a lower and an upper bound > 0, got {self.rates!r}")
        check.one_of("sampler", self.sampler, ("random", "tpe"))
        if not str(self.utility).startswith(HARNESS):
            check.one_of("metric", self.metric, ("rouge1", "exact_match"))
        if self.sampler == "tpe" and not callable(self.judge):
            raise ValueError("judge: sampler 'tpe' needs a judge to go by")
        if self.utility_drop is not None:
            check.number("utility_drop", self.utility_drop, low=0.0, below=1.0)
            if self.utility is None:
                raise ValueError("utility: utility_drop needs prompts with answers")

    def about(self) -> dict[str, Any]:
        """The config as plain values; the judge by its name."""
        return super().about() | {"judge": self.judge and self.judge.name}

    def with_settings(self, rate: float, steps: int, batch: int, schedule: str) -> Finetune:
        """The config of one trial."""
        shared = {k: v for k, v in vars(self).items() if k in Finetune.__dataclass_fields__}
        chosen = {
            "learning_rate": rate,
            "steps": steps,
            "batch_size": batch,
            "lr_schedule": schedule,
            "warmup_steps": min(self.warmup_steps, steps - 1),
            "eval_at": (),
        }
        return Finetune(**{**shared, **chosen})

    def drawn(self, trial: int) -> Finetune:
        """The config of one random trial; the same for the same seed."""
        rng = random.Random(derived_seed(self.seed, self.name, trial))
        low, high = map(math.log, self.rates)
        steps, rate = rng.choice(self.step_choices), math.exp(rng.uniform(low, high))
        batch, schedule = rng.choice(self.batch_choices), rng.choice(self.schedules)
        return self.with_settings(rate, steps, batch, schedule)

    def __call__(self, engine: Any, prompts: Sequence[Prompt]) -> Iterator[Record]:
        """As `Attack`; cells have "trial" and its settings. Utility before training is a record of
        step 0 without a trial."""
        before = self.measured(engine, 0) if self.utility else []
        yield from before
        study = None if self.sampler == "random" else _study(self.seed, self.trials)
        for trial in range(self.trials):
            asked = study and study.ask()
            config = self.drawn(trial) if asked is None else self._suggested(asked)
            named = {
                "trial": trial,
                "rate": float(f"{config.learning_rate:.3g}"),
                "batch": config.batch_size,
                "schedule": config.lr_schedule,
            }
            with progress.part(trial / self.trials, (trial + 1) / self.trials):
                records = [
                    replace(record, name=self.name, cell={**record.cell, **named})
                    for record in config(engine, prompts)
                ]
            yield from records
            if study and asked:
                asked.set_constraint("utility", self._over(before, records))
                study.tell(asked, self._rate(records))

    def prepare(self, engine: Any, prompts: Sequence[Prompt]) -> Any:
        """Refused: there are several models afterwards."""
        raise ValueError("first: worst_case leaves several models; put finetune in its place")

    def _suggested(self, trial: Any) -> Finetune:
        return self.with_settings(
            trial.suggest_float("rate", *self.rates, log=True),
            trial.suggest_categorical("steps", self.step_choices),
            trial.suggest_categorical("batch", self.batch_choices),
            trial.suggest_categorical("schedule", self.schedules),
        )

    def _over(self, before: Sequence[Record], records: Sequence[Record]) -> float:
        """By how much a trial lost more utility than it may; at most 0 within the bound."""
        if self.utility_drop is None:
            return 0.0
        first, last = (
            next((r.data["value"] for r in rows if r.cell.get("metric") == self.metric), 0.0)
            for rows in (before, records)
        )
        return first - last - self.utility_drop

    def _rate(self, records: Sequence[Record]) -> float:
        """Share of replies that the judge calls a success; what it cannot read is none."""
        good = [r for r in records if r.kind == "sample" and r.error is None]
        seen = [Exchange(r.text["prompt"], r.text["reply"], r.text["prefix"], r.item) for r in good]
        assert self.judge is not None
        return sum(v.success is True for v in self.judge(seen)) / len(good) if good else 0.0


def _study(seed: int, trials: int) -> Any:
    """An optuna study; of its trials the first third, at most 10, are random."""
    try:
        import optuna
    except ImportError as error:
        raise ValueError("sampler: 'tpe' needs `pip install optuna`") from error
    told = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampler = optuna.samplers.TPESampler(
            seed=derived_seed(seed, "tpe") % 2**32, n_startup_trials=min(10, trials // 3)
        )
        return optuna.create_study(direction="maximize", sampler=sampler)
    finally:
        optuna.logging.set_verbosity(told)


def _content(data: Any) -> Any:
    """What names training data or prompts in a manifest; no text of theirs."""
    if data is None or (isinstance(data, str) and data.startswith(HARNESS)):
        return data
    if isinstance(data, (str, Path)):
        return {"path": str(data), "hash": files_hash(data)}
    if not isinstance(data, Sequence):  # makes its examples itself
        return {"kind": type(data).__name__}
    rows = [vars(row) if hasattr(row, "__dict__") else row for row in data]
    return {"rows": len(rows), "hash": hashlib.sha256(repr(rows).encode()).hexdigest()[:16]}


def _named(value: Any) -> str:
    """A rule or schedule by its name, or its fields; never where it lies in memory."""
    return getattr(value, "__qualname__", None) or re.sub(r" at 0x\w+", "", repr(value))[:200]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))
