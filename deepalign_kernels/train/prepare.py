"""What is done before the first step: the half of `TrainingRun` that makes its parts ready."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepalign_kernels.data.columns import Batch
from deepalign_kernels.data.source import Source
from deepalign_kernels.modes import evaluating
from deepalign_kernels.train import checkpoint as ckpt
from deepalign_kernels.train.config import TrainConfig
from deepalign_kernels.train.evaluate import Evaluation, reading
from deepalign_kernels.train.log import Meter
from deepalign_kernels.train.objective import BatchObjective
from deepalign_kernels.train.optimizers import Released, make_optimizer
from deepalign_kernels.train.ranks import SHARDED, shard, share_out
from deepalign_kernels.train.reference import Kept, Reference
from deepalign_kernels.train.resume import Resumable
from deepalign_kernels.train.session import (
    embeddings_of,
    positions_of,
    prompt_stops,
    training_session,
)
from deepalign_kernels.train.state import load_optimizer, load_trained
from deepalign_kernels.train.zero import STAGES, Zero, installed, zero_of


class Prepared(Resumable):
    """What `TrainingRun` is made of, and how it is made ready."""

    objective: BatchObjective
    params: list[nn.Parameter]
    eval_source: Source | None
    epochs: int
    _ref_arg: nn.Module | None
    _models: list[nn.Module]
    _called: nn.Module
    _way: tuple[str, bool]
    _consistent: bool
    _released: Released
    _zero: Zero | None = None
    _evaluation: Evaluation | None

    @property
    def sharded(self) -> bool:
        """Whether the processes share weights, gradients and states."""
        return self._way[0] in SHARDED

    def _batches(self, step: int) -> list[Batch]:
        raise NotImplementedError

    def _source_of(self, name: str, data: Any, **options: Any) -> Source:
        config, model = self.config, self.model
        source = Source(
            data,
            self.tokenizer,
            config.encoding,
            max_length=config.max_length or positions_of(model),
            on_too_long=config.on_too_long,
            vocab_size=embeddings_of(model),
            seed=config.seed,
            cache=config.data_cache,
            workers=config.data_workers,
            progress=config.progress,
            **options,
        )
        if source.skipped and self.ranks.main:
            warnings.warn(
                f"{name}: {len(source.skipped)} records are left out (on_bad_record='skip'); the"
                f" first: {source.skipped[0]}",
                stacklevel=3,
            )
        return source

    def _prepare(self, state: dict[str, Any] | None) -> None:
        """Reference, shares, optimizer and, at a resume, the state of the checkpoint."""
        self.step, self.metrics, self.step0_max_log_ratio = 0, {}, None
        self._rng, self._consistent = ckpt.rng_state(self.device), True
        self._meter = Meter(self.device, self.config.prefix_length)
        asks = self.objective.needs_reference
        if asks or self._eval_asks:  # its hash, before the model is sharded
            self.reference.begin(self.model, self._ref_arg, resumed=state is not None)
            if asks and state is not None:
                self.reference.must_be(state["reference"])
        self._share_out()
        if self._zero is None:
            self._make_optimizer()
            self.optimizer.zero_grad(set_to_none=True)
        if asks:
            self._take_reference(None if state is None else state["reference"])
            if state is None:
                self._check_step0()
        self._prepare_evaluation(state)
        if state is not None:
            load_trained(self.model, state["model"])
            load_optimizer(self.optimizer, self.model, state["optimizer"])
            self._meter.go_on_from(state["meter"], self.ranks.main)
            self.step, self.metrics = state["step"], state["metrics"]
            self.step0_max_log_ratio, self.best = state["step0_max_log_ratio"], state["best"]
            self._rng = self._rng_of(state["rng"])
        ckpt.set_rng_state(self._rng, self.device)

    def compute_reference(self) -> dict[str, list[Kept]]:
        """What `train` would compute before the first step, and nothing else: a run with the same
        reference, data and choices finds it in `reference_cache`. A pass that was interrupted goes
        on where it was. All processes must call; the model is not trained.

        Returns:
            {"data": [an entry for each epoch with data of its own], "eval_data": [one]}; of each
            only if there are such data, and something asks their reference.

        Raises:
            ValueError: this configuration keeps no reference.
            OSError: no room; what is there is kept.
        """
        check_keeps(self.config)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.ranks.naming_the_lost())
            stack.enter_context(prompt_stops())
            self.ranks.must_agree("data", repr(self._identity()["data"]))
            session = training_session(self._models, self.config, self.device, self.ranks.rank)
            stack.enter_context(session)
            stack.enter_context(self.objective.on(*self._models))
            try:
                self.reference.begin(self.model, self._ref_arg, resumed=False)
                self._share_out()
                out = {}
                if self.objective.needs_reference:
                    self._take_reference(None)
                    out["data"] = self.reference.kept
                if self.eval_source is not None:
                    out["eval_data"] = self._eval_reference(self.eval_source, None).kept
            finally:
                self._give_back()
        return out

    def _take_reference(self, keys: list[str] | None) -> None:
        """`keys`: those of a checkpoint."""
        self.reference.take(
            self._called if self._ref_arg is None else self._ref_arg,
            self.source.epochs_with_own_table(self.epochs),
            self.device,
            self._reference_folder,
            keys,
        )

    def _prepare_evaluation(self, state: dict[str, Any] | None) -> None:
        """Its reference; with one of the policy's own, before the policy moves."""
        self._evaluation, self.best = None, None
        self.eval_reference_keys: list[str] = []
        if self.eval_source is None:
            return
        if self._eval_asks:
            keys = None if state is None else state["eval_reference"]
            if keys == []:
                raise ValueError(
                    "eval_data: this run began without, or without eval_kl; what the reference says"
                    " about other data cannot be known from a policy that has moved"
                )
            self.eval_reference_keys = self._eval_reference(self.eval_source, keys).keys
        table = self.eval_source.table(0)
        self._evaluation = Evaluation(self.config, table, self.ranks, self.device)

    @property
    def _eval_asks(self) -> bool:
        """Whether an evaluation compares with the reference."""
        wanted = self.objective.needs_reference or self.config.eval_kl
        return wanted and self.eval_source is not None

    def _eval_reference(self, source: Source, keys: list[str] | None) -> Reference:
        objective = reading(self.config, True) if self.config.eval_kl else self.objective
        reference = Reference(self.config, objective, source, self.ranks)
        reference.like(self.reference)
        model = self._called if self._ref_arg is None else self._ref_arg
        reference.take(model, range(1), self.device, self._reference_folder, keys)
        return reference

    @property
    def _reference_folder(self) -> Path:
        return Path(self.config.reference_cache or self.folder)

    def _share_out(self) -> None:
        """With several processes, or one that offloads: what a forward calls from here on, and what
        is trained. DeepSpeed takes the optimizer over as well."""
        way, offload = self._way
        if self._by_deepspeed:
            if zero_of(self.model) is not None:
                raise ValueError(
                    "model: its weights are shared out since the first train(); make a new run of"
                    " the bare model, which may resume this one"
                )
            self._make_optimizer()
            self.optimizer.zero_grad(set_to_none=True)
            config = self.config
            self._zero = Zero(
                self.model,
                self.optimizer,
                self.device,
                stage=STAGES[way],
                offload=offload,
                batch_size=config.batch_size,
                max_grad_norm=config.max_grad_norm,
                autocast_dtype=config.autocast_dtype,
            )
            self._called = self._zero.engine
            return
        if self.ranks.count > 1 or offload:
            self._called = share_out(self.model, way, offload, self.device)
            own = self.config.reference == "frozen" and self._ref_arg is None
            if way == "fsdp" and self.reference.model is not None and own:
                shard(self.reference.model, offload, self.device)
            self.params = trained_of(self.model)

    def _give_back(self) -> None:
        """The model is what a forward calls again; what is sharded stays so."""
        if self._zero is not None:
            self._zero.close()
        self._zero, self._called = None, self.model

    @property
    def _by_deepspeed(self) -> bool:
        return self._way[0] in STAGES and (self.ranks.count > 1 or self._way[1])

    @torch.no_grad()
    def _check_step0(self) -> None:
        """Before training policy and reference agree, unless another model is the reference, or
        adapters come trained.

        The first batch goes through the very path of training; a reference that is shifted by a
        token, belongs to other data or sees other masks cannot pass.
        """
        with evaluating(self._called):
            batch = self._batches(0)[0]
            _, parts = self.objective.loss(self._called, batch, self.reference.model)
        gap = self.ranks.largest((parts.logp - parts.ref_logp).abs().max().item())
        low = self.config.autocast_dtype is not None or self.params[0].element_size() < 4
        low |= batch.anchors is not None and self.config.reference_dtype == "bfloat16"
        allowed = 1.0 if low else 1e-2
        same = self._ref_arg is None and self.config.reference != "adapter_off"
        if same and not gap <= allowed:
            raise RuntimeError(
                f"before the first step policy and reference differ by up to {gap:.3g} nats on a"
                f" target token, more than rounding explains ({allowed:g}): they do not speak about"
                " the same tokens"
            )
        self.step0_max_log_ratio = gap

    def _make_optimizer(self, trial: bool = False) -> None:
        """`trial`: only to know that it can be made; where it would copy all weights to the CPU, of
        one weight."""
        config, params = self.config, self.params
        if trial and config.optimizer == "adamw_offload":
            like = params[0]
            params = [nn.Parameter(torch.zeros(1, 1, dtype=like.dtype, device=like.device))]
        self.optimizer = make_optimizer(
            config.optimizer,
            params,
            learning_rate=config.learning_rate,
            betas=config.adam_betas,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            rounds=not self._by_deepspeed,
        )
        self._released = Released(self.optimizer, self.params)


