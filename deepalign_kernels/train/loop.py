"""Constrained fine-tuning of a causal language model, as one loop to be read from top to bottom."""

from __future__ import annotations

import contextlib
import math
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepalign_kernels import backends, rules
from deepalign_kernels.data.columns import Batch
from deepalign_kernels.data.packing import steps_per_epoch
from deepalign_kernels.modes import kept_modes
from deepalign_kernels.train import checkpoint as ckpt
from deepalign_kernels.train.config import TrainConfig
from deepalign_kernels.train.economy import activations_on_host
from deepalign_kernels.train.forwards import check_isolation, check_limits, forwards
from deepalign_kernels.train.log import Meter, Progress, RunLog, Speed
from deepalign_kernels.train.objective import BatchObjective, untrained
from deepalign_kernels.train.optimizers import let_go, set_rate
from deepalign_kernels.train.prepare import Prepared, check_several, trained_of
from deepalign_kernels.train.ranks import Ranks, accumulating, device_of, way_of, whole
from deepalign_kernels.train.reference import Reference
from deepalign_kernels.train.session import (
    STOPS,
    check_models,
    deferred_stops,
    prompt_stops,
    training_session,
)
from deepalign_kernels.train.trackers import Trackers

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
    eval_data: Any = None,
    resume: bool | str = False,
) -> TrainResult:
    """Fine-tunes `model` in place: `TrainingRun(model, ...).train(resume)`, which see."""
    run = TrainingRun(model, tokenizer, config, data, ref_model, callbacks, eval_data)
    return run.train(resume)


