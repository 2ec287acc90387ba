"""trl's SFTTrainer, its loss replaced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl import SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from deepalign_kernels import hf, rules
from deepalign_kernels.fingerprint import model_hash
from deepalign_kernels.modes import evaluating
from deepalign_kernels.trl.columns import (
    COLUMNS,
    TOKENS,
    ConstrainedCollator,
    counted,
    fits,
    hashed,
    tokenized,
    truncated,
)
from deepalign_kernels.trl.config import ConstrainedSFTConfig


class ConstrainedSFTTrainer(SFTTrainer):
    """`trl.SFTTrainer` that minimises the constrained loss of arXiv 2406.05946, equation 3.

    Takes what SFTTrainer takes, with these differences. Datasets hold conversations (`messages`, or
    `prompt` and `completion`), or `input_ids`, `labels` and `response_positions` (without the last
    they are counted from the labels). Logged beside trl's metrics: `nll`, the mean negative
    log-probability of the trained tokens; `weight`, what a token's gradient is multiplied by; and
    `log_ratio`, the mean of log policy - log reference, all in nats. Data that are given to
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
            chosen = {"position_origin": args.position_origin, "train_on": args.train_on}
            dataset = dataset.map(
                tokenized,
                batched=True,
                remove_columns=list(first),
                fn_kwargs={"tokenizer": processing_class, "options": chosen},
                **keys,
            )
        elif "labels" not in first:
            raise ValueError(f"{dataset_name} dataset: input_ids without labels")
        elif "response_positions" not in first:
            dataset = dataset.map(counted, **keys)
        dataset = dataset.select_columns([*TOKENS, *(c for c in ("ref_logp",) if c in first)])
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
        self._signature_columns = [*{*(self._signature_columns or ()), *COLUMNS}]

    # ------------------------------------------------------------------ reference

    def _take_reference(self) -> None:
        """The column ref_logp of all data, from the model as it is now: before training."""
        digest = model_hash(self.model)  # pyright: ignore[reportArgumentType]
        if self.train_dataset is not None:
            self.train_dataset = self._with_reference(self.train_dataset, digest)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {
                k: self._with_reference(x, digest) for k, x in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = self._with_reference(self.eval_dataset, digest)

    def _with_reference(self, dataset: Any, model: str) -> Any:
        if not hasattr(dataset, "num_rows"):
            raise ValueError(
                "train_dataset: a stream cannot be gone through before training; give"
                " reference='model' or 'adapter_off', or a dataset that is not streamed"
            )
        if "ref_logp" in dataset.column_names:
            return dataset
        data = hashed(dataset, self.args.temperature)
        file = Path(self.args.output_dir or ".") / f"reference-{data}.npz"
        with self.accelerator.main_process_first():
            if file.exists():
                with np.load(file) as saved:
                    if str(saved["model"]) != model:
                        raise ValueError(
                            f"model: {file} holds the reference of these data under other weights."
                            " A run that goes on must start from the model it began with (its"
                            " checkpoint is loaded by train(resume_from_checkpoint=...)); for a new"
                            " reference remove the file"
                        )
                    flat = saved["ref_logp"]
            else:
                flat = self._reference_of(dataset)
                file.parent.mkdir(parents=True, exist_ok=True)
                part = file.with_suffix(".part.npz")
                np.savez(part, ref_logp=flat, model=np.array(model))
                part.replace(file)
        ends = np.cumsum([len(ids) for ids in dataset["input_ids"]])[:-1]
        return dataset.add_column("ref_logp", [row.tolist() for row in np.split(flat, ends)])

    @torch.no_grad()
    def _reference_of(self, dataset: Any) -> np.ndarray:
        """Log-probabilities [tokens of all rows] fp32 of the labels, nats; 0 where untrained."""
        columns = [c for c in dataset.column_names if c in ("input_ids", "labels", "seq_lengths")]
        rows, model, out = dataset.select_columns(columns), self.model, []
        size = self.args.per_device_eval_batch_size
        assert model is not None
        with evaluating(model), self.compute_loss_context_manager():
            for at in range(0, len(rows), size):
                few = [rows[i] for i in range(at, min(at + size, len(rows)))]
                inputs: Any = self._prepare_inputs(self.data_collator(few))
                logp = self._logp(model, inputs).float().cpu().numpy()
                lengths = [len(row["input_ids"]) for row in few]
                if self.padding_free:
                    out.append(logp[0, : sum(lengths)])
                else:
                    out += [row[:n] for row, n in zip(logp, lengths, strict=True)]
        return np.concatenate(out)

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
        with torch.no_grad(), off, evaluating(reference):
            if self.args.kl_coef == 0:
                return {"ref_logp": self._logp(reference, inputs)}
            rows = hf.hidden_rows(reference, **_for_the_model(inputs))
        head = self.accelerator.unwrap_model(reference).get_output_embeddings()
        bias = getattr(head, "bias", None)
        return {"ref_rows": rows, "ref_weight": head.weight, "ref_bias": bias}

    # ------------------------------------------------------------------ loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        args, positions = self.args, inputs["response_positions"]
        options: dict[str, Any] = {"objective": args.rule, "temperature": args.temperature}
        if args.objective == "surrogate":
            options["min_weight"] = args.min_weight
        if args.kl_coef > 0:
            options |= {"kl_coef": args.kl_coef, "kl_direction": args.kl_direction}
        if args.needs_reference:
            if args.reference != "precomputed":
                options |= self._live(model, inputs)
            elif "ref_logp" not in inputs:
                raise ValueError(
                    "eval_dataset: data that come after training has begun have no reference; give"
                    " them to the trainer at the start, or reference='adapter_off' or 'model'"
                )
            else:
                options["ref_logp"] = inputs["ref_logp"]
        if rules.objective_of(args.rule).needs_reference:
            options["beta"] = args.beta(positions)
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        out = hf.compute_loss(
            model,
            hf.ConstrainedLoss(**options),
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
        if mode == "train":
            mask = inputs.get("attention_mask")
            sums.append(
                torch.as_tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
            )
        mine = torch.stack([x.double().to(out.logp.device) for x in sums])[None]
        gathered = torch.as_tensor(self.accelerator.gather_for_metrics(mine)).sum(0)
        count = max(gathered[0].item(), 1.0)
        for name, total in zip(names, gathered[1:].tolist(), strict=False):
            self._metrics[mode][name].append(total / count)
        if mode == "train":
            self._total_train_tokens += int(gathered[-1].item()) // (self._tp_size or 1)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


def _for_the_model(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k not in COLUMNS} | {"use_cache": False}
