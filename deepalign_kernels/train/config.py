"""Every choice of a training run, checked when it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from deepalign_kernels import check, rules
from deepalign_kernels.data.examples import BAD_RECORDS, ORIGINS, TOO_LONG, TRAIN_ON, Encoding
from deepalign_kernels.data.packing import Limits
from deepalign_kernels.data.records import UNKNOWN_KEYS
from deepalign_kernels.losses import BetaSchedule
from deepalign_kernels.train.optimizers import OPTIMIZERS, Factory
from deepalign_kernels.train.ranks import OFFLOADING, PARALLEL
from deepalign_kernels.train.trackers import names_of

# Names of this level; any other is a rule of rules.py.
OBJECTIVES = {"sft": "nll", "constrained": "exact"}
REFERENCES = ("precomputed", "frozen", "adapter_off", "model")
CACHED_DTYPES = ("bfloat16", "float32")
SCHEDULES = ("linear", "cosine", "constant")
HEADS = ("fused", "logits")
KL_DIRECTIONS = ("policy_ref", "ref_policy", "js")
BEST_BY = ("objective", "nll")
PAPERS_WARMUP = 10  # steps; by default at most a fifth of the run

Schedule = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the paper's for constrained fine-tuning of Llama-2-7B-Chat on
    ordinary data (arXiv 2406.05946): beta, AdamW and its betas, learning rate, warm-up, 64
    conversations a step, 3 epochs, no clipping.

    Args:
        output_dir: folder of the log, the checkpoints and the reference cache; made when training
            starts.
        objective: "constrained" (equation 3), "sft" (cross-entropy), another rule by name, or a
            function of (logp, ref_logp, beta): see `deepalign_kernels.rules`. What the authors'
            code computes is "surrogate" with min_weight=1e-3.
        min_weight: floor of each token's weight, with objective="surrogate" only.
        temperature: divides the logits of policy and reference.
        kl_coef: what the divergence from the reference over the whole vocabulary, nats per trained
            token, is multiplied by before it is added to the objective: an anchor, any objective
            may have it ("sft" with it: fine-tuning without forgetting).
        kl_direction: "policy_ref", "ref_policy" or "js", as in `deepalign_kernels.token_kl`.
        kl_positions: only tokens at position 1 to this are anchored; None: all that are trained.
        beta: positions [...] -> beta [...], or one number for every position. A rule without a
            reference, such as "sft", does not use it; its `prefix_length` still
            divides the logged positions into groups.
        reference: "precomputed": one number per trained token, taken before the first step, and
            with kl_coef the last hidden state of each anchored one, in files; "frozen": a copy of
            the model, or `ref_model`, that runs along with every batch; "model": `ref_model` runs
            along; "adapter_off": the model itself without its adapters (PEFT) does. Rules that need
            no reference get none. "precomputed" keeps the data of all epochs if they differ.
        reference_cache: folder of what "precomputed" keeps, which runs may share, also at the same
            time; None: output_dir.
        reference_dtype: "bfloat16" or "float32", of the hidden states that are kept.
        head: where the losses are computed. "fused": inside the model's own output head
            (`hf.attach`), so the logits are never whole in memory; a model that `attach` does not
            take is refused. "logits": from the model's whole logits, for any module that has them.
            The two differ by rounding, of 16-bit models by that of their logits.
        position_origin: where a response begins to count: at its "content", behind what the chat
            template itself puts there (an empty think block, a channel header), or at the start of
            its "span".
        train_on: "all" assistant turns, or the "last" of each conversation; `train` and `weight` of
            a message come before this.
        unknown_keys: of records and messages: "ignore" leaves them out, "error" refuses them.
        on_bad_record: "error" stops at a record that is none (broken JSON, wrong keys, an empty
            answer) or of which nothing can be trained; "skip" leaves it out, and the log names its
            line and the reason.
        packing: conversations of a forward stand one behind the other, without padding; each sees
            itself alone. Refused for models that would let them see each other.
        max_batch_tokens: tokens per forward, padding included; then a forward has as many
            conversations as there is room for, without padding also more than `batch_size`. A step
            has batch_size * gradient_accumulation_steps conversations as before.
        group_by_length: conversations of a step are of like lengths; less padding, and an order
            that is less random.
        data_cache: folder in which tokens are kept for the next run with the same data; None: none.
        data_workers: processes that tokenise; None: all processors, for more than 2000
            conversations.
        learning_rate: peak, reached after `warmup_steps`.
        lr_schedule: "linear" or "cosine" bring the rate to 0 at the end, "constant" holds it.
        warmup_steps: steps of linear warm-up; None: the paper's 10, but at most a fifth of the run.
            As in transformers, the first of several has rate 0. A number that reaches to the end of
            the run is taken with a warning.
        batch_size: conversations per forward, of each process.
        gradient_accumulation_steps: forwards per optimizer step; 4 of 16 are the paper's batch of
            64, as are 2 of 16 in two processes.
        epochs: rounds through the data; without this and max_steps, 3. Not both.
        max_steps: optimizer steps, instead of epochs.
        optimizer: "adamw"; with bf16 weights "adamw_bf16_sr" (stochastic rounding), "adamw_kahan"
            (compensated sums); with either dtype "adamw_8bit" or "adamw_4bit" states,
            "adamw_8bit_paged", or "adamw_offload" with states and update on the CPU; or a function
            of (groups, lr=, betas=, eps=) that gives an optimizer. What each takes of memory: docs,
            "A training run".
        release_gradients: use and free each gradient inside the backward, so that there is never
            more than one; not with accumulation, clipping or several processes.
        adam_betas: of AdamW; the paper has 0.5 and 0.999.
        adam_eps: added to the root of AdamW's second moment.
        weight_decay: decoupled, on parameters with two or more dimensions.
        max_grad_norm: 2-norm to which the gradient is clipped; None, as in the paper, leaves it as
            it is: clipping takes away from the constraint where it pulls hardest.
        max_length: tokens per conversation; None asks the model's config.
        on_too_long: "error" refuses a longer one, "drop" leaves it out, "truncate" keeps its
            beginning.
        autocast_dtype: "bfloat16" runs the forward in it. Keep the weights in fp32: a step at a
            rate of 2e-5 is mostly below the resolution of bf16 weights.
        gradient_checkpointing: recompute activations in the backward.
        offload_activations: with that, what is kept of each layer, its input, waits on the CPU.
        compile_layers: torch.compile of each decoder layer; not with "fsdp".
        parallel: with several processes, what they share. "ddp": each has the whole model; "fsdp":
            parameters, gradients and optimizer states are sharded (FSDP2), those of `model` for
            good; "zero2": DeepSpeed's ZeRO-2, gradients and states are sharded; "zero3": its
            ZeRO-3, weights as well; "auto": what `accelerate launch` is configured for, else "ddp".
        cpu_offload: with "fsdp", also in one process, what is not in use lies on the CPU; with
            "zero2" states and update, with "zero3" weights as well.
        seed: of data order and dropout; nothing outside the run depends on it.
        eval_every: steps between evaluations on `eval_data`; None: before the first step and at the
            end. "best.pt" keeps what is trained where `best_by` was least.
        eval_kl: evaluations have the divergence from the reference over the whole vocabulary by
            position, also without kl_coef: the reference's hidden states of `eval_data` are kept
            for it, and its output head. For any objective; with reference="precomputed".
        best_by: "objective" or "nll", of the evaluation.
        early_stop: evaluations in a row without a better `best_by` after which the run ends; needs
            `eval_every`. `deepalign train` then writes what is in "best.pt" as the model.
        save_every: steps between checkpoints, one more at the end; None keeps none, but for a run
            that is interrupted.
        keep_checkpoints: how many of the newest stay.
        log_every: steps that one line of the log sums up; only then, and to save, does the loop
            wait for the device.
        progress: a line on the terminal with the step and the loss.
        report_to: trackers that get the log's numbers as well, by the names that accelerate has for
            them, separated by commas: "tensorboard" (into `output_dir`), "wandb", "trackio", ...

    Raises:
        ValueError: naming the field.
    """

    output_dir: str | Path
    objective: str | rules.Rule = "constrained"
    min_weight: float = 0.0
    temperature: float = 1.0
    kl_coef: float = 0.0
    kl_direction: str = "policy_ref"
    kl_positions: int | None = None
    beta: BetaSchedule | Schedule | float = field(default_factory=BetaSchedule)
    reference: str = "precomputed"
    reference_cache: str | Path | None = None
    reference_dtype: str = "bfloat16"
    head: str = "fused"
    position_origin: str = "content"
    train_on: str = "all"
    unknown_keys: str = "ignore"
    on_bad_record: str = "error"
    packing: bool = False
    max_batch_tokens: int | None = None
    group_by_length: bool = False
    data_cache: str | Path | None = None
    data_workers: int | None = None
    learning_rate: float = 2e-5
    lr_schedule: str = "linear"
    warmup_steps: int | None = None
    batch_size: int = 16
    gradient_accumulation_steps: int = 4
    epochs: int | None = None
    max_steps: int | None = None
    optimizer: str | Factory = "adamw"
    release_gradients: bool = False
    adam_betas: tuple[float, float] = (0.5, 0.999)
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    max_length: int | None = None
    on_too_long: str = "error"
    autocast_dtype: Any = None
    gradient_checkpointing: bool = False
    offload_activations: bool = False
    compile_layers: bool = False
    parallel: str = "auto"
    cpu_offload: bool = False
    seed: int = 0
    eval_every: int | None = None
    eval_kl: bool = False
    best_by: str = "objective"
    early_stop: int | None = None
    save_every: int | None = 100
    keep_checkpoints: int = 2
    log_every: int = 1
    progress: bool = True
    report_to: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("reference", REFERENCES),
            ("reference_dtype", CACHED_DTYPES),
            ("lr_schedule", SCHEDULES),
            ("head", HEADS),
            ("parallel", PARALLEL),
            ("best_by", BEST_BY),
            ("kl_direction", KL_DIRECTIONS),
            ("position_origin", ORIGINS),
            ("train_on", TRAIN_ON),
            ("unknown_keys", UNKNOWN_KEYS),
            ("on_bad_record", BAD_RECORDS),
            ("on_too_long", TOO_LONG),
        ):
            check.one_of(name, getattr(self, name), allowed)
        if isinstance(self.objective, str):
            check.one_of("objective", self.objective, (*OBJECTIVES, *rules.RULES))
        if isinstance(self.optimizer, str):
            check.one_of("optimizer", self.optimizer, tuple(OPTIMIZERS))
        elif not callable(self.optimizer):
            raise ValueError(f"optimizer: expected a name or a function, got {self.optimizer!r}")
        rules.objective_of(self.rule)
        for name in ("batch_size", "gradient_accumulation_steps", "keep_checkpoints", "log_every"):
            _integer(name, getattr(self, name), 1)
        for name, low in (
            *(("epochs", 1), ("max_steps", 1), ("max_length", 1), ("max_batch_tokens", 1)),
            *(("save_every", 1), ("eval_every", 1), ("warmup_steps", 0), ("data_workers", 0)),
            ("early_stop", 1),
        ):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), low)
        _integer("seed", self.seed, 0)
        check.number("learning_rate", self.learning_rate, above=0.0)
        check.number("adam_eps", self.adam_eps, above=0.0)
        check.number("weight_decay", self.weight_decay, low=0.0)
        check.number("temperature", self.temperature, above=0.0)
        self._check_loss()
        if self.max_grad_norm is not None:
            check.number("max_grad_norm", self.max_grad_norm, above=0.0)
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(
                f"epochs, max_steps: give one of the two, got {self.epochs} and {self.max_steps}"
            )
        if self.epochs is None and self.max_steps is None:
            object.__setattr__(self, "epochs", 3)
        self._check_composites()
        if self.early_stop is not None and self.eval_every is None:
            raise ValueError("early_stop: it counts evaluations; give eval_every and eval_data")
        names_of(self.report_to)
        if self.cpu_offload and self.parallel not in OFFLOADING:
            raise ValueError(
                f"cpu_offload: parallel={self.parallel!r} keeps all of the model on the device;"
                " give parallel='fsdp', also for one process"
            )
        if self.release_gradients:
            self._check_release()
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError(
                "offload_activations: without gradient_checkpointing every layer keeps about thirty"
                " times its input, some of it more than once; give both"
            )
        if self.compile_layers and self.parallel == "fsdp":
            raise ValueError("compile_layers: not known to work with parallel='fsdp'; give 'ddp'")
        if self.optimizer == "adamw_offload" and self.max_grad_norm is not None:
            raise ValueError(
                "max_grad_norm: 'adamw_offload' takes gradients to the CPU before they are clipped;"
                " give max_grad_norm=None, as in the paper"
            )

    def _check_release(self) -> None:
        """A gradient that is used at once can neither wait for others nor be scaled by them."""
        wrong = "release_gradients: a gradient is gone before the next one comes, so there is none"
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"{wrong} to add to: give gradient_accumulation_steps=1, with a larger batch_size"
                f" instead of {self.gradient_accumulation_steps} times {self.batch_size}"
            )
        if self.max_grad_norm is not None:
            raise ValueError(f"{wrong} to clip by: give max_grad_norm=None, as in the paper")
        if self.parallel == "fsdp":
            raise ValueError(f"{wrong} to exchange with other processes: FSDP shards them instead")
        if self.max_batch_tokens is not None:
            raise ValueError(
                f"{wrong} to add to: max_batch_tokens may make several forwards of a step; give"
                " batch_size and max_length"
            )

    def _check_loss(self) -> None:
        check.number("min_weight", self.min_weight, low=0.0, below=2.0 + 1e-6)
        if self.min_weight > 0 and self.objective != "surrogate":
            raise ValueError(
                "min_weight: a floor belongs to objective='surrogate', got"
                f" {self.min_weight} with {self.objective!r}"
            )
        check.number("kl_coef", self.kl_coef, low=0.0)
        if self.kl_positions is not None:
            _integer("kl_positions", self.kl_positions, 1)
            if self.kl_coef == 0:
                raise ValueError("kl_positions: says where kl_coef acts, which is 0")
        if self.eval_kl and self.reference != "precomputed":
            raise ValueError(
                f"eval_kl: a reference that runs along, {self.reference!r}, gives the divergence"
                " wherever the objective asks one; else give reference='precomputed'"
            )
        kept = self.kl_coef > 0 and self.reference == "precomputed"
        if (kept or self.eval_kl) and self.head == "logits":
            raise ValueError(
                f"{'kl_coef' if kept else 'eval_kl'}: what is kept of a reference are hidden"
                " states, which head='logits' does not see; give head='fused', or"
                " reference='frozen'"
            )
        if self.kl_coef > 0 and self.parallel == "fsdp" and self.reference in ("frozen", "model"):
            raise ValueError(
                "kl_coef: the reference's head must be whole, which it is not with parallel='fsdp'"
                f" and reference={self.reference!r}; give 'precomputed' or 'adapter_off'"
            )

    def _check_composites(self) -> None:
        betas = self.adam_betas
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"adam_betas: expected two numbers, got {betas!r}")
        for beta in betas:
            check.number("adam_betas", beta, low=0.0, below=1.0)
        object.__setattr__(self, "adam_betas", tuple(map(float, betas)))
        if not callable(self.beta):
            check.number("beta", self.beta, low=0.0)
            object.__setattr__(self, "beta", BetaSchedule.uniform(float(self.beta)))
        dtype = self.autocast_dtype
        if dtype not in (None, "bfloat16", torch.bfloat16):
            raise ValueError(f"autocast_dtype: expected None or 'bfloat16', got {dtype!r}")
        object.__setattr__(self, "autocast_dtype", None if dtype is None else torch.bfloat16)

    def beta_at(self, positions: Tensor) -> Tensor:
        """beta [...] at positions [...]."""
        return cast(Schedule, self.beta)(positions)

    @property
    def rule(self) -> str | rules.Rule:
        """`objective` as `rules.objective_of` takes it."""
        objective = self.objective
        return OBJECTIVES.get(objective, objective) if isinstance(objective, str) else objective

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return rules.objective_of(self.rule).needs_reference or self.kl_coef > 0

    @property
    def prefix_length(self) -> int:
        """Last position of the second group of positions in the log."""
        return getattr(self.beta, "prefix_length", 5)

    @property
    def encoding(self) -> Encoding:
        """How conversations become examples."""
        names = ("position_origin", "train_on", "unknown_keys", "on_bad_record")
        return Encoding(**{name: getattr(self, name) for name in names})

    @property
    def limits(self) -> Limits:
        """Of a forward."""
        return Limits(self.batch_size, self.max_batch_tokens, self.packing)

    @property
    def step_size(self) -> int:
        """Conversations in one optimizer step, of each process."""
        return self.batch_size * self.gradient_accumulation_steps

    def warmup_of(self, total_steps: int) -> int:
        """Steps of warm-up in a run of `total_steps`."""
        if self.warmup_steps is None:
            return min(PAPERS_WARMUP, total_steps // 5)
        return self.warmup_steps

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the log and the checkpoints."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        beta = self.beta
        if is_dataclass(beta) and not isinstance(beta, type):
            # Of a schedule what it goes by: its table, or all else.
            table = getattr(beta, "table", None)
            values = asdict(beta) if table is None else {"table": list(table)}
            out["beta"] = {k: v for k, v in values.items() if k != "table" or v is not None}
        else:
            out["beta"] = _name_of(beta)
        if not isinstance(self.objective, str):
            out["objective"] = _name_of(self.objective)
        if not isinstance(self.optimizer, str):
            out["optimizer"] = _name_of(self.optimizer)
        out["output_dir"] = str(self.output_dir)
        for name in ("data_cache", "reference_cache"):
            out[name] = getattr(self, name) and str(getattr(self, name))
        out["adam_betas"] = list(self.adam_betas)
        out["autocast_dtype"] = self.autocast_dtype and str(self.autocast_dtype).removeprefix(
            "torch."
        )
        return out


def _name_of(function: object) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


def _integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")
