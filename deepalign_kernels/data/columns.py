"""Token columns: all examples of an epoch end to end, and how batches are cut from them.

Everything a step needs besides the model is decided here on the CPU, before the step: order,
padding or packing, and what each token weighs. No step waits for the device to count.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from deepalign_kernels import check
from deepalign_kernels.data.examples import IGNORE, Example
from deepalign_kernels.data.store import ColumnFile, Watched, mapped

PART_WEIGHTINGS = ("tokens", "examples")
UNTRAINED = -1
# Per token: its id, and of the next token the position, or that it is not trained. Columns that few
# data need: the next token's label where it is not simply that token, and its weight.
DTYPES: dict[str, Any] = {"ids": np.int32, "marks": np.int32}
RARE: dict[str, Any] = {"labels": np.int32, "weights": np.float32}
PER_ROW = {"lengths": "i", "trained": "i", "parts": "b", "beta_scales": "f"}


class Counts(NamedTuple):
    """What an optimizer step holds of one part."""

    examples: int
    tokens: int  # trained
    weight: float  # of these tokens in all


class Anchors(NamedTuple):
    """What the reference says about the whole vocabulary, at some trained tokens of a batch."""

    hidden: Tensor  # [N, R], its last hidden states, in the order of the flattened batch
    weight: Tensor  # [V, R], its output head
    bias: Tensor | None  # [V]


class AnchorsOf(Protocol):
    """Where a table gets them from."""

    def take(self, rows: Sequence[int], device: torch.device) -> Anchors:
        """Those of these examples, one example after the other."""
        ...


@dataclass
class Batch:
    """One forward: rows [B, T], right-padded, or packed one behind the other into a single one;
    target, position, reference are the next token's."""

    input_ids: Tensor  # int64
    attention_mask: Tensor | None  # int64; None where nothing is padded
    targets: Tensor  # int64, -100 where nothing is trained; targets[:, t] follows input_ids[:, t]
    positions: Tensor  # int32, of the targets
    normalizer: float | Tensor  # weight of the trained tokens of the whole optimizer step
    tokens: int = 0  # without padding; what a log counts
    ref_logp: Tensor | None = None  # fp32, of the targets, nats
    anchors: Anchors | None = None
    # fp32 [B, T] or [B, 1]: where tokens weigh differently, in place of 1 / normalizer.
    scale: Tensor | None = None
    position_ids: Tensor | None = None  # int64, where packed: each row's count from 0
    beta_scale: Tensor | None = None  # fp32 [B, 1], packed [1, T]: times beta; None: 1

    def inputs(self) -> dict[str, Tensor | None]:
        """What the model's forward takes."""
        out = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return out if self.position_ids is None else {**out, "position_ids": self.position_ids}


