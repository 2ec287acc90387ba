"""The last hidden states of the analysed positions under one model, and its head: all that an
analysis of predictions needs, a thousandth of the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepalign_kernels import hf
from deepalign_kernels.analyze.pairs import IGNORE, Pair, PairBatch, batches, device_of
from deepalign_kernels.modes import evaluating

Model = nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True)
class HeadWeights:
    """logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float

    def first(self, vocab: int) -> HeadWeights:
        bias = None if self.bias is None else self.bias[:vocab]
        return HeadWeights(self.weight[:vocab], bias, self.softcap, self.logit_scale)

    @property
    def options(self) -> dict[str, Any]:
        """As the linear ops take them."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def scores(self, hidden: Tensor) -> Tensor:
        """[n, V] in fp32 (fp64 for fp64): for a few rows at a time."""
        kind = torch.promote_types(self.weight.dtype, torch.float32)
        x = hidden.to(self.weight.device, kind) @ self.weight.to(kind).T
        return self.shaped(x if self.bias is None else x + self.bias.to(kind))

    def shaped(self, x: Tensor) -> Tensor:
        """The logits of what the head's matrix returns."""
        x = x * self.logit_scale
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


@dataclass(frozen=True)
class States:
    """Of all answers, one after the other: row `starts[i] + t - 1` predicts position t of answer
    i."""

    hidden: Tensor  # [N, H], on the CPU, in the model's dtype
    head: HeadWeights


class Collector:
    """A loss that takes the hidden states away and computes nothing."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.head: HeadWeights | None = None

    def __call__(self, head: hf.Head) -> hf.LossOutput:
        self.rows.append(head.hidden.detach()[head.target != IGNORE].cpu())
        if self.head is None:  # inside the call, where shards and offloaded weights are whole
            weight, bias = head.merged_weight().detach(), head.bias
            bias = None if bias is None else bias.detach()
            self.head = HeadWeights(weight, bias, head.softcap, head.logit_scale)
        return hf.LossOutput()


def call(model: nn.Module, rows: PairBatch, loss: Callable[..., Any]) -> Any:
    """The forward of an attached model on one batch."""
    device = device_of(model)
    return model(
        input_ids=rows.input_ids.to(device),
        attention_mask=rows.attention_mask.to(device),
        shift_labels=rows.targets.to(device),
        dak_loss=loss,
    )


@torch.no_grad()
def collect(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    max_tokens: int = 8192,
    step: Callable[[int], None] = lambda pairs: None,
    cached: Callable[[str, Callable[[], Tensor]], Tensor] = lambda name, make: make(),
) -> States:
    """One forward of every pair up to its last analysed position.

    Args:
        model: a Hugging Face causal LM, also one with a `device_map`, with quantised layers (the
            head itself must not be) or with adapters. In eval mode meanwhile.
        pairs: see `pairs_of`.
        max_tokens: with padding, in a batch.
        step: called with the number of pairs that each batch had.
        cached: called with the name of a batch and what makes its hidden states; may know them.

    Raises:
        ValueError: a token id that the model has no embedding for.
    """
    known = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    for i, pair in enumerate(pairs):
        if (most := max((*pair.context, *pair.answer[:-1]))) >= known:
            raise ValueError(
                f"data: {pair.where or f'example {i}'}: token id {most} is outside the {known}"
                " embeddings of the model"
            )
    parts: list[Tensor] = []
    order: list[int] = []
    keep = Collector()

    def run(rows: PairBatch) -> Tensor:
        call(model, rows, keep)
        return keep.rows.pop()

    with hf.attached(model), evaluating(model):
        for number, rows in enumerate(batches(pairs, max_tokens)):
            parts.append(cached(f"{number:05}", lambda rows=rows: run(rows)))
            order += rows.index
            step(len(rows.index))
        if keep.head is None:  # every batch was known
            run(next(batches(pairs[:1], max_tokens)))
    assert keep.head is not None
    lengths = torch.tensor([len(pairs[i].answer) for i in order])
    by_pair = dict(zip(order, torch.cat(parts).split(lengths.tolist()), strict=True))
    return States(torch.cat([by_pair[i] for i in range(len(pairs))]), keep.head)
