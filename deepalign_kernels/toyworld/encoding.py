"""Chat records as token ids."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deepalign_kernels.toyworld.tokenizer import ASSISTANT
from deepalign_kernels.toyworld.world import Record

IGNORE = -100


def encode_record(
    tokenizer: PreTrainedTokenizerBase, record: Record
) -> tuple[list[int], list[int]]:
    """(prompt ids up to and with the assistant mark, reply ids with the end mark), one turn."""
    encoded: Any = tokenizer.apply_chat_template(record["messages"], return_dict=True)
    ids: list[int] = encoded["input_ids"]
    start = ids.index(cast(int, tokenizer.convert_tokens_to_ids(ASSISTANT))) + 1
    return ids[:start], ids[start:]


def pad_replies(
    rows: list[tuple[list[int], list[int]]], tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor]:
    """(ids, targets), both [N, T] int64, right-padded, of `encode_record`'s pairs.

    Targets are the next ids where those belong to the reply, -100 elsewhere.
    """
    width = max(len(prompt) + len(reply) for prompt, reply in rows)
    ids = torch.full((len(rows), width), cast(int, tokenizer.pad_token_id))
    targets = torch.full((len(rows), width), IGNORE)
    for row, (prompt, reply) in enumerate(rows):
        begin, end = len(prompt), len(prompt) + len(reply)
        ids[row, :end] = torch.tensor(prompt + reply)
        targets[row, begin - 1 : end - 1] = ids[row, begin:end]
    return ids, targets
