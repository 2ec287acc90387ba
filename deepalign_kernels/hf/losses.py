"""The losses that can run inside a head, and what they hand back.

A loss is any callable that takes a `Head` and returns a `LossOutput`, or a 0-d tensor, the loss.
Those below are plain classes on purpose: FSDP casts the tensors it finds in lists, dicts and
dataclasses to the compute dtype, and a reference log-prob in bf16 is off by up to 2^-9 of itself.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepalign_kernels import check, ops, rules
from deepalign_kernels.hf.head import IGNORE, Head, gathered
from deepalign_kernels.losses import reduce_tokens

try:
    from transformers.utils import ModelOutput
except ImportError as error:
    raise ImportError(
        'deepalign_kernels.hf needs transformers: pip install "deepalign_kernels[train]"'
    ) from error


@dataclass
class LossOutput(ModelOutput):
    """What a call with `dak_loss` returns. T' is T - 1 for `labels` [B, T], T for shift_labels."""

    loss: Tensor | None = None  # 0-d, or [B, T'] from reduction="none"; nats
    logp: Tensor | None = None  # [B, T'] fp32 log-prob of each target, 0 where not trained; nats
    mask: Tensor | None = None  # [B, T'] bool, the trained positions
    parts: dict[str, Tensor] | None = None  # by-products by name
    aux_loss: Tensor | None = None  # a mixture of experts' own, as the model gives it; not in loss


class HiddenRows(NamedTuple):
    """The last hidden states of a batch's trained tokens under one model (see `hidden_rows`)."""

    hidden: Tensor  # [N, H], detached
    index: Tensor  # [N] int64, their places in the flattened [B * T'] targets
    source: object  # which attached model they come from; None: from a file


class MustRun:
    """A loss that warns when it is thrown away without having run: the model ignored it."""

    ran = True  # until __init__ has come to its end

    def __del__(self) -> None:
        if not self.ran and not sys.is_finalizing():
            warnings.warn(
                f"a {type(self).__name__} was made and never run. If a model was called with it,"
                " the model ignored it and trained plain cross-entropy: attach it"
                " (dak.hf.attach), check the keyword (dak_loss=) or the way the loss was put on"
                " the model (dak.hf.install). dak.hf.compute_loss raises in that case",
                RuntimeWarning,
                stacklevel=2,
            )


