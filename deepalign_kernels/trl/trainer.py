"""trl's SFTTrainer, its loss replaced."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from deepalign_kernels import hf, rules
from deepalign_kernels.fingerprint import model_hash
from deepalign_kernels.hf.gathered import gathered, is_shared_out
from deepalign_kernels.hf.trainer import RARE, WeighingSteps, scaled_beta
from deepalign_kernels.modes import evaluating
from deepalign_kernels.trl.columns import (
    OURS,
    TOKENS,
    ConstrainedCollator,
    counted,
    fits,
    kept,
    spread,
    tokenized,
    truncated,
    weighted,
)
from deepalign_kernels.trl.config import ConstrainedSFTConfig
from deepalign_kernels.trl.reference import KeptReference, anchored


class ConstrainedSFTTrainer(WeighingSteps, SFTTrainer):
    """`trl.SFTTrainer` that minimises the constrained loss of arXiv 2406.05946, equation 3.

    Takes what SFTTrainer takes, with these differences. Datasets hold conversations (`messages`, or
    `prompt` and `completion`), or `input_ids`, `labels` and `response_positions` (without the last
    they are counted from the labels). Logged beside trl's metrics: `nll`, the mean negative
    log-probability of the trained tokens; `weight`, what a token's gradient is multiplied by;
    `log_ratio`, the mean of log policy - log reference, and with kl_coef `kl`, the mean divergence
    of the anchored tokens, all in nats. Weights of messages reach the loss. Data that are given to
    `evaluate` alone need a reference at every step, since the policy has moved by then.

    Args:
        model: as trl's: a model, or a name.
        args: how to train and constrain.
        positional: the further arguments of SFTTrainer, in its order.
        ref_model: the reference, with args.reference="model".
        options: the keyword arguments of SFTTrainer: train_dataset, eval_dataset, peft_config, ...

    Raises:
        ValueError: data without responses; a reference that does not fit; a cache of other weights.
    """

    _tag_names = ["trl", "sft", "deepalign-kernels"]
    args: ConstrainedSFTConfig

    def __init__(
        self,
        model: Any,
        args: ConstrainedSFTConfig | None = None,
        *positional: Any,
        ref_model: Any = None,
        **options: Any,
    ) -> None:
        args = ConstrainedSFTConfig("constrained-sft") if args is None else args
        if not isinstance(args, ConstrainedSFTConfig):
            raise ValueError(
                f"args: expected a ConstrainedSFTConfig, got a {type(args).__name__}, which cannot"
                " say how to constrain"
            )
        for name in ("compute_loss_func", "formatting_func"):
            if options.get(name) is not None:
                raise ValueError(f"{name}: not with a loss of this library's own")
        if (ref_model is not None) != (args.reference == "model" and args.needs_reference):
            raise ValueError("ref_model: belongs to reference='model', and that needs one")
        super().__init__(model, args, *positional, **options)
        if args.reference == "adapter_off" and not hasattr(self.model, "disable_adapter"):
            raise ValueError("reference: 'adapter_off' needs a PEFT model; give a peft_config")
        if isinstance(self.data_collator, DataCollatorForLanguageModeling):
            known = {
                f.name: getattr(self.data_collator, f.name) for f in fields(self.data_collator)
            }
            self.data_collator = ConstrainedCollator(**known)
        hf.attach(self.model)  # pyright: ignore[reportArgumentType]
        self.ref_model = None
        self._kept: KeptReference | None = None
        if ref_model is not None:
            self.ref_model = hf.attach(ref_model.to(self.args.device).eval().requires_grad_(False))
        if args.needs_reference and args.reference == "precomputed":
            self._take_reference()

    # ------------------------------------------------------------------ data

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Callable[..., Any] | None,
        dataset_name: str,
    ) -> Any:
        """Columns TOKENS of `dataset`, at most max_length long, packed where asked for."""
        first = next(iter(dataset))
        keys = {"num_proc": args.dataset_num_proc} if hasattr(dataset, "num_rows") else {}
        if "input_ids" not in first:
            if not {"messages", "prompt"} & set(first):
                raise ValueError(
                    f"{dataset_name} dataset: expected conversations (messages, or prompt and"
                    f" completion), got columns {sorted(first)}; plain text has no response"
                )
            how = {
                "name": dataset_name,
                "tokenizer": processing_class,
                "encoding": args.encoding,
                "weights": weighted(first),
                "scales": "beta_scale" in first,
            }
            dataset = dataset.map(
                tokenized,
                batched=True,
                with_indices=True,
                remove_columns=list(first),
                fn_kwargs=how,
                **keys,
            )
            if args.on_bad_record == "skip":
                dataset = _without_bad(dataset, dataset_name, keys)
        elif "labels" not in first:
            raise ValueError(f"{dataset_name} dataset: input_ids without labels")
        elif "response_positions" not in first:
            dataset = dataset.map(counted, **keys)
        if "input_ids" in first and "beta_scale" in first:
            dataset = dataset.map(spread, **keys)
        there = next(iter(dataset))
        if "beta_scales" in there and not rules.objective_of(args.rule).needs_beta:
            warnings.warn(
                f"{dataset_name} dataset: it has a beta_scale, and objective={args.objective!r} has"
                " no beta",
                stacklevel=3,
            )
        more = [c for c in ("ref_logp", *RARE) if c in there]
        dataset = dataset.select_columns([*TOKENS, *more])
        if args.max_length is not None:
            dataset = self._limited(dataset, args, dataset_name, keys)
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        if packing:
            if args.max_length is None:
                raise ValueError("max_length: packing needs the length of a row, got None")
            dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, keys)
        return dataset

    def _limited(self, dataset: Any, args: Any, name: str, keys: dict[str, Any]) -> Any:
        limit = args.max_length
        if args.on_too_long == "error":
            for number, row in enumerate(dataset):
                if len(row["input_ids"]) > limit:
                    raise ValueError(
                        f"{name} dataset: conversation {number} has {len(row['input_ids'])} tokens,"
                        f" over max_length={limit}; on_too_long='drop' or 'truncate' goes on"
                    )
            return dataset
        if args.on_too_long == "truncate":
            dataset = dataset.map(truncated, fn_kwargs={"limit": limit}, **keys)
        return dataset.filter(fits, fn_kwargs={"limit": limit}, **keys)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*{*(self._signature_columns or ()), *OURS}]

    # ------------------------------------------------------------------ reference

    def _take_reference(self) -> None:
        """The columns of all data, from the model as it is now: before training."""
        assert self.model is not None
        device = self.accelerator.device
        self._kept = KeptReference(self.args, model_hash(self.model), self.model, device)
        if self.train_dataset is not None:
            self.train_dataset = self._with_reference(self.train_dataset)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {k: self._with_reference(x) for k, x in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._with_reference(self.eval_dataset)

    def _with_reference(self, dataset: Any) -> Any:
        if not hasattr(dataset, "num_rows"):
            raise ValueError(
                "train_dataset: a stream cannot be gone through before training; give"
                " reference='model' or 'adapter_off', or a dataset that is not streamed"
            )
        if "ref_logp" in dataset.column_names:
            if self.args.kl_coef > 0:
                raise ValueError("train_dataset: its ref_logp says too little for kl_coef")
            return dataset
        columns = [c for c in dataset.column_names if c in (*TOKENS, "seq_lengths")]
        rows = dataset.select_columns(columns)

        def batch_of(numbers: list[int]) -> tuple[dict[str, Any], Tensor]:
            inputs: Any = self.data_collator([rows[i] for i in numbers])
            inputs = self._prepare_inputs(inputs)
            return _for_the_model(inputs), inputs["response_positions"]

        assert self.model is not None and self._kept is not None
        together = is_shared_out(self.model)  # every process has a share of it
        with (
            contextlib.nullcontext() if together else self.accelerator.main_process_first(),
            evaluating(self.model),
            self.compute_loss_context_manager(),
        ):
            return self._kept.added(dataset, batch_of, self.args.per_device_eval_batch_size)

    def _logp(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """[B, T], that of the label at each place; the first has none."""
        loss = hf.TokenLogp(temperature=self.args.temperature)
        logp = hf.compute_loss(model, loss, **_for_the_model(inputs)).logp
        assert logp is not None
        return torch.nn.functional.pad(logp, (1, 0))

    def _live(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """The reference's arguments of the loss, from a forward of now."""
        reference, off = self.ref_model, contextlib.nullcontext()
        if reference is None:
            reference, off = model, self.accelerator.unwrap_model(model).disable_adapter()
        only = anchored(self.args, inputs["labels"], inputs["response_positions"])
        # A second model in shares is in nobody's care; the policy is in DeepSpeed's.
        with torch.no_grad(), off, evaluating(reference), gathered(reference):
            if self.args.kl_coef == 0:
                return {"ref_logp": self._logp(reference, inputs)}
            temperature = self.args.temperature
            rows, weight, bias, logp = hf.reference_pass(
                reference,
                only=only,
                logp=True,
                temperature=temperature,
                copy_head=is_shared_out(reference),
                **_for_the_model(inputs),
            )
        return {"ref_rows": rows, "ref_weight": weight, "ref_bias": bias, **self._others(logp)}

    def _others(self, logp: Tensor | None) -> dict[str, Any]:
        """Of tokens without a row, if there are any."""
        return {} if self.args.kl_positions is None else {"ref_logp": logp}

    def _read(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The reference's arguments of the loss, from what was kept."""
        if "ref_logp" not in inputs:
            raise ValueError(
                "eval_dataset: data that come after training has begun have no reference; give"
                " them to the trainer at the start, or reference='adapter_off' or 'model'"
            )
        if self.args.kl_coef == 0:
            return {"ref_logp": inputs["ref_logp"]}
        assert self._kept is not None
        hidden, weight, bias = self._kept.take(inputs["ref_row"].tolist())
        chosen = anchored(self.args, inputs["labels"], inputs["response_positions"])
        rows = hf.HiddenRows(hidden, chosen.flatten().nonzero().squeeze(1), None)
        more = self._others(inputs["ref_logp"])
        return {"ref_rows": rows, "ref_weight": weight, "ref_bias": bias, **more}

    # ------------------------------------------------------------------ loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        args = self.args
        options: dict[str, Any] = {"objective": args.rule, "temperature": args.temperature}
        if args.objective == "surrogate":
            options["min_weight"] = args.min_weight
        if args.kl_coef > 0:
            options |= {"kl_coef": args.kl_coef, "kl_direction": args.kl_direction}
        if args.needs_reference:
            live = args.reference != "precomputed"
            options |= self._live(model, inputs) if live else self._read(inputs)
        if rules.objective_of(args.rule).needs_reference:
            options["beta"] = scaled_beta(inputs, args.beta)
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        out = hf.compute_loss(
            model,
            hf.ConstrainedLoss(**options, weights=inputs.get("token_weights")),
            **_for_the_model(inputs),
            num_items_in_batch=num_items_in_batch,
        )
        loss = out.loss
        assert loss is not None
        if args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled and out.aux_loss is not None:
            steps = (
                self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            )
            loss = loss + self.router_aux_loss_coef * out.aux_loss / steps
        self._record(inputs, out)
        if return_outputs:
            with torch.no_grad():
                return loss, model(**_for_the_model(inputs))
        return loss

    def _record(self, inputs: dict[str, Any], out: hf.LossOutput) -> None:
        assert self.model is not None and out.mask is not None and out.logp is not None
        mode, parts, seen = "train" if self.model.training else "eval", out.parts or {}, out.mask
        sums = [seen.sum(), -out.logp.detach().sum(), parts["weight"].sum()]
        names = ["nll", "weight"]
        if "log_ratio" in parts:
            names.append("log_ratio")
            sums.append(parts["log_ratio"].detach().sum())
        if "kl" in parts:
            names += ["kl", "anchored"]
            at = inputs["response_positions"]
            sums += [parts["kl"].sum(), anchored(self.args, inputs["labels"], at).sum()]
        if mode == "train":
            mask = inputs.get("attention_mask")
            sums.append(
                torch.as_tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
            )
        mine = torch.stack([x.double().to(out.logp.device) for x in sums])[None]
        gathered = torch.as_tensor(self.accelerator.gather_for_metrics(mine)).sum(0)
        count = max(gathered[0].item(), 1.0)
        means = dict(zip(names, (gathered[1:] / count).tolist(), strict=False))
        if "kl" in means:  # per token that has one
            means["kl"] /= means.pop("anchored") or 1.0
        for name, mean in means.items():
            self._metrics[mode][name].append(mean)
        if mode == "train":
            self._total_train_tokens += int(gathered[-1].item()) // (self._tp_size or 1)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


def _for_the_model(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k not in OURS} | {"use_cache": False}


def _without_bad(dataset: Any, name: str, keys: dict[str, Any]) -> Any:
    """Without the records of which nothing can be trained; of a stream silently."""
    if not hasattr(dataset, "num_rows"):
        return dataset.filter(kept)
    why = [line for line in dataset["why"] if line]
    if not why:
        return dataset
    if len(why) == dataset.num_rows:
        raise ValueError(f"{name} dataset: none of its records can be trained; the first: {why[0]}")
    warnings.warn(
        f"{name} dataset: {len(why)} records are left out (on_bad_record='skip'); the first:"
        f" {why[0]}",
        stacklevel=4,
    )
    return dataset.filter(kept, **keys)
