"""The pass of a reference: its last hidden states, in the place of its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from deepalign_kernels import ops
from deepalign_kernels.hf.head import IGNORE, Head
from deepalign_kernels.hf.losses import HiddenRows, LossOutput

T = TypeVar("T")


class ReferencePass(NamedTuple):
    """What `reference_pass` keeps of one forward of a reference."""

    rows: HiddenRows  # of the tokens in `only`, or of all that are trained
    weight: Tensor  # [V, H], the head that goes with the rows, detached
    bias: Tensor | None  # [V]
    logp: Tensor | None  # [B, T'] fp32, nats, of all trained tokens; None: not asked for


def hidden_rows(model: nn.Module, **batch: Any) -> HiddenRows:
    """A reference pass: the last hidden states of the trained tokens, instead of logits.

    Args:
        model: an attached model, as it is called in training (its DDP, FSDP or PEFT wrapper). For
            LoRA it is the policy itself, inside `with model.disable_adapter():`.
        batch: what the model's call takes; `labels` or `shift_labels` say which tokens are trained.

    Returns:
        HiddenRows for `TokenKL` or `ConstrainedLoss` on the same batch: N * H elements, no
        gradient.

    Raises:
        ValueError: not attached.
    """
    return _kept(model, batch, lambda head: _rows(head, head.target != IGNORE))


def reference_pass(
    model: Callable[..., Any],
    *,
    only: Tensor | None = None,
    logp: bool = False,
    temperature: float = 1.0,
    copy_head: bool = False,
    **batch: Any,
) -> ReferencePass:
    """`hidden_rows` with the head that goes with them, also where PEFT has put one in its place.

    Args:
        model: as in `hidden_rows`.
        only: bool [B, T'], the trained tokens whose rows are kept; None: all.
        logp: also give the log-probabilities of the targets, of all trained tokens.
        temperature: divides the logits of `logp`.
        copy_head: the head as tensors of their own: a sharded one is whole in this call alone.
        batch: as in `hidden_rows`.

    Raises:
        ValueError: not attached.
    """

    def look(head: Head) -> ReferencePass:
        chosen, said = head.target != IGNORE, None
        if only is not None:
            chosen = chosen & only.to(chosen.device)
        if logp:
            options = {"temperature": temperature, **head.options}
            said = ops.linear_token_logp(head.hidden, head.weight, head.target, **options)
        weight, bias = head.merged_weight().detach(), head.bias
        bias = None if bias is None else bias.detach()
        if copy_head:
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        return ReferencePass(_rows(head, chosen), weight, bias, said)

    return _kept(model, batch, look)


def _rows(head: Head, chosen: Tensor) -> HiddenRows:
    index = chosen.flatten().nonzero().squeeze(1)
    hidden = head.hidden.detach().flatten(0, 1).index_select(0, index)
    return HiddenRows(hidden, index, head.source)


def _kept(model: Callable[..., Any], batch: dict[str, Any], look: Callable[[Head], T]) -> T:
    """What `look` sees in a forward without gradient."""
    kept: list[T] = []

    def keep(head: Head) -> LossOutput:
        kept.append(look(head))
        return LossOutput()

    with torch.no_grad():
        model(**batch, dak_loss=keep)
    if not kept:
        raise ValueError("model: not attached; call dak.hf.attach(model) first")
    return kept[0]