def trained_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def check_keeps(config: TrainConfig) -> None:
    """Raises ValueError: a run would keep nothing of a reference."""
    if not config.needs_reference and not config.eval_kl:
        raise ValueError(
            f"objective: {config.as_dict()['objective']!r} without kl_coef or eval_kl asks no"
            " reference, so there is nothing to compute"
        )
    if config.reference != "precomputed":
        raise ValueError(
            f"reference: {config.reference!r} runs along and keeps nothing; 'precomputed' is what"
            " can be computed before"
        )


def check_several(
    config: TrainConfig, way: str, processes: int, model: nn.Module, ref_model: nn.Module | None
) -> None:
    """Raises ValueError: what only one process does, or not in this way of sharing."""
    if config.release_gradients:
        raise ValueError(
            "release_gradients: several processes must exchange gradients first; parallel='fsdp'"
            " keeps a share of them in each"
        )
    named = config.optimizer if isinstance(config.optimizer, str) else "adamw"
    if named == "adamw_offload":
        raise ValueError(
            "optimizer: 'adamw_offload' takes gradients to the CPU before other processes have"
            " added theirs; give 'adamw' with parallel='fsdp' and cpu_offload"
        )
    if way != "ddp" and named != "adamw":
        raise ValueError(
            f"optimizer: {named!r} is not known to shard and to be put together again; give"
            f" 'adamw' with parallel={way!r}, whose states are shared out, or parallel='ddp'"
        )
    if way in STAGES:
        _check_zero(config, way, processes, model, ref_model)