class TokenTable:
    """Columns over the tokens of all examples, and one more slot at the end that stands for
    padding; in files, 8 bytes a token.

    Args:
        examples: at least one; each with a trained token behind its first.
        pad_id: token id of padding.
        part_weights: weights of the parts in the loss; None: one mean over all tokens.
        part_weighting: what they weigh: the means over each part's "tokens", or its "examples",
            each with the sum over its tokens; then the loss is divided by the weighted mean number
            of tokens of an example, so that it stays a weighted mean over tokens.
        folder: where the files are to stay; None: they go with the table.

    Attributes:
        lengths, trained, parts, beta_scales: of each example its tokens, those that are trained,
            its part, and what its beta is multiplied by.

    Raises:
        ValueError: columns of unlike length, nothing to train, a part without a weight.
    """

    _files: Sequence[Watched] = ()  # those that others can reach

    def __init__(
        self,
        examples: Iterable[Example],
        pad_id: int = 0,
        part_weights: Mapping[int, float] | None = None,
        part_weighting: str = "tokens",
        folder: Path | None = None,
    ) -> None:
        check.one_of("part_weighting", part_weighting, PART_WEIGHTINGS)
        self.part_weights, self.part_weighting = part_weights, part_weighting
        self.lengths, self.trained, self.parts, self.beta_scales = map(array, PER_ROW.values())
        writer = _Writer(folder)
        for index, example in enumerate(examples):
            _check_example(example, example.where or f"data: example {index}", part_weights)
            self._add(writer, example)
        if not len(self):
            raise ValueError("data: no example")
        writer.add([pad_id], [UNTRAINED])
        self._open({name: file.mapped() for name, file in writer.files.items()})
        if folder is not None:
            self._files = [Watched(folder / f"{name}.bin") for name in writer.files]
            self._save_rows(folder)

    @classmethod
    def load(cls, folder: Path) -> TokenTable:
        """The table that was written to `folder`, without parts.

        Raises:
            ValueError: files are missing, or not as they were written.
        """
        self = cls.__new__(cls)
        self.part_weights, self.part_weighting = None, "tokens"
        try:
            about = json.loads((folder / "rows.json").read_text())
            for name, code in PER_ROW.items():
                values = array(code)
                values.frombytes((folder / f"{name}.bin").read_bytes())
                setattr(self, name, values)
            kinds = {name: {**DTYPES, **RARE}[name] for name in about["columns"]}
            self._files = [Watched(folder / f"{name}.bin") for name in kinds]
            self._open({n: mapped(folder / f"{n}.bin", kind) for n, kind in kinds.items()})
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder}: not readable: {error}") from error
        if self.content_hash() != about["content_hash"]:
            raise ValueError(f"{folder}: not as it was written")
        return self

    def _save_rows(self, folder: Path) -> None:
        for name in PER_ROW:
            (folder / f"{name}.bin").write_bytes(getattr(self, name).tobytes())
        about = {"columns": [*self._columns], "content_hash": self.content_hash()}
        (folder / "rows.json").write_text(json.dumps(about))

    def _add(self, writer: _Writer, e: Example) -> None:
        """The one shift: from here on every column speaks about the token that is predicted."""
        ids, labels = np.asarray(e.input_ids, np.int64), np.asarray(e.labels, np.int64)
        after = np.append(labels[1:], IGNORE)
        on = after != IGNORE
        marks = np.where(on, np.append(np.asarray(e.positions, np.int64)[1:], 0), UNTRAINED)
        plain = bool((after == np.append(ids[1:], IGNORE))[on].all())
        weights = None
        if e.weights is not None:
            weights = np.where(on, np.append(np.asarray(e.weights, np.float32)[1:], 0), 0)
        writer.add(ids, marks, None if plain else after, weights)
        self.lengths.append(len(ids))
        self.trained.append(int(on.sum()))
        self.parts.append(e.part)
        self.beta_scales.append(e.beta_scale)

    def _open(self, columns: dict[str, Tensor]) -> None:
        self._columns = columns
        self.ids, self._marks = columns["ids"], columns["marks"]
        self._lengths = torch.frombuffer(self.lengths, dtype=torch.int32)
        self._starts = self._lengths.cumsum(0) - self._lengths
        self.scales_beta = any(scale != 1 for scale in self.beta_scales)
        if len(self.ids) != int(self._lengths.sum()) + 1:
            raise ValueError(f"{len(self.ids)} tokens for rows of {int(self._lengths.sum())}")
        self.ref_logp: Tensor | None = None  # fp32, as long as the others
        self.anchors: AnchorsOf | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def targets(self) -> Tensor:
        """int64, -100 where nothing is trained; made when it is asked for."""
        return self._targets(torch.arange(len(self.ids)))

    @property
    def positions(self) -> Tensor:
        """int32, of the targets; made when it is asked for."""
        return self._marks.clamp(min=0)

    @property
    def weights(self) -> Tensor | None:
        """fp32, of the targets, 0 where nothing is trained; None: 1 for each that is."""
        return self._columns.get("weights")

    def id_range(self) -> tuple[int, int]:
        """Smallest and largest of all token ids and targets."""
        low, high = int(self.ids.min()), int(self.ids.max())
        if "labels" in self._columns:
            high = max(high, int(self._columns["labels"].max()))
        return low, high

    def _targets(self, slots: Tensor) -> Tensor:
        """Of these slots; -1 is padding."""
        labels = self._columns.get("labels")
        if labels is None:
            after = self.ids[torch.where(slots < 0, slots, slots + 1).clamp(max=len(self.ids) - 1)]
        else:
            after = labels[slots]
        return torch.where(self._marks[slots] == UNTRAINED, IGNORE, after.long())

    @cached_property
    def _hashes(self) -> tuple[str, str]:
        tokens = hashlib.blake2b(digest_size=16)
        tokens.update(self.lengths.tobytes())
        for start in range(0, len(self.ids), 1 << 24):  # in blocks: the table may be large
            block = slice(start, start + (1 << 24))
            tokens.update(self.ids[block].numpy().data)
            tokens.update((self._marks[block] == UNTRAINED).numpy().data)
            if "labels" in self._columns:
                tokens.update(self._columns["labels"][block].numpy().data)
        every = tokens.copy()
        every.update(self._marks.numpy().data)
        if "weights" in self._columns:
            every.update(self._columns["weights"].numpy().data)
        every.update(self.parts.tobytes())
        if self.scales_beta:
            every.update(self.beta_scales.tobytes())
        mixed = None if self.part_weights is None else sorted(self.part_weights.items())
        every.update(repr((mixed, mixed and self.part_weighting)).encode())
        return tokens.hexdigest(), every.hexdigest()

    def tokens_hash(self) -> str:
        """Of what a reference has to say something about: ids, targets and where rows end."""
        return self._hashes[0]

    def content_hash(self) -> str:
        """Of all that a run is trained on: tokens, targets, positions, weights, parts, scales of
        beta."""
        return self._hashes[1]

    def slots(self, rows: Sequence[int], packed: bool = False) -> Tensor:
        """Indices [len(rows), longest row] into the columns, -1, padding, behind a row's end; or
        [1, tokens of all rows]."""
        at = torch.tensor(rows)
        if packed:
            ranges = [self._starts[row] + torch.arange(self.lengths[row]) for row in rows]
            return torch.cat(ranges)[None]
        reach = torch.arange(max(self.lengths[row] for row in rows))
        return torch.where(reach < self._lengths[at, None], self._starts[at, None] + reach, -1)

    def batch(
        self,
        rows: Sequence[int],
        device: torch.device,
        counts: Mapping[int, Counts],
        packed: bool = False,
    ) -> Batch:
        """The batch of these examples; `counts`: of the optimizer step, by part.

        Raises:
            OSError: a file of the table was cut short.
        """
        for file in self._files:
            file.check()
        slots = self.slots(rows, packed)
        tokens = sum(self.lengths[row] for row in rows)

        def send(x: Tensor) -> Tensor:
            """To the device; from pinned memory, or the copy would wait for the running step."""
            pinned = x.pin_memory() if device.type == "cuda" else x
            return pinned.to(device, non_blocking=True)

        scale, lengths = self._scale(rows, slots, counts), [self.lengths[row] for row in rows]
        beta_scale = None
        if self.scales_beta:
            beta_scale = self._of_rows([self.beta_scales[row] for row in rows], rows, packed)
        return Batch(
            send(self.ids[slots]).long(),
            None if tokens == slots.numel() else send((slots >= 0).long()),
            send(self._targets(slots)),
            send(self._marks[slots].clamp(min=0)),
            sum(c.weight for c in counts.values()),
            tokens,
            None if self.ref_logp is None else send(self.ref_logp[slots]),
            None if self.anchors is None else self.anchors.take(rows, device),
            None if scale is None else send(scale),
            send(torch.cat([torch.arange(n) for n in lengths])[None]) if packed else None,
            None if beta_scale is None else send(beta_scale),
        )

    def _of_rows(self, values: Sequence[float], rows: Sequence[int], packed: bool) -> Tensor:
        """`values` of these rows, fp32 [len(rows), 1], or for each token [1, T]."""
        column = torch.tensor(values, dtype=torch.float32)
        if packed:
            return column.repeat_interleave(self._lengths[torch.tensor(rows)])[None]
        return column[:, None]

    def count(self, rows: Sequence[int]) -> dict[int, Counts]:
        """What these examples hold of each part."""
        out: dict[int, Counts] = {}
        weights = self.weights
        for row in rows:
            examples, tokens, weight = out.get(self.parts[row], (0, 0, 0.0))
            trained = self.trained[row]
            more = trained if weights is None else weights[self.slots([row])].sum().item()
            out[self.parts[row]] = Counts(examples + 1, tokens + trained, weight + more)
        return out

    def _scale(
        self, rows: Sequence[int], slots: Tensor, counts: Mapping[int, Counts]
    ) -> Tensor | None:
        """What each token's loss is multiplied by; None: all by 1 / the step's trained tokens."""
        weights = self.weights
        if self.part_weights is None:
            if weights is None:
                return None
            return weights[slots] / (sum(c.weight for c in counts.values()) or 1.0)
        by_part = self._part_scales(counts)
        packed = len(slots) != len(rows)
        scale = self._of_rows([by_part[self.parts[row]] for row in rows], rows, packed)
        return scale if weights is None else scale * weights[slots]

    def _part_scales(self, counts: Mapping[int, Counts]) -> dict[int, float]:
        assert self.part_weights is not None
        if self.part_weighting == "tokens":
            return {p: self.part_weights[p] / (c.weight or 1.0) for p, c in counts.items()}
        each = {p: self.part_weights[p] / c.examples for p, c in counts.items()}
        total = sum(each[p] * c.weight for p, c in counts.items())
        return {p: weight / (total or 1.0) for p, weight in each.items()}


