"""Columns of the data beside trl's, and how they get into a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from deepalign_kernels.data.examples import IGNORE, refuse_scales, tokenize_chat
from deepalign_kernels.hf import trainer
from deepalign_kernels.losses import response_positions

COLUMNS = {**trainer.COLUMNS, "token_weights": 0.0}  # of each token, and what padding has there
OURS = (*COLUMNS, "ref_row")  # the last: a number for each row, under which its anchors are kept
RARE = ("tools", "beta_scale")  # of a record
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
    batch: dict[str, list[Any]], tokenizer: Any, options: dict[str, Any], weights: bool
) -> dict[str, list[Any]]:
    names = [n for n in ("messages", "prompt", "completion", *RARE) if n in batch]
    records = [
        {n: _plain(x) for n, x in zip(names, row, strict=True) if x is not None}
        for row in zip(*(batch[n] for n in names), strict=True)
    ]
    examples = tokenize_chat(tokenizer, records, **options)
    refuse_scales(examples, "in TRL's trainer")
    columns: dict[str, list[Any]] = {
        "input_ids": [list(e.input_ids) for e in examples],
        "labels": [list(e.labels) for e in examples],
        "response_positions": [list(e.positions) for e in examples],
    }
    if weights:
        every = [e.weights or [1.0] * len(e.input_ids) for e in examples]
        columns["token_weights"] = [list(map(float, row)) for row in every]
        return columns
    for example in examples:
        if example.weights is not None:
            raise ValueError(
                f"{example.where}: a message has a weight and those of the first conversation have"
                " none; in a stream the first one tells whether there are weights: give it one"
            )
    return columns


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
