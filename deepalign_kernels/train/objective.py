"""The loss of one batch, for any trainer: from the rule, beta by position and the reference.

Knows a model and a batch; no step, no optimizer, no data source.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from deepalign_kernels import check, rules
from deepalign_kernels.data.columns import Batch
from deepalign_kernels.data.examples import IGNORE
from deepalign_kernels.losses import reduce_tokens
from deepalign_kernels.ops import ConstrainedParts, constrained_loss, token_logp


class BatchObjective:
    """What is minimised: the rule's loss of each trained token, summed over a batch.

    Args:
        rule: a name or a function, see `deepalign_kernels.rules`.
        beta: positions [B, T] int -> beta [B, T] float; a rule without a reference does not ask.
        head: "fused": inside the model's own output head; "logits": from whole logits.
        autocast_dtype: of the forward; None: none.

    Attributes:
        needs_reference: whether a batch must bring `ref_logp`, or `loss` be given a `ref_model`.

    Raises:
        ValueError: an unknown rule or head. ImportError: "fused" without transformers.
    """

    def __init__(
        self,
        rule: str | rules.Rule,
        beta: Callable[[Tensor], Tensor],
        *,
        head: str = "fused",
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        check.one_of("head", head, tuple(HEADS))
        self.needs_reference = rules.objective_of(rule).needs_reference
        self._beta = beta
        self._head: FusedHead | LogitsHead = HEADS[head](autocast_dtype, rule)

    def check(self, name: str, model: nn.Module) -> None:
        """Refuse a model that the head cannot work with; `name` is the argument to blame.

        Raises:
            ValueError: saying why and what to do.
        """
        self._head.check(name, model)

    def on(self, *models: nn.Module) -> contextlib.AbstractContextManager[None]:
        """In the block the models can be handed to `loss` and `logp`; then they are as before."""
        return self._head.on(*models)

    def loss(
        self, model: nn.Module, batch: Batch, ref_model: nn.Module | None = None
    ) -> tuple[Tensor, ConstrainedParts]:
        """One micro-batch's share of the step's loss, and what a log says about its tokens.

        Args:
            model: the policy.
            batch: with `ref_logp`, if the rule needs a reference and no `ref_model` is there.
            ref_model: asked for the log-probabilities of the targets, in place of `ref_logp`.

        Returns:
            The loss, 0-d fp32: the sum over the tokens divided by `batch.normalizer`, or, where
            parts are mixed, each row's sum times its `row_scale`. Shares of a step add up.
            logp, ref_logp (0 without a reference) and weight of the tokens [B, T], detached.
        """
        beta = ref_logp = None
        if self.needs_reference:
            beta = self._beta(batch.positions)
            ref_logp = batch.ref_logp if ref_model is None else self.logp(ref_model, batch)
        normalizer = batch.normalizer if batch.row_scale is None else None
        loss, parts = self._head.loss(model, batch, beta, ref_logp, normalizer)
        return (loss if batch.row_scale is None else (loss * batch.row_scale).sum()), parts

    def logp(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-probabilities of the targets [B, T]: nats, 0 where untrained, no gradient."""
        return self._head.logp(model, batch)


class FusedHead:
    """Losses through `hf.attach`: of a batch's logits only a chunk exists at a time, and untrained
    tokens do not reach the head.

    Raises:
        ImportError: no transformers.
    """

    def __init__(
        self, autocast_dtype: torch.dtype | None, rule: str | rules.Rule = "exact"
    ) -> None:
        from deepalign_kernels import hf

        self._hf, self._dtype, self._rule = hf, autocast_dtype, rule

    def check(self, name: str, model: nn.Module) -> None:
        """Refuse a model that `hf.attach` does; costs a forward of one token."""
        try:
            with self._hf.attached(model):
                pass
        except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
            raise ValueError(
                f"{name}: head='fused' runs the loss inside the model's own output head, which"
                f" {type(model).__name__} does not allow: {error}. head='logits' trains it from"
                " whole logits"
            ) from error

    @contextlib.contextmanager
    def on(self, *models: nn.Module) -> Iterator[None]:
        """In the block the models can be handed to `loss` and `logp`; then they are as before."""
        with contextlib.ExitStack() as stack:
            for model in models:
                stack.enter_context(self._hf.attached(model))
            yield

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        beta: Tensor | None,
        ref_logp: Tensor | None,
        normalizer: float | Tensor | None,
    ) -> tuple[Tensor, ConstrainedParts]:
        """The rule's loss: (sum over the tokens / normalizer, or each [B, T] where that is None;
        what the log says about the tokens [B, T])."""
        loss = self._hf.ConstrainedLoss(
            beta=beta, ref_logp=ref_logp, objective=self._rule, **_reduced(normalizer)
        )
        out = self._call(model, batch, loss)
        shown = out.parts.get("ref_logp", torch.zeros_like(out.logp))
        return out.loss, ConstrainedParts(out.logp, shown, out.parts["weight"])

    @torch.no_grad()
    def logp(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-probabilities of the targets [B, T] in nats, 0 where nothing is trained."""
        return self._call(model, batch, self._hf.TokenLogp()).logp

    def _call(self, model: nn.Module, batch: Batch, loss: Any) -> Any:
        with _autocast(batch, self._dtype):
            return model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                shift_labels=batch.targets,
                dak_loss=loss,
            )


class LogitsHead:
    """Losses from `model(input_ids=, attention_mask=).logits` [B, T, V], whole in memory: for any
    module.

    The methods are those of FusedHead.
    """

    def __init__(
        self, autocast_dtype: torch.dtype | None, rule: str | rules.Rule = "exact"
    ) -> None:
        self._dtype, self._rule = autocast_dtype, rule

    def check(self, name: str, model: nn.Module) -> None:
        """Nothing is refused before the first forward."""

    @contextlib.contextmanager
    def on(self, *models: nn.Module) -> Iterator[None]:
        """Nothing to prepare."""
        yield

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        beta: Tensor | None,
        ref_logp: Tensor | None,
        normalizer: float | Tensor | None,
    ) -> tuple[Tensor, ConstrainedParts]:
        logits, target = self._logits(model, batch), batch.targets
        if self._rule in rules.KERNELS:
            options: Any = {**_reduced(normalizer), "objective": self._rule, "beta": beta}
            result = constrained_loss(
                logits, target, ref_logp=ref_logp, return_parts=True, **options
            )
            return cast(tuple[Tensor, ConstrainedParts], result)
        logp, trained = token_logp(logits, target), target != IGNORE
        name = rules.objective_of(self._rule).name
        each, weight = rules.run(name, 0.0, logp.detach(), ref_logp, beta)
        each, weight = (torch.where(trained, x, 0.0) for x in (each, weight))
        loss = rules.attach(logp, each, weight)
        if normalizer is not None:
            loss = reduce_tokens(loss, trained, normalizer=normalizer)
        shown = torch.zeros_like(weight) if ref_logp is None else ref_logp
        return loss, ConstrainedParts(logp.detach(), shown, weight)

    @torch.no_grad()
    def logp(self, model: nn.Module, batch: Batch) -> Tensor:
        return token_logp(self._logits(model, batch), batch.targets)

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        with _autocast(batch, self._dtype):
            return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


HEADS = {"fused": FusedHead, "logits": LogitsHead}


def _reduced(normalizer: float | Tensor | None) -> dict[str, Any]:
    return {"reduction": "none"} if normalizer is None else {"normalizer": normalizer}


def _autocast(batch: Batch, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(batch.input_ids.device.type, dtype=dtype, enabled=dtype is not None)