class _Writer:
    """The files of a table, filled example by example."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.files = {name: self._new(name, dtype) for name, dtype in DTYPES.items()}

    def _new(self, name: str, dtype: Any) -> ColumnFile:
        return ColumnFile(dtype, None if self._folder is None else self._folder / f"{name}.bin")

    def add(self, ids: Any, marks: Any, labels: Any = None, weights: Any = None) -> None:
        """One row, of which labels and weights are None where they say nothing of their own."""
        self.files["ids"].append(ids)
        self.files["marks"].append(marks)
        self._rare("labels", labels, ids, marks, _labels)
        self._rare("weights", weights, ids, marks, lambda _, marks: marks != UNTRAINED)

    def _rare(self, name: str, values: Any, ids: Any, marks: Any, usual: Any) -> None:
        """Append to a column that is there from the first row on that needs it."""
        if values is None and name not in self.files:
            return
        if name not in self.files:
            self.files[name] = self._new(name, RARE[name])
            before = len(self.files["ids"]) - len(ids)
            if before:
                columns = (self.files[n].mapped()[:before].numpy() for n in DTYPES)
                self.files[name].append(usual(*columns))
        if values is None:
            values = usual(np.asarray(ids), np.asarray(marks))
        self.files[name].append(values)


def _labels(ids: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """The next token wherever it is trained, which it never is behind a row's last."""
    return np.where(marks == UNTRAINED, IGNORE, np.append(ids[1:], IGNORE))


def _check_example(e: Example, where: str, part_weights: Mapping[int, float] | None) -> None:
    if not len(e.input_ids) == len(e.labels) == len(e.positions):
        lengths = f"{len(e.input_ids)}, {len(e.labels)} and {len(e.positions)}"
        raise ValueError(f"{where}: input_ids, labels and positions have lengths {lengths}")
    if not (np.asarray(e.labels[1:]) != IGNORE).any():
        raise ValueError(
            f"{where}: no token to train (the first one does not count, nothing predicts it)"
        )
    if e.weights is not None:
        weights = np.asarray(e.weights, np.float64)
        if len(weights) != len(e.input_ids):
            raise ValueError(f"{where}: {len(weights)} weights for {len(e.input_ids)} tokens")
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise ValueError(f"{where}: weights must be finite and >= 0, got {min(e.weights)}")
    check.number(f"{where}: beta_scale", e.beta_scale, low=0.0)
    if part_weights is not None and e.part not in part_weights:
        raise ValueError(f"{where}: part {e.part} is not in part_weights {dict(part_weights)}")
