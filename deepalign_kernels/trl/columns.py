"""Columns of the data beside trl's, and how they get into a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from deepalign_kernels.data.examples import IGNORE, Encoding
from deepalign_kernels.data.template import ChatTemplate
from deepalign_kernels.data.tokenizing import encoded
from deepalign_kernels.hf import trainer
from deepalign_kernels.losses import response_positions

COLUMNS = {**trainer.COLUMNS, **trainer.RARE}  # of each token, and what padding has there
OURS = (*COLUMNS, "ref_row")  # the last: a number for each row, under which its anchors are kept
TOKENS = ("input_ids", "labels", "response_positions")


@dataclass
class ConstrainedCollator(DataCollatorForLanguageModeling):
    """trl's, with the columns of the loss padded or flattened like the labels."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        out = super().torch_call(examples)
        for name, filler in COLUMNS.items():
            if name not in examples[0]:
                continue
            rows = [torch.tensor(example[name]) for example in examples]
            if self.padding_free:
                rows = [torch.cat(rows)]
            out[name] = pad(
                rows,
                padding_value=filler,  # pyright: ignore[reportArgumentType]
                padding_side="right",
                pad_to_multiple_of=self.pad_to_multiple_of,
            )
        if "ref_row" in examples[0]:
            out["ref_row"] = torch.tensor([example["ref_row"] for example in examples])
        return out


def weighted(record: dict[str, Any]) -> bool:
    """Whether messages of a dataset have weights; of Arrow's, one row tells it of all."""
    parts = (record.get(name) for name in ("messages", "prompt", "completion"))
    return any("weight" in m for part in parts if isinstance(part, list) for m in part)


def tokenized(
    batch: dict[str, list[Any]],
    at: list[int],
    name: str,
    tokenizer: Any,
    encoding: Encoding,
    weights: bool,
    scales: bool,
) -> dict[str, list[Any]]:
    """Columns of a part of a dataset, and `why` one of its rows is left out, else "".

    Args:
        batch: columns of the dataset.
        at: numbers of its rows.
        name: of the dataset, in messages.
        tokenizer: with a chat template.
        encoding: how.
        weights: whether messages may have weights; `scales`: records a beta_scale.
        scales: see there.

    Raises:
        ValueError: as `tokenize_chat`; a weight or scale that nothing announced.
    """
    records = [
        {n: _plain(x) for n, x in zip(batch, row, strict=True) if x is not None}
        for row in zip(*batch.values(), strict=True)
    ]
    rows = [(r, f"{name} dataset: row {n}") for r, n in zip(records, at, strict=True)]
    examples, wrong = encoded(ChatTemplate(tokenizer), rows, encoding)
    for e in examples:
        for odd, what in (
            (e.weights is not None and not weights, "a message has a weight and those"),
            (e.beta_scale != 1 and not scales, "the record has a beta_scale and those"),
        ):
            if odd:
                raise ValueError(
                    f"{e.where}: {what} of the first row have none; in a stream the first one tells"
                    " whether there are some: give it one"
                )
    none: list[list[Any]] = [[] for _ in wrong]
    columns: dict[str, list[Any]] = {
        "input_ids": [list(e.input_ids) for e in examples] + none,
        "labels": [list(e.labels) for e in examples] + none,
        "response_positions": [list(e.positions) for e in examples] + none,
        "why": [""] * len(examples) + wrong,
    }
    if weights:
        every = [e.weights or [1.0] * len(e.input_ids) for e in examples]
        columns["token_weights"] = [list(map(float, row)) for row in every] + none
    if scales:
        each = [[float(e.beta_scale)] * len(e.input_ids) for e in examples]
        columns["beta_scales"] = each + none
    return columns


def spread(row: dict[str, Any]) -> dict[str, Any]:
    """The scale of a row that came as tokens, for each of them."""
    scale = row["beta_scale"]
    return {"beta_scales": [1.0 if scale is None else float(scale)] * len(row["input_ids"])}


def kept(row: dict[str, Any]) -> bool:
    return row["why"] == ""


def _plain(value: Any) -> Any:
    """Without the keys that Arrow fills with None, since every row of a column has all of them."""
    if isinstance(value, dict):
        return {k: _plain(x) for k, x in value.items() if x is not None}
    return [_plain(x) for x in value] if isinstance(value, list) else value


def counted(row: dict[str, Any]) -> dict[str, Any]:
    labels = torch.tensor(row["labels"])[None]
    return {"response_positions": response_positions(labels)[0].tolist()}


def truncated(row: dict[str, Any], limit: int) -> dict[str, Any]:
    return {name: values[:limit] for name, values in row.items()}


def fits(row: dict[str, Any], limit: int) -> bool:
    """Whether the row is short enough, and has a token to train that another one comes before."""
    return len(row["input_ids"]) <= limit and any(x != IGNORE for x in row["labels"][1:])
