"""Constrained fine-tuning of a causal language model, as one loop to be read from top to bottom."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepalign_kernels.data.columns import Batch
from deepalign_kernels.data.packing import micro_batches, steps_per_epoch
from deepalign_kernels.data.source import Source
from deepalign_kernels.fingerprint import model_hash
from deepalign_kernels.modes import evaluating, kept_modes
from deepalign_kernels.train import checkpoint as ckpt
from deepalign_kernels.train import folder as folders
from deepalign_kernels.train.config import TrainConfig
from deepalign_kernels.train.identity import differences, frozen_hash, identity
from deepalign_kernels.train.log import Meter, Progress, RunLog, Speed
from deepalign_kernels.train.objective import BatchObjective
from deepalign_kernels.train.reference import (
    ReferenceCache,
    frozen_copy,
    reference_logp,
)
from deepalign_kernels.train.session import (
    check_models,
    deferred_stops,
    embeddings_of,
    positions_of,
    training_session,
)

Callback = Callable[["TrainingRun", dict[str, Any]], None]


@dataclass(frozen=True)
class TrainResult:
    """What a run returns."""

    steps: int  # optimizer steps done, those before a resume included
    metrics: dict[str, Any]  # the last line of the log that is about a step
    log_path: Path  # JSONL
    step0_max_log_ratio: float | None  # max |log p_policy - log p_ref| before training, nats; ~0
    seconds: float  # of this call


def fit(
    model: nn.Module,
    tokenizer: Any,
    config: TrainConfig,
    data: Any,
    ref_model: nn.Module | None = None,
    callbacks: Sequence[Callback] = (),
    *,
    resume: bool | str = False,
) -> TrainResult:
    """Fine-tunes `model` in place: `TrainingRun(model, ...).train(resume)`, which see."""
    return TrainingRun(model, tokenizer, config, data, ref_model, callbacks).train(resume)


class TrainingRun:
    """Fine-tunes `model` in place with the constrained objective or plain SFT.

    Args:
        model: a Hugging Face causal LM, bare or in a wrapper that `hf.attach` knows; attached while
            training, then as it came. With config.head="logits" any module of which
            `model(input_ids=, attention_mask=)` returns an object with `.logits` [B, T, V]. On one
            device.
        tokenizer: a fast tokenizer with a chat template.
        config: see `TrainConfig`.
        data: path of a JSONL file, a list of chat records or of `Example`s, or an object with
            `examples(epoch) -> list[Example]`, such as `RecoveryAugmentation`; see
            `load_chat_data`.
        ref_model: the model to be constrained to; None: `model` as it is when training starts.
        callbacks: each is called as `callback(run, record)` with every line of the log that is
            about a step.

    Everything that can be wrong with the arguments is refused here, as a ValueError, and nothing is
    written.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: TrainConfig,
        data: Any,
        ref_model: nn.Module | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.callbacks = tuple(callbacks)
        self.folder = Path(config.output_dir)
        self.params = [p for p in model.parameters() if p.requires_grad]
        if not self.params:
            raise ValueError("model: no parameter requires a gradient, nothing to train")
        self.device = self.params[0].device
        self._ref_arg = ref_model
        check_models(model, ref_model, config, self.device)
        self.objective = BatchObjective(
            config.rule,
            config.beta_at,
            head=config.head,
            autocast_dtype=config.autocast_dtype,
            temperature=config.temperature,
            min_weight=config.min_weight,
            kl_coef=config.kl_coef,
            kl_direction=config.kl_direction,
        )
        self._models = [m for m in (model, ref_model) if m is not None]
        for name, each in zip(("model", "ref_model"), self._models, strict=False):
            self.objective.check(name, each)

        self.source = Source(
            data,
            tokenizer,
            position_origin=config.position_origin,
            max_length=config.max_length or positions_of(model),
            on_too_long=config.on_too_long,
            vocab_size=embeddings_of(model),
            seed=config.seed,
            # A precomputed reference is a column of every epoch's table before the first step.
            keep_epochs=self.objective.needs_reference and config.reference == "precomputed",
        )
        self.steps_per_epoch = steps_per_epoch(len(self.source.table(0)), config.step_size)
        self.total_steps = config.max_steps or (config.epochs or 1) * self.steps_per_epoch
        self.warmup_steps = config.warmup_of(self.total_steps)
        if self.warmup_steps >= self.total_steps:
            warnings.warn(
                f"warmup_steps: {self.warmup_steps} of {self.total_steps} steps; the learning rate"
                f" never reaches {config.learning_rate:g}. None takes a fifth of the run at most",
                stacklevel=2,
            )
        self.epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        self.source.check(self.epochs)
        self.step = 0  # optimizer steps done
        self.ref_model: nn.Module | None = None  # in memory only with reference="frozen"
        self._reference_keys: list[str] = []
        self.step0_max_log_ratio: float | None = None
        self.metrics: dict[str, Any] = {}
        self.optimizer = self._make_optimizer()
        self._meter = Meter(self.device, config.prefix_length)
        self._speed = Speed()
        self._rng = ckpt.rng_state(self.device)  # after the last complete step
        self._frozen: str | None = None  # hash of what is not trained, once it was asked for
        self._consistent = True  # the model is between two steps, not inside an update

    # The loop.

    def train(self, resume: bool | str = False) -> TrainResult:
        """Run to the end.

        Args:
            resume: True: go on from the newest whole checkpoint in `output_dir`; the parameters at
                the end are bit for bit those of a run that was never interrupted (on one machine,
                with deterministic kernels). "auto": the same if there is one, else begin.

        Raises:
            ValueError: nothing to resume, or a run in `output_dir` that this one would overwrite;
                another run at work in it; another configuration, other data or a missing reference
                at a resume.
            FloatingPointError: the loss, the gradient or a weight is no longer finite. What is not
                is never saved.
            OSError: no room for a checkpoint; those before it stay.
            KeyboardInterrupt: after an interrupt, once a checkpoint is written; after SIGTERM its
                subclass `Terminated`.
        """
        if resume not in (True, False, "auto"):
            raise ValueError(f"resume: expected True, False or 'auto', got {resume!r}")
        begun = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if not resume or resume == "auto" or self.folder.is_dir():
                stack.enter_context(folders.owned(self.folder))
            state = self._state_to_resume(resume)
            stack.enter_context(training_session(self._models, self.config, self.device))
            stack.enter_context(self.objective.on(*self._models))
            self._prepare(state)
            log = RunLog(self.folder, None if state is None else self.step)
            progress = Progress(self.total_steps, self.step, self.config.progress)
            try:
                self._announce(log, state is not None)
                with deferred_stops() as stop:
                    self._speed.restart()
                    while self.step < self.total_steps:
                        if (reason := stop()) is not None:
                            raise reason
                        self._train_step()
                        progress.step()
                        self._report(log, progress)
                        if self._save_is_due():
                            self.save_checkpoint()
                log.write("end", step=self.step, seconds=time.perf_counter() - begun)
            except KeyboardInterrupt:
                if self._consistent and self.step:
                    self.save_checkpoint()
                raise
            finally:
                self.optimizer.zero_grad(set_to_none=True)
                progress.close()
                log.close()
        seconds = time.perf_counter() - begun
        return TrainResult(self.step, self.metrics, log.path, self.step0_max_log_ratio, seconds)

    def _save_is_due(self) -> bool:
        every = self.config.save_every
        return every is not None and (self.step % every == 0 or self.step == self.total_steps)

    def _train_step(self) -> None:
        batches, done = self._batches(self.step), []
        for batch in batches:
            loss, parts = self.objective.loss(self.model, batch, self.ref_model)
            loss.backward()
            shown = loss.detach() - self.objective.constant(batch)
            done.append((shown, parts, batch.targets, batch.positions))
        norm = nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.params, self.config.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(self.step)

        self._consistent = False  # until the end, a checkpoint would hold half an update
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._meter.add_step(done, norm)
        self.step += 1
        self._rng = ckpt.rng_state(self.device)
        self._speed.add(sum(batch.tokens for batch in batches))
        self._consistent = True

    def _batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step: a function of the step alone, or no run could be resumed."""
        epoch, at = divmod(step, self.steps_per_epoch)
        table, order = self.source.epoch(epoch)
        rows = order[at * self.config.step_size :][: self.config.step_size]
        counts = table.count(rows)  # of the whole step, so that its micro-batches add up
        groups = micro_batches(rows, table.lengths, self.config.batch_size)
        return [table.batch(group, self.device, counts) for group in groups]

    def lr_at(self, step: int) -> float:
        """Learning rate of update `step`, from 0: transformers' schedule of the same name."""
        warmup, total = self.warmup_steps, self.total_steps
        if step < warmup:
            return self.config.learning_rate * step / warmup
        done = min((step - warmup) / max(total - warmup, 1), 1.0)
        left = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
        return self.config.learning_rate * left[self.config.lr_schedule]

    # Before the loop.

    def _state_to_resume(self, resume: bool | str) -> dict[str, Any] | None:
        found = ckpt.checkpoints(self.folder)
        if not resume and found:
            raise ValueError(
                f"output_dir: {self.folder} holds the checkpoints of a run; resume it, remove them,"
                " or choose another folder"
            )
        if not resume or (resume == "auto" and not found):
            return None
        path, state = ckpt.load_newest(self.folder)
        if why := differences(state["identity"], self._identity()):
            raise ValueError(f"resume: {path} comes from {why}")
        return state

    def _identity(self) -> dict[str, Any]:
        if self._frozen is None:
            self._frozen = frozen_hash(self.model)
        return identity(self.config, self.source.table(0), self._frozen, processes=1)

    def _prepare(self, state: dict[str, Any] | None) -> None:
        """Reference, optimizer and, at a resume, the state of the checkpoint."""
        self.step, self.metrics, self.step0_max_log_ratio = 0, {}, None
        self._rng, self._consistent = ckpt.rng_state(self.device), True
        self._meter = Meter(self.device, self.config.prefix_length)
        self.optimizer = self._make_optimizer()
        self.optimizer.zero_grad(set_to_none=True)
        if self.objective.needs_reference:
            self._prepare_reference(state)
        if state is not None:
            ckpt.load_trained(self.model, state["model"])
            ckpt.load_optimizer(self.optimizer, self.model, state["optimizer"])
            self._meter.sums.copy_(state["meter"])
            self.step, self.metrics, self._rng = state["step"], state["metrics"], state["rng"]
            self.step0_max_log_ratio = state["step0_max_log_ratio"]
        ckpt.set_rng_state(self._rng, self.device)

    def _prepare_reference(self, state: dict[str, Any] | None) -> None:
        reference = self.model if self._ref_arg is None else self._ref_arg
        if self.config.reference == "frozen":
            self.ref_model = frozen_copy(reference) if self._ref_arg is None else reference.eval()
            self._reference_keys = [model_hash(self.ref_model)]
            if state is not None and state["reference"] != self._reference_keys:
                raise ValueError(
                    "resume: the frozen reference is not the one this run began with; pass that as"
                    " ref_model, or the model as it was before training"
                )
        else:
            self._load_or_precompute(reference, state)
        if state is None:
            self._check_step0()

    def _load_or_precompute(self, reference: nn.Module, state: dict[str, Any] | None) -> None:
        cache, keys = ReferenceCache(self.folder), []
        for epoch in self.source.epochs_with_own_table(self.epochs):
            table = self.source.table(epoch)
            if state is not None:
                key = state["reference"][epoch]
                table.ref_logp = cache.load(key, table)
            else:
                about = (self.config.autocast_dtype, self.config.head, self.config.temperature)
                key = cache.key(reference, table, *about)
                table.ref_logp = cache.load_or_none(key, table)
            if table.ref_logp is None:
                size = self.config.batch_size
                logp = reference_logp(reference, table, self.objective.logp, self.device, size)
                cache.save(key, table, logp)
                table.ref_logp = cache.load(key, table)
            keys.append(key)
        self._reference_keys = keys

    @torch.no_grad()
    def _check_step0(self) -> None:
        """Before training policy and reference agree, unless another model is the reference.

        The first batch goes through the very path of training; a reference that is shifted by a
        token, belongs to other data or sees other masks cannot pass.
        """
        with evaluating(self.model):
            _, parts = self.objective.loss(self.model, self._batches(0)[0], self.ref_model)
        gap = (parts.logp - parts.ref_logp).abs().max().item()
        low = self.config.autocast_dtype is not None or self.params[0].element_size() < 4
        allowed = 1.0 if low else 1e-2
        if self._ref_arg is None and not gap <= allowed:
            raise RuntimeError(
                f"before the first step policy and reference differ by up to {gap:.3g} nats on a"
                f" target token, more than rounding explains ({allowed:g}): they do not speak about"
                " the same tokens"
            )
        self.step0_max_log_ratio = gap

    def _announce(self, log: RunLog, resumed: bool) -> None:
        if resumed:
            log.write("resume", step=self.step)
            return
        log.write(
            "start",
            step=0,
            config=self.config.as_dict(),
            total_steps=self.total_steps,
            examples=len(self.source.table(0)),
            too_long=self.source.too_long,
            warmup_steps=self.warmup_steps,
            trained_tokens_per_epoch=sum(self.source.table(0).trained),
            step0_max_log_ratio=self.step0_max_log_ratio,
            torch=torch.__version__,
        )

    def _make_optimizer(self) -> torch.optim.AdamW:
        config = self.config
        matrices = [p for p in self.params if p.dim() >= 2]
        vectors = [p for p in self.params if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=config.learning_rate,
            betas=config.adam_betas,
            eps=config.adam_eps,
            fused=self.device.type in ("cpu", "cuda"),  # one kernel for all parameters
        )

    # After a step.

    def _report(self, log: RunLog, progress: Progress) -> None:
        """One line of the log, if it is due."""
        if self.step % self.config.log_every and self.step != self.total_steps:
            return
        # The one place where the loop waits for the device.
        values = self._meter.read(self.objective.needs_reference, self.config.kl_coef > 0)
        for name in ("objective", "grad_norm"):
            self._must_be_finite(name, values[name] or 0.0)
        self.metrics = log.write(
            "step",
            step=self.step,
            epoch=round(self.step / self.steps_per_epoch, 4),
            lr=self.lr_at(self.step - 1),
            tokens_per_s=round(self._speed.tokens_per_s(), 1),
            **values,
        )
        progress.say(self.metrics)
        if self.callbacks:
            with kept_modes(self.model):  # a callback may evaluate or sample
                for callback in self.callbacks:
                    callback(self, self.metrics)
            ckpt.set_rng_state(self._rng, self.device)
        self._speed.restart()

    def _must_be_finite(self, name: str, value: float) -> None:
        if math.isfinite(value):
            return
        found = ckpt.checkpoints(self.folder)
        last = f"the last checkpoint is {found[-1].name}" if found else "there is no checkpoint"
        raise FloatingPointError(f"step {self.step}: {name} is {value}; the run is stopped, {last}")

    def save_checkpoint(self) -> Path:
        """Write the state after the last complete step to `output_dir`; callbacks may call this.

        Raises:
            FloatingPointError: a loss since the last line of the log, or a weight, is not finite.
            OSError: no room.
        """
        for name, value in zip(
            ("objective", "grad_norm"), self._meter.sums[-1].tolist(), strict=False
        ):
            self._must_be_finite(name, value)
        if not ckpt.all_finite(self.model):
            self._must_be_finite("a weight", math.nan)
        state = {
            "identity": self._identity(),
            "reference": self._reference_keys,
            "model": ckpt.trained_state(self.model),
            "optimizer": ckpt.optimizer_state(self.optimizer, self.model),
            "meter": self._meter.sums.cpu(),
            "rng": self._rng,
            "metrics": self.metrics,
            "step0_max_log_ratio": self.step0_max_log_ratio,
        }
        return ckpt.save(self.folder, self.step, state, self.config.keep_checkpoints)
