"""The loss of one batch, for any trainer: from the rule, beta by position and the reference.

Knows a model and a batch; no step, no optimizer, no data source.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from deepalign_kernels import check, rules
from deepalign_kernels.data.columns import Anchors, Batch
from deepalign_kernels.data.examples import IGNORE
from deepalign_kernels.losses import reduce_tokens
from deepalign_kernels.ops import constrained_loss, token_kl, token_logp
from deepalign_kernels.train.ranks import is_sharded


class TokenParts(NamedTuple):
    """What a log says about the tokens [B, T], detached; 0 where nothing is trained."""

    logp: Tensor  # log-probability of the target under the policy, nats
    ref_logp: Tensor  # the same under the reference; 0 without one
    weight: Tensor  # what the token's cross-entropy gradient is multiplied by
    kl: Tensor | None  # divergence to the reference, nats, before kl_coef; None without kl_coef
    anchored: Tensor | None = None  # bool, the tokens that have a divergence


def untrained(batch: Batch) -> Batch:
    """The same rows with nothing to train: what a process computes that has no share of a batch."""
    targets = torch.full_like(batch.targets, IGNORE)
    anchors = batch.anchors and batch.anchors._replace(hidden=batch.anchors.hidden[:0])
    positions = torch.zeros_like(batch.positions)
    return replace(batch, targets=targets, positions=positions, tokens=0, anchors=anchors)


def beta_of(schedule: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    """beta [B, T] of its targets: by position, times what their example says."""
    beta = schedule(batch.positions)
    return beta if batch.beta_scale is None else beta * batch.beta_scale


class BatchObjective:
    """What is minimised: the rule's loss of each trained token, summed over a batch.

    Args:
        rule: a name or a function, see `deepalign_kernels.rules`.
        beta: positions [B, T] int -> beta [B, T] float; a rule without a reference does not ask.
        head: "fused": inside the model's own output head; "logits": from whole logits.
        autocast_dtype: of the forward; None: none.
        temperature: divides the logits of policy and reference, > 0.
        min_weight: floor of the weight, with the rule "surrogate" only.
        kl_coef: >= 0, what the divergence of each trained token over the whole vocabulary is
            multiplied by; above 0 a batch must bring `anchors` (with head="fused"), or `loss` be
            given a `ref_model`.
        kl_direction: "policy_ref", "ref_policy" or "js", as in `deepalign_kernels.token_kl`.
        kl_positions: only tokens at position 1 to this have a divergence; None: all.

    Attributes:
        needs_reference: whether a batch must bring `ref_logp`, or `loss` be given a `ref_model`.
        anchors: whether it must bring `anchors` too.

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
        temperature: float = 1.0,
        min_weight: float = 0.0,
        kl_coef: float = 0.0,
        kl_direction: str = "policy_ref",
        kl_positions: int | None = None,
    ) -> None:
        check.one_of("head", head, tuple(HEADS))
        about = rules.objective_of(rule)
        self._asks, self._exact = about.needs_reference, rule == "exact"
        self.needs_reference = about.needs_reference or kl_coef > 0
        self._beta, self._positions = beta, kl_positions
        self.anchors = kl_coef > 0
        options = {"temperature": temperature, "min_weight": min_weight}
        if kl_coef > 0:
            options |= {"kl_coef": kl_coef, "kl_direction": kl_direction}
        partly = kl_positions is not None
        self._head: FusedHead | LogitsHead = HEADS[head](autocast_dtype, rule, options, partly)

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
    ) -> tuple[Tensor, TokenParts]:
        """One micro-batch's share of the step's loss, and what a log says about its tokens.

        Args:
            model: the policy.
            batch: with `ref_logp`, if the rule needs a reference and no `ref_model` is there.
            ref_model: asked for the log-probabilities of the targets, in place of `ref_logp` and
                `anchors`.

        Returns:
            The loss, 0-d fp32: the sum over the tokens divided by `batch.normalizer`, or, where
            parts are mixed, each row's sum times its `scale`. Shares of a step add up.
        """
        beta = beta_of(self._beta, batch) if self._asks else None
        normalizer = batch.normalizer if batch.scale is None else None
        anchored = self._anchored(batch) if self.anchors else None
        loss, parts = self._head.loss(model, batch, beta, ref_model, normalizer, anchored)
        parts = parts._replace(anchored=anchored)
        return (loss if batch.scale is None else (loss * batch.scale).sum()), parts

    def reference(self, model: Any, batch: Batch) -> tuple[Tensor, Anchors | None]:
        """What a batch must bring, from the model that is the reference: (`ref_logp` [B, T] in
        nats, 0 where untrained; `anchors` with kl_coef). No gradient."""
        if not self.anchors:
            return self._head.logp(model, batch), None
        return self._head.anchors(model, batch, self._anchored(batch))

    def _anchored(self, batch: Batch) -> Tensor:
        """bool [B, T]: the tokens with a divergence."""
        trained, at = batch.targets != IGNORE, batch.positions
        if self._positions is None:
            return trained
        return trained & (at >= 1) & (at <= self._positions)

    def constant(self, batch: Batch) -> Tensor | float:
        """What is in `loss` whatever the model does, and a log leaves out: where policy and
        reference agree, equation 3 is (2 / beta) log 2 a token, and no learning takes that away.
        """
        if not self._exact:
            return 0.0
        beta = beta_of(self._beta, batch)
        each = torch.where((batch.targets != IGNORE) & (beta > 0), 2 * math.log(2) / beta, 0.0)
        if batch.scale is not None:
            return (each * batch.scale).sum()
        return each.sum() / batch.normalizer

    def logp(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-probabilities of the targets [B, T]: nats, 0 where untrained, no gradient."""
        return self._head.logp(model, batch)


class FusedHead:
    """Losses through `hf.attach`: of a batch's logits only a chunk exists at a time, and untrained
    tokens do not reach the head. `partly`: not every trained token has a divergence.

    Raises:
        ImportError: no transformers.
    """

    def __init__(
        self,
        autocast_dtype: torch.dtype | None,
        rule: str | rules.Rule = "exact",
        options: dict[str, Any] | None = None,
        partly: bool = False,
    ) -> None:
        from deepalign_kernels import hf

        self._partly = partly
        self._hf, self._dtype, self._rule = hf, autocast_dtype, rule
        self._options: dict[str, Any] = options or {}

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
        ref_model: nn.Module | None,
        normalizer: float | Tensor | None,
        anchored: Tensor | None,
    ) -> tuple[Tensor, TokenParts]:
        """The rule's loss: (sum over the tokens / normalizer, or each [B, T] where that is None;
        what the log says about the tokens). `anchored`: the tokens with a divergence."""
        reference: dict[str, Any] = {"ref_logp": batch.ref_logp}
        if anchored is not None:
            reference = self._rows(ref_model, batch, anchored)
        elif ref_model is not None:
            reference = {"ref_logp": self.logp(ref_model, batch)}
        loss = self._hf.ConstrainedLoss(
            beta=beta,
            objective=self._rule,
            **reference,
            **_reduced(normalizer),
            **self._options,
        )
        out = self._call(model, batch, loss)
        shown = out.parts.get("ref_logp", torch.zeros_like(out.logp))
        return out.loss, TokenParts(out.logp, shown, out.parts["weight"], out.parts.get("kl"))

    @torch.no_grad()
    def logp(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-probabilities of the targets [B, T] in nats, 0 where nothing is trained."""
        temperature = self._options.get("temperature", 1.0)
        return self._call(model, batch, self._hf.TokenLogp(temperature=temperature)).logp

    def anchors(self, model: Any, batch: Batch, anchored: Tensor) -> tuple[Tensor, Anchors | None]:
        """One forward of a reference: log-probabilities as `logp`, and all it says where
        `anchored`."""
        seen = self._seen(model, batch, anchored, copy_head=is_sharded(model))
        return seen.logp, Anchors(seen.rows.hidden, seen.weight, seen.bias)

    def _seen(self, ref_model: Any, batch: Batch, anchored: Tensor, **options: Any) -> Any:
        options["temperature"] = self._options.get("temperature", 1.0)
        with _autocast(batch, self._dtype):
            return self._hf.reference_pass(
                ref_model, only=anchored, logp=True, **options, **self._inputs(batch)
            )

    def _rows(self, ref_model: Any, batch: Batch, anchored: Tensor) -> dict[str, Any]:
        """The reference's last hidden states and its head, for the whole distribution of anchored
        tokens; of the others what the log, and perhaps the rule, asks for."""
        if ref_model is None:
            assert batch.anchors is not None
            hidden, weight, bias = batch.anchors
            index = anchored.flatten().nonzero().squeeze(1)
            rows, logp = self._hf.HiddenRows(hidden, index, None), batch.ref_logp
        else:
            rows, weight, bias, logp = self._seen(ref_model, batch, anchored)
            if is_sharded(ref_model):  # whole inside its own call alone; the policy's is the same
                weight = bias = None
        if not self._partly:
            logp = None
        return {"ref_rows": rows, "ref_weight": weight, "ref_bias": bias, "ref_logp": logp}

    def _call(self, model: nn.Module, batch: Batch, loss: Any) -> Any:
        with _autocast(batch, self._dtype):
            return model(**self._inputs(batch), dak_loss=loss)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        return {**batch.inputs(), "shift_labels": batch.targets}


