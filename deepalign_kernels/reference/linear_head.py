"""Specification of the head in the linear ops: scores from hidden states, and the chain rule back.

Shapes: hidden [N, H], weight [V, H], bias [V], lora_a [r, H], lora_b [V, r]; s = lora_scale.

    logits   x  = hidden @ weight.T + s (hidden @ lora_a.T) @ lora_b.T + bias
    scores   z  = softcap tanh(logit_scale x / softcap) / temperature

The ops of the logits level compute z from x with their own softcap c and temperature t. With
c = softcap / logit_scale and t = temperature / logit_scale that is the z above, so the scale costs
nothing. Given g = d loss / d x [N, V]:

    d hidden = g @ weight + s (g @ lora_b) @ lora_a         d bias   = sum_n g
    d weight = g.T @ hidden                                 d lora_b = s g.T @ (hidden @ lora_a.T)
                                                            d lora_a = s (g @ lora_b).T @ hidden

d lora_a and d lora_b need no V x H intermediate. Rows that are ignored have g = 0, so dropping them
before the products changes nothing; a value in such a row is 0.
Each linear op is an op of the logits level on these logits: that file is its specification.
The engine, `ops/linear/engine.py`, does the same over chunks of rows; these functions are its
oracle.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class HeadGradients(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    lora_a: Tensor | None
    lora_b: Tensor | None


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
) -> Tensor:
    """[N, V] logits x, before softcap, scale and temperature."""
    logits = hidden @ weight.t()
    if lora_a is not None and lora_b is not None:
        logits = logits + lora_scale * (hidden @ lora_a.t()) @ lora_b.t()
    return logits if bias is None else logits + bias


def head_gradients(
    grad_logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
) -> HeadGradients:
    """The chain rule above, for grad_logits [N, V]."""
    grad_hidden, grad_a, grad_b = grad_logits @ weight, None, None
    if lora_a is not None and lora_b is not None:
        low = lora_scale * grad_logits @ lora_b
        grad_hidden = grad_hidden + low @ lora_a
        grad_a = low.t() @ hidden
        grad_b = lora_scale * grad_logits.t() @ (hidden @ lora_a.t())
    weight_bias = grad_logits.t() @ hidden, torch.sum(grad_logits, 0)
    return HeadGradients(grad_hidden, *weight_bias, grad_a, grad_b)