class TokenLogp(MustRun):
    """Log-probs of the labels. `logp` carries gradient, so any loss can follow outside.

    Args:
        temperature: divides the logits, > 0.
        normalizer: what the summed loss is divided by (a number, or a 0-d tensor); default:
            `num_items_in_batch` of the call, else the number of trained tokens here.
        options: passed on to `dak.linear_token_logp` (max_workspace_bytes, compact, ...).

    Result: loss, the mean negative log-prob; logp. Both with gradient.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        normalizer: float | Tensor | None = None,
        **options: Any,
    ):
        self.normalizer = normalizer
        self.options = {"temperature": temperature, **options}
        self.ran = False

    def __call__(self, head: Head) -> LossOutput:
        self.ran = True
        options = {**head.options, **self.options}
        logp = ops.linear_token_logp(head.hidden, head.weight, head.target, **options)
        divisor = _normalizer(self.normalizer, head)
        loss = reduce_tokens(-logp, head.target != IGNORE, normalizer=divisor)
        return LossOutput(loss=loss, logp=logp)


class ConstrainedLoss(MustRun):
    """`dak.linear_constrained_loss` in the head: the loss of arXiv 2406.05946, equation 3.

    Exactly one reference must be given, except to an `objective` that needs none: ref_logp or
    ref_rows, or both where only some of the trained tokens have a row. Then those alone have a
    divergence, and ref_logp speaks about the others. Per-token tensors come in the shape of
    `labels` [B, T], and are shifted like them, or in that of `LossOutput.logp`.

    Args:
        beta: >= 0; a number or a per-token float tensor, such as
            `BetaSchedule()(response_positions(labels))`. None for an objective that needs none.
        ref_logp: per-token float tensor, log-probs of the labels under the reference, in nats.
        ref_rows: the reference's hidden states, from `hidden_rows` on the same batch; needed for
            the option kl_coef.
        ref_weight: [V, H], the reference's head, with `ref_rows`. None: policy and reference are
            one model (without its adapters for the reference) with one frozen head.
        ref_bias: [V], that of the reference's head.
        objective: "exact", "surrogate", another rule by name, or a function of (logp, ref_logp,
            beta): see `deepalign_kernels.rules`.
        reduction: "mean", "sum" or "none", as in `dak.constrained_loss`.
        normalizer: for "mean", as in `TokenLogp`.
        weights: per-token float tensor >= 0, what each token's loss is multiplied by; "mean" is
            then over them, divided by their sum over the trained tokens unless a normalizer or
            num_items_in_batch says otherwise. None: 1 for each.
        options: passed on to `dak.linear_constrained_loss` (temperature, min_weight, kl_coef,
            kl_direction, max_workspace_bytes, ...).

    Result: loss, with gradient; logp; parts "weight" (what each token's cross-entropy gradient is
    multiplied by, 0 to 2 for the paper's) and, with a reference, "ref_logp" and "log_ratio"
    (log policy - log reference) and, with kl_coef, "kl". All [B, T'].

    Raises:
        ValueError: no reference or two, a tensor of another shape, a trained head without
            ref_weight.
    """

    def __init__(
        self,
        *,
        beta: float | Tensor | None = None,
        ref_logp: Tensor | None = None,
        ref_rows: HiddenRows | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        objective: str | rules.Rule = "exact",
        reduction: str = "mean",
        normalizer: float | Tensor | None = None,
        weights: Tensor | None = None,
        **options: Any,
    ):
        given = ref_logp is not None or ref_rows is not None
        if not given and rules.objective_of(objective).needs_reference:
            raise ValueError("ref_logp, ref_rows: expected one of the two, got neither")
        options["objective"] = objective
        self.beta, self.ref_logp, self.ref_rows = beta, ref_logp, ref_rows
        self.ref_weight, self.ref_bias = ref_weight, ref_bias
        self.normalizer, self.options = normalizer, {"reduction": reduction, **options}
        self.weights, self.ran = weights, False

    def __call__(self, head: Head) -> LossOutput:
        self.ran = True
        if self.weights is None:
            return self._of(head, self.options["reduction"])
        out, reduction = self._of(head, "none"), self.options["reduction"]
        weights = head.align("weights", self.weights).float() * (head.target != IGNORE)
        assert out.loss is not None
        loss = out.loss * weights
        if reduction == "mean":
            divisor = _normalizer(self.normalizer, head)
            loss = loss.sum() / (weights.sum().clamp(min=1e-9) if divisor is None else divisor)
        elif reduction == "sum":
            loss = loss.sum()
        return LossOutput(loss=loss, logp=out.logp, parts=out.parts)

    def _of(self, head: Head, reduction: str) -> LossOutput:
        """The loss without weights."""
        options = {**head.options, **self.options, "return_parts": True, "reduction": reduction}
        options["normalizer"] = _normalizer(self.normalizer, head, reduction)
        beta = None if self.beta is None else head.align("beta", self.beta)
        if (rows := self.ref_rows) is None:
            if self.ref_logp is not None:
                options["ref_logp"] = head.align("ref_logp", self.ref_logp)
            options["beta"] = beta
            return _constrained_output(
                ops.linear_constrained_loss(head.hidden, head.weight, head.target, **options)
            )

        others = None if self.ref_logp is None else self._others(head, rows, beta, options)
        options.update(_reference(head, rows, self.ref_weight, self.ref_bias, others is None))
        if isinstance(beta, Tensor) and beta.dim():
            beta = _take(beta, rows)
        hidden, target = _take(head.hidden, rows), _take(head.target, rows)
        result = ops.linear_constrained_loss(hidden, head.weight, target, beta=beta, **options)
        own = _constrained_output(result, lambda x: _put(x, rows, head.target))
        return own if others is None else _added(own, others)

    def _others(self, head: Head, rows: HiddenRows, beta: Any, options: dict[str, Any]) -> Any:
        """The loss of the trained tokens without a row, which have no divergence."""
        target = head.target.flatten().index_fill(0, rows.index, IGNORE).view(head.target.shape)
        more = {name: x for name, x in options.items() if not name.startswith(("kl_", "js_"))}
        if more["normalizer"] is None and more["reduction"] == "mean":
            count = (head.target != IGNORE).sum().clamp(min=1)
            more["normalizer"] = options["normalizer"] = count
        more["ref_logp"] = head.align("ref_logp", self.ref_logp)
        return _constrained_output(
            ops.linear_constrained_loss(head.hidden, head.weight, target, beta=beta, **more)
        )


class TokenKL(MustRun):
    """`dak.linear_token_kl` in the head: full-vocabulary KL to a reference, per trained token.

    Args:
        ref_rows: the reference's hidden states, from `hidden_rows` on the same batch.
        ref_weight: [V, H], the reference's head. None: policy and reference are one model (without
            its adapters for the reference) with one frozen head, then read once for both.
        ref_bias: [V], of the reference's head.
        direction: "policy_ref", "ref_policy" or "js", as in `dak.token_kl`.
        js_beta: weight of the reference in the mixture, as in `dak.token_kl`.
        reduction: "mean" over the trained tokens, "sum", or "none": loss [B, T'], 0 where not
            trained.
        normalizer: for "mean", as in `TokenLogp`.
        options: passed on to `dak.linear_token_kl` (temperature, max_workspace_bytes, ...).

    Result: loss, with gradient.

    Raises:
        ValueError: without a ref_weight, rows of another model or a head that is trained.
    """

    def __init__(
        self,
        ref_rows: HiddenRows,
        *,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        direction: str = "policy_ref",
        js_beta: float = 0.5,
        reduction: str = "mean",
        normalizer: float | Tensor | None = None,
        **options: Any,
    ):
        self.ref_rows, self.ref_weight, self.ref_bias = ref_rows, ref_weight, ref_bias
        named = {"direction": direction, "js_beta": js_beta, "reduction": reduction}
        self.normalizer, self.options = normalizer, {**named, **options}
        self.ran = False

    def __call__(self, head: Head) -> LossOutput:
        self.ran = True
        rows, options = self.ref_rows, {**head.options, **self.options}
        options["normalizer"] = _normalizer(self.normalizer, head, options["reduction"])
        options.update(_reference(head, rows, self.ref_weight, self.ref_bias))
        loss = ops.linear_token_kl(_take(head.hidden, rows), head.weight, **options)
        return LossOutput(loss=_put(loss, rows, head.target) if loss.dim() else loss)


def run_loss(loss: Callable[[Head], LossOutput | Tensor], head: Head) -> LossOutput:
    """loss(head) as a LossOutput; TypeError if it is none."""
    out = loss(head)
    if isinstance(out, Tensor) and out.dim() == 0:
        out = LossOutput(loss=out)
    if not isinstance(out, LossOutput):
        raise TypeError(
            "dak_loss: expected it to return a LossOutput or a 0-d tensor, got"
            f" {check.describe(out)}"
        )
    return out


def _constrained_output(result: Any, place: Callable[[Tensor], Tensor] = lambda x: x) -> LossOutput:
    """From (loss, parts) of `linear_constrained_loss`; `place` shapes what is per token."""
    loss, parts = result
    named = {name: place(x) for name, x in parts._asdict().items() if x is not None}
    logp = named.pop("logp")
    if "ref_logp" in named:
        named["log_ratio"] = logp - named["ref_logp"]
    return LossOutput(loss=place(loss) if loss.dim() else loss, logp=logp, parts=named)


def _added(a: LossOutput, b: LossOutput) -> LossOutput:
    """Of two losses that share no token."""

    def both(x: Tensor | None, y: Tensor | None) -> Any:
        return x if y is None else y if x is None else x + y

    x, y = a.parts or {}, b.parts or {}
    parts = {name: both(x.get(name), y.get(name)) for name in {**x, **y}}
    return LossOutput(loss=both(a.loss, b.loss), logp=both(a.logp, b.logp), parts=parts)


def _normalizer(
    own: float | Tensor | None, head: Head, reduction: str = "mean"
) -> float | Tensor | None:
    call = head.num_items_in_batch if reduction == "mean" else None
    divisor = call if own is None else own
    return divisor.to(head.hidden.device) if isinstance(divisor, Tensor) else divisor


def _reference(
    head: Head, rows: HiddenRows, weight: Tensor | None, bias: Tensor | None, all_rows: bool = True
) -> dict[str, Any]:
    """The reference's arguments for a linear op. All rows count, so the op need not pick them."""
    if all_rows and check.checking():
        index = (head.target != IGNORE).flatten().nonzero().squeeze(1)
        if not torch.equal(rows.index, index):
            raise ValueError("ref_rows: taken from a batch with other labels")
    if weight is not None:
        gathered("ref_weight", weight)
        vocab = head.weight.shape[0]
        weight = weight.detach()[:vocab].to(rows.hidden)
        bias = None if bias is None else bias.detach()[:vocab].to(weight.device)
    elif rows.source is not head.source:
        raise ValueError(
            "ref_weight: the rows come from another model; pass its head as well,"
            " ref_weight=ref.get_output_embeddings().weight"
        )
    elif not head.frozen:
        raise ValueError(
            "ref_weight: the policy's head is trained, so the reference needs its own: a detached"
            " clone from before training (modules_to_save: the wrapper's original_module.weight)"
        )
    else:
        weight, bias = head.weight, head.bias
    return {
        "ref_hidden": rows.hidden.to(weight.device),
        "ref_weight": weight,
        "ref_bias": bias,
        "compact": False,
    }


def _take(x: Tensor, rows: HiddenRows) -> Tensor:
    """[B, T', ...] -> [N, ...], the trained tokens."""
    return x.flatten(0, 1).index_select(0, rows.index)


def _put(values: Tensor, rows: HiddenRows, target: Tensor) -> Tensor:
    """[N] -> [B, T'], 0 where nothing is trained."""
    return values.new_zeros(target.numel()).index_copy(0, rows.index, values).view(target.shape)