class LogitsHead:
    """Losses from `model(input_ids=, attention_mask=).logits` [B, T, V], whole in memory: for any
    module.

    The methods are those of FusedHead.
    """

    def __init__(
        self,
        autocast_dtype: torch.dtype | None,
        rule: str | rules.Rule = "exact",
        options: dict[str, Any] | None = None,
        partly: bool = False,
    ) -> None:
        options = dict(options or {})
        self._dtype, self._rule = autocast_dtype, rule
        self._temperature = options.get("temperature", 1.0)
        self._min_weight = options.get("min_weight", 0.0)
        self._kl_coef = options.get("kl_coef", 0.0)
        self._kl_direction = options.get("kl_direction", "policy_ref")

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
        ref_model: nn.Module | None,
        normalizer: float | Tensor | None,
        anchored: Tensor | None,
    ) -> tuple[Tensor, TokenParts]:
        kl, ref_logp, ref_logits = None, batch.ref_logp, None
        if ref_model is not None:
            with torch.no_grad():
                ref_logits = self._logits(ref_model, batch)
                ref_logp = token_logp(ref_logits, batch.targets, temperature=self._temperature)
        logits, trained = self._logits(model, batch), batch.targets != IGNORE
        loss, parts = self._rule_loss(logits, batch.targets, beta, ref_logp, normalizer)
        if anchored is not None:
            assert ref_logits is not None
            kl = token_kl(
                logits,
                ref_logits,
                valid=anchored,
                direction=cast(Any, self._kl_direction),
                temperature=self._temperature,
            )
            added = kl if normalizer is None else reduce_tokens(kl, trained, normalizer=normalizer)
            loss, kl = loss + self._kl_coef * added, kl.detach()
        return loss, parts._replace(kl=kl)

    def _rule_loss(
        self,
        logits: Tensor,
        target: Tensor,
        beta: Tensor | None,
        ref_logp: Tensor | None,
        normalizer: float | Tensor | None,
    ) -> tuple[Tensor, TokenParts]:
        if self._rule in rules.KERNELS:
            options: Any = {**_reduced(normalizer), "objective": self._rule, "beta": beta}
            options |= {"temperature": self._temperature, "min_weight": self._min_weight}
            result = constrained_loss(
                logits, target, ref_logp=ref_logp, return_parts=True, **options
            )
            loss, parts = cast(tuple[Tensor, tuple[Tensor, Tensor, Tensor]], result)
            return loss, TokenParts(*parts, None)
        logp = token_logp(logits, target, temperature=self._temperature)
        trained = target != IGNORE
        name = rules.objective_of(self._rule).name
        each, weight = rules.run(name, 0.0, logp.detach(), ref_logp, beta)
        each, weight = (torch.where(trained, x, 0.0) for x in (each, weight))
        loss = rules.with_gradient(logp, each, weight)
        if normalizer is not None:
            loss = reduce_tokens(loss, trained, normalizer=normalizer)
        shown = torch.zeros_like(weight) if ref_logp is None else ref_logp
        return loss, TokenParts(logp.detach(), shown, weight, None)

    @torch.no_grad()
    def logp(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = self._logits(model, batch)
        return token_logp(logits, batch.targets, temperature=self._temperature)

    def anchors(self, model: Any, batch: Batch, anchored: Tensor) -> tuple[Tensor, Anchors | None]:
        raise NotImplementedError("hidden states are head='fused' only; TrainConfig refuses this")

    def _logits(self, model: Any, batch: Batch) -> Tensor:
        with _autocast(batch, self._dtype):
            return model(**batch.inputs()).logits


HEADS = {"fused": FusedHead, "logits": LogitsHead}


def _reduced(normalizer: float | Tensor | None) -> dict[str, Any]:
    return {"reduction": "none"} if normalizer is None else {"normalizer": normalizer}


def _autocast(batch: Batch, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(batch.input_ids.device.type, dtype=dtype, enabled=dtype is not None)