def _check_zero(
    config: TrainConfig, way: str, processes: int, model: nn.Module, ref_model: nn.Module | None
) -> None:
    """Raises ValueError: what is not known to work, or makes no sense, with DeepSpeed."""
    if processes == 1:
        raise ValueError(
            f"cpu_offload: parallel={way!r} offloads in several processes (torchrun, accelerate"
            " launch); one process does with parallel='fsdp'"
        )
    if not installed():
        raise ValueError(f"parallel: {way!r} needs deepspeed (pip install deepspeed)")
    if "LOCAL_RANK" not in os.environ:
        raise ValueError(f"parallel: {way!r} needs LOCAL_RANK, as torchrun and accelerate set it")
    if not isinstance(config.optimizer, str):
        raise ValueError(
            f"optimizer: with parallel={way!r} it gets flat pieces of the weights, which suits"
            " 'adamw', but not every optimizer; give that, or parallel='ddp'"
        )
    if config.compile_layers:
        raise ValueError(f"compile_layers: not known to work with parallel={way!r}; give 'ddp'")
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16}:
        named = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(
            f"model: parallel={way!r} trains weights of one dtype, fp32 or bf16, got {named}"
        )
    live = config.needs_reference and config.reference in ("frozen", "model")
    if way == "zero3" and (live or ref_model is not None):
        raise ValueError(
            "reference: with parallel='zero3' a second model would stand whole on each device; give"
            " 'precomputed' or 'adapter_off', without ref_model, or parallel='fsdp'"
        )
