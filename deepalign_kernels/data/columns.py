"""Token columns: all examples of an epoch end to end, and how batches are cut from them.

Everything a step needs besides the model is decided here on the CPU, before the step: order,
padding, and how many tokens are trained. No step waits for the device to count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor

from deepalign_kernels import check
from deepalign_kernels.data.examples import IGNORE, Example

PART_WEIGHTINGS = ("tokens", "examples")


class Counts(NamedTuple):
    """What an optimizer step holds of one part."""

    examples: int
    tokens: int  # trained


@dataclass
class Batch:
    """One forward: right-padded rows [B, T]; target, position, reference are the next token's."""

    input_ids: Tensor  # int64
    attention_mask: Tensor | None  # int64; None where nothing is padded
    targets: Tensor  # int64, -100 where nothing is trained; targets[:, t] follows input_ids[:, t]
    positions: Tensor  # int32, of the targets
    normalizer: float | Tensor  # trained tokens of the whole optimizer step, all micro-batches
    tokens: int = 0  # without padding; what a log counts
    ref_logp: Tensor | None = None  # fp32, of the targets, nats
    # fp32 [B, 1]: where parts are mixed, in place of 1 / normalizer.
    row_scale: Tensor | None = None


class TokenTable:
    """Columns over the tokens of all examples, and one more slot at the end that stands for
    padding.

    Args:
        examples: at least one; each with a trained token behind its first.
        part_weights: weights of the parts in the loss; None: one mean over all tokens.
        part_weighting: what they weigh: the means over each part's "tokens", or its "examples",
            each with the sum over its tokens; then the loss is divided by the weighted mean number
            of tokens of an example, so that it stays a weighted mean over tokens.

    Raises:
        ValueError: columns of unlike length, nothing to train, a part without a weight.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        pad_id: int = 0,
        part_weights: Mapping[int, float] | None = None,
        part_weighting: str = "tokens",
    ) -> None:
        check.one_of("part_weighting", part_weighting, PART_WEIGHTINGS)
        if not examples:
            raise ValueError("data: no example")
        for index, example in enumerate(examples):
            _check_example(example, example.where or f"data: example {index}", part_weights)
        self.part_weights, self.part_weighting = part_weights, part_weighting
        self.parts = [e.part for e in examples]
        self.lengths = [len(e.input_ids) for e in examples]
        self.trained = [sum(label != IGNORE for label in e.labels[1:]) for e in examples]
        self._lengths = torch.tensor(self.lengths)
        self._starts = self._lengths.cumsum(0) - self._lengths
        self.ids = _column((e.input_ids for e in examples), pad_id)
        # The one shift: from here on every column speaks about the token that is predicted.
        self.targets = _column(([*e.labels[1:], IGNORE] for e in examples), IGNORE)
        self.positions = _column(([*e.positions[1:], 0] for e in examples), 0)
        self.ref_logp: Tensor | None = None  # fp32, as long as the others

    def __len__(self) -> int:
        return len(self.lengths)

    def content_hash(self) -> str:
        """Of what the reference has to say something about: ids, targets and where rows end."""
        digest = hashlib.blake2b(digest_size=16)
        for column in (self._lengths.int(), self.ids, self.targets):
            digest.update(column.numpy().tobytes())
        return digest.hexdigest()

    def slots(self, rows: Sequence[int]) -> Tensor:
        """Indices [len(rows), longest row] into the columns; -1, padding, behind a row's end."""
        at = torch.tensor(rows)
        reach = torch.arange(max(self.lengths[row] for row in rows))
        return torch.where(reach < self._lengths[at, None], self._starts[at, None] + reach, -1)

    def batch(
        self, rows: Sequence[int], device: torch.device, counts: Mapping[int, Counts]
    ) -> Batch:
        """The batch of these examples; `counts`: of the optimizer step, by part."""
        slots = self.slots(rows)
        tokens = sum(self.lengths[row] for row in rows)

        def send(x: Tensor) -> Tensor:
            """To the device; from pinned memory, or the copy would wait for the running step."""
            pinned = x.pin_memory() if device.type == "cuda" else x
            return pinned.to(device, non_blocking=True)

        def take(column: Tensor) -> Tensor:
            return send(column[slots])

        mask = None if tokens == slots.numel() else send((slots >= 0).long())
        scale = None
        if self.part_weights is not None:
            by_part = self._token_weights(counts)
            scale = send(torch.tensor([by_part[self.parts[row]] for row in rows])[:, None])
        return Batch(
            take(self.ids).long(),
            mask,
            take(self.targets).long(),
            take(self.positions),
            float(sum(c.tokens for c in counts.values())),
            tokens,
            None if self.ref_logp is None else take(self.ref_logp),
            scale,
        )

    def count(self, rows: Sequence[int]) -> dict[int, Counts]:
        """What these examples hold of each part."""
        out: dict[int, Counts] = {}
        for row in rows:
            examples, tokens = out.get(self.parts[row], (0, 0))
            out[self.parts[row]] = Counts(examples + 1, tokens + self.trained[row])
        return out

    def _token_weights(self, counts: Mapping[int, Counts]) -> dict[int, float]:
        """What the loss of a trained token of each part is multiplied by."""
        assert self.part_weights is not None
        if self.part_weighting == "tokens":
            return {part: self.part_weights[part] / max(c.tokens, 1) for part, c in counts.items()}
        each = {part: self.part_weights[part] / c.examples for part, c in counts.items()}
        total = sum(each[part] * c.tokens for part, c in counts.items())
        return {part: weight / (total or 1.0) for part, weight in each.items()}


def _column(rows: Iterable[Iterable[int]], padding: int) -> Tensor:
    return torch.tensor([*chain.from_iterable(rows), padding], dtype=torch.int32)


def _check_example(e: Example, where: str, part_weights: Mapping[int, float] | None) -> None:
    if not len(e.input_ids) == len(e.labels) == len(e.positions):
        lengths = f"{len(e.input_ids)}, {len(e.labels)} and {len(e.positions)}"
        raise ValueError(f"{where}: input_ids, labels and positions have lengths {lengths}")
    if all(label == IGNORE for label in islice(e.labels, 1, None)):
        raise ValueError(
            f"{where}: no token to train (the first one does not count, nothing predicts it)"
        )
    if part_weights is not None and e.part not in part_weights:
        raise ValueError(f"{where}: part {e.part} is not in part_weights {dict(part_weights)}")
