"""`deepalign data show FILE --model M -n 3`: what a run would train, token by token."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated

import torch
import tyro

from deepalign_kernels import check
from deepalign_kernels.data.examples import Encoding
from deepalign_kernels.data.show import token_rows, token_table
from deepalign_kernels.data.template import tokenizer_of
from deepalign_kernels.data.tokenizing import examples_of
from deepalign_kernels.losses import BetaSchedule


@dataclass(frozen=True)
class Options:
    """The first conversations of FILE, token by token: id, text, whether it is trained, position in
    its response, beta, weight."""

    data: tyro.conf.Positional[str]
    """JSONL or Parquet file, folder, or name of a data set."""
    model: str
    """Folder or name of a model; its tokenizer and chat template are used."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 3
    """Conversations."""
    skip: int = 0
    """Conversations to leave out first."""
    chat_template: str | None = None
    """File of another chat template (Jinja)."""
    position_origin: str = "content"
    """Where a response begins to count: "content", or "span" with what the template puts first."""
    train_on: str = "all"
    """"all" assistant turns, or the "last" of each conversation."""
    unknown_keys: str = "ignore"
    """Of records and messages: "ignore" or "error"."""
    on_bad_record: str = "error"
    """"error" stops at a record that cannot be trained; "skip" leaves it out and says why."""
    beta: BetaSchedule = field(default_factory=BetaSchedule)
    """beta by position; the paper's."""
    context: int = 8
    """Tokens to show beside trained ones; -1: all."""
    json: bool = False
    """One JSON object per conversation in place of tables."""


def run(options: Options) -> None:
    """Print them.

    Raises:
        ValueError: as `tokenize_chat`; a tokenizer that cannot be loaded.
    """
    for name in ("n", "skip"):
        check.number(name, getattr(options, name), low=0)
    encoding = Encoding(
        options.position_origin, options.train_on, options.unknown_keys, options.on_bad_record
    )
    tokenizer, skipped = tokenizer_of(options.model, options.chat_template), []
    examples = examples_of(tokenizer, options.data, encoding, workers=0, skipped=skipped)
    for example in islice(examples, options.skip, options.skip + options.n):
        rows = token_rows(tokenizer, example, lambda p: options.beta(torch.tensor(p)).tolist())
        if options.json:
            print(json.dumps({"where": example.where, "tokens": rows}, ensure_ascii=False))
            continue
        count = sum(row["trained"] for row in rows)
        print(f"{example.where}: {len(rows)} tokens, {count} trained")
        print(token_table(rows, None if options.context < 0 else options.context), end="\n\n")
    for why in skipped:
        print(f"left out: {why}", file=sys.stderr)