class TrainingRun(Prepared):
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
        eval_data: held-out data, as `data`; see `TrainConfig.eval_every`.
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
        eval_data: Any = None,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.callbacks = tuple(callbacks)
        self.folder = Path(config.output_dir)
        self.params = trained_of(model)
        if not self.params:
            raise ValueError("model: no parameter requires a gradient, nothing to train")
        self._way = way_of(config.parallel, config.cpu_offload, config.autocast_dtype is not None)
        self.device = device_of(self._way[0], self.params[0].device)
        self._ref_arg = ref_model
        check_models(model, ref_model, config, self.params[0].device)
        self.ranks = Ranks.here(self.device)
        if self.ranks.count > 1 or self._way[1]:
            check_several(config, self._way[0], self.ranks.count, model, ref_model)
        self._called: nn.Module = model  # what a forward calls: the model, or what shares it
        self.objective = BatchObjective(
            config.rule,
            config.beta_at,
            head=config.head,
            autocast_dtype=config.autocast_dtype,
            temperature=config.temperature,
            min_weight=config.min_weight,
            kl_coef=config.kl_coef,
            kl_direction=config.kl_direction,
            kl_positions=config.kl_positions,
        )
        self._models = [m for m in (model, ref_model) if m is not None]
        for name, each in zip(("model", "ref_model"), self._models, strict=False):
            self.objective.check(name, each)
            if config.packing and self.device.type != "meta":
                check_isolation(name, each)

        self.step_size = config.step_size * self.ranks.count  # conversations, of all processes
        self.eval_source = None if eval_data is None else self._source_of("eval_data", eval_data)
        self.source = self._source_of(
            "data",
            data,
            # A precomputed reference is a column of every epoch's table before the first step.
            keep_epochs=self.objective.needs_reference and config.reference == "precomputed",
            step_size=self.step_size if config.group_by_length else None,
        )
        if config.eval_every is not None and self.eval_source is None:
            warnings.warn("eval_every: without eval_data nothing is evaluated", stacklevel=2)
        if self.source.table(0).scales_beta and not rules.objective_of(config.rule).needs_beta:
            warnings.warn(
                f"data: records have a beta_scale, and objective={config.as_dict()['objective']!r}"
                " has no beta",
                stacklevel=2,
            )
        if config.early_stop is not None and self.eval_source is None:
            raise ValueError("early_stop: it counts evaluations on eval_data, and there are none")
        self.steps_per_epoch = steps_per_epoch(len(self.source.table(0)), self.step_size)
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
        for source in (self.source, self.eval_source):
            check_limits(config.limits, source, self.epochs)
        self.step = 0  # optimizer steps done
        self.reference = Reference(config, self.objective, self.source, self.ranks)
        self.best: dict[str, Any] | None = None  # the best evaluation: step and its numbers
        self.step0_max_log_ratio: float | None = None
        self.metrics: dict[str, Any] = {}
        self._make_optimizer(trial=True)
        self._meter = Meter(self.device, config.prefix_length)
        self._speed = Speed()
        self._rng = ckpt.rng_state(self.device)  # after the last complete step
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
            KeyboardInterrupt: after an interrupt, once a checkpoint is written (before the first
                step at once); after SIGTERM its subclass `Terminated`.
        """
        if resume not in (True, False, "auto"):
            raise ValueError(f"resume: expected True, False or 'auto', got {resume!r}")
        begun = time.perf_counter()
        config, ranks = self.config, self.ranks
        with contextlib.ExitStack() as stack:
            stack.enter_context(ranks.naming_the_lost())
            stack.enter_context(prompt_stops())  # until the first step
            # The first process alone owns the folder; no other goes on before it does.
            ranks.first(lambda: self._own_folder(stack, resume))
            ranks.must_agree("data", repr(self._identity()["data"]))
            state = self._state_to_resume(resume)
            session = training_session(self._models, config, self.device, ranks.rank)
            stack.enter_context(session)
            stack.enter_context(self.objective.on(*self._models))
            self._prepare(state)
            at = None if state is None else self.step
            log = RunLog(self.folder, at, ranks.main, self._trackers())
            progress = Progress(self.total_steps, self.step, config.progress and ranks.main)
            number, ran = 0, None
            try:
                self._announce(log, state is not None)
                if state is None:
                    self._evaluate(log)
                with deferred_stops(patient=ranks.count > 1) as stop:
                    self._speed.restart()
                    while not self.finished:
                        if number := int(ranks.largest(stop())):
                            raise STOPS[signal.Signals(number)]
                        if ran is None:  # says which implementations it runs on
                            with backends.watched() as ran:
                                self._train_step()
                            log.write("ops", step=self.step, head=config.head, backends=ran)
                        else:
                            self._train_step()
                        progress.step()
                        self._report(log, progress)
                        if self._is_due(config.eval_every):
                            self._evaluate(log)
                        if config.save_every and self._is_due(config.save_every):
                            self.save_checkpoint()
                log.write("end", step=self.step, seconds=time.perf_counter() - begun)
            except KeyboardInterrupt:
                # Of several processes only those that stop together can save together.
                if self._consistent and self.step and (number or ranks.count == 1):
                    self.save_checkpoint()
                raise
            finally:
                self.optimizer.zero_grad(set_to_none=True)
                let_go(self.optimizer)
                progress.close()
                log.close()
                self._give_back()
        seconds = time.perf_counter() - begun
        return TrainResult(self.step, self.metrics, log.path, self.step0_max_log_ratio, seconds)

    @property
    def finished(self) -> bool:
        """All steps are made, or `early_stop` evaluations in a row found nothing better."""
        few, every = self.config.early_stop, self.config.eval_every
        if self.step >= self.total_steps or few is None or every is None or self.best is None:
            return self.step >= self.total_steps
        return self.step - self.best["step"] >= few * every

    def _is_due(self, every: int | None) -> bool:
        return self.finished or (every is not None and self.step % every == 0)

    def _train_step(self) -> None:
        batches, done = self._batches(self.step), []
        set_rate(self.optimizer, self.lr_at(self.step))
        for number, batch in enumerate(batches, 1):
            with accumulating(self._called, last=number == len(batches)):
                with self._kept_where():
                    loss, parts = self.objective.loss(self._called, batch, self.reference.model)
                self._backward(loss)
            shown = loss.detach() - self.objective.constant(batch)
            done.append((shown, parts, batch.targets, batch.positions))
        norm = self._update()
        self._meter.add_step(done, whole(norm))
        self.step += 1
        self._rng = ckpt.rng_state(self.device)
        self._speed.add(sum(batch.tokens for batch in batches) * self.ranks.count)
        self._consistent = True

    def _kept_where(self) -> contextlib.AbstractContextManager[None]:
        """Of a forward in the block: whether what it keeps waits on the CPU."""
        on_host = self.config.offload_activations
        return activations_on_host(self.model) if on_host else contextlib.nullcontext()

    def _backward(self, loss: Tensor) -> None:
        """DDP, FSDP and DeepSpeed take the mean over the processes; the shares of a step are to add
        up."""
        shared = loss if self.ranks.count == 1 else loss * self.ranks.count
        if self.config.release_gradients:
            self._consistent = False  # this is the update, too
            with self._released.on():
                loss.backward()
        elif self._zero is not None:
            self._zero.backward(shared)
        else:
            shared.backward()

    def _update(self) -> Tensor:
        """One step of the optimizer; the 2-norm of the gradient, before clipping."""
        if self.config.release_gradients:
            return self._released.norm
        if self._zero is not None:
            self._consistent = False
            return self._zero.update()
        norm = nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.params, self.config.max_grad_norm, norm)
        self._consistent = False  # until the end, a checkpoint would hold half an update
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step: a function of the step alone, or no run could be resumed.

        Each process has its share of every one, an empty share as a row without trained tokens: it
        must take part in the exchange of gradients.
        """
        epoch, at = divmod(step, self.steps_per_epoch)
        table, order = self.source.epoch(epoch)
        rows = order[at * self.step_size :][: self.step_size]
        counts = table.count(rows)  # of the whole step, so that its micro-batches add up
        out = []
        limits = self.config.limits
        for group, own in forwards(self.ranks, rows, table.lengths, limits):
            batch = table.batch(group, self.device, counts, limits.packed)
            out.append(batch if own else untrained(batch))
        return out

    def lr_at(self, step: int) -> float:
        """Learning rate of update `step`, from 0: transformers' schedule of the same name."""
        warmup, total = self.warmup_steps, self.total_steps
        if step < warmup:
            return self.config.learning_rate * step / warmup
        done = min((step - warmup) / max(total - warmup, 1), 1.0)
        left = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
        return self.config.learning_rate * left[self.config.lr_schedule]

    def _trackers(self) -> Trackers | None:
        if not self.ranks.main:
            return None
        return Trackers(self.config.report_to, self.folder, self.config.as_dict())

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
            skipped=len(self.source.skipped),
            warmup_steps=self.warmup_steps,
            trained_tokens_per_epoch=sum(self.source.table(0).trained),
            step0_max_log_ratio=self.step0_max_log_ratio,
            torch=torch.__version__,
        )
        for name, source in (("data", self.source), ("eval_data", self.eval_source)):
            for why in () if source is None else source.skipped:
                log.write("skipped", data=name, why=why)

    # After a step.

    def _evaluate(self, log: RunLog) -> None:
        """A line of the log about held-out data; what is best so far is kept in best.pt."""
        if self._evaluation is None:
            return
        said = self._evaluation.measure(self._called, self.reference.model)
        self._must_be_finite("objective of the evaluation", said["objective"])
        log.write("eval", step=self.step, **said)
        by = self.config.best_by
        if self.best is None or said[by] < self.best[by]:
            self.best = {"step": self.step, **said}
            self.save_best()
        self._speed.restart()

    def _report(self, log: RunLog, progress: Progress) -> None:
        """One line of the log, if it is due."""
        if self.step % self.config.log_every and self.step != self.total_steps:
            return
        # The one place where the loop waits for the device.
        about = self.objective.needs_reference, self.config.kl_coef > 0, self.ranks
        values = self._meter.read(*about)
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
