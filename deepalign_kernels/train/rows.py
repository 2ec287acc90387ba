"""Rows with all that the constrained loss needs, for a trainer of somebody else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepalign_kernels.data.examples import tokenize_chat
from deepalign_kernels.modes import evaluating


@torch.no_grad()
def constrained_rows(
    model: nn.Module,
    tokenizer: Any,
    data: str | Path | Any,
    *,
    batch_size: int = 8,
    **options: Any,
) -> list[dict[str, Tensor]]:
    """Conversations as rows that `hf.collate` makes batches of.

    Args:
        model: the reference: what the policy is before it is trained. A causal LM of transformers.
            Where ZeRO-3 has shared it out, all processes must call, with the same data.
        tokenizer: see `tokenize_chat`.
        data: see `load_chat_data`.
        batch_size: conversations per forward of the reference.
        options: of `tokenize_chat`.

    Returns:
        Of every conversation input_ids, labels (-100 where not trained), response_positions, all
        int64 [T], and ref_logp fp32 [T]: the reference's log-probability of each label in nats, 0
        where there is none. If any message has a weight, token_weights fp32 [T]; if any record has
        a beta_scale, beta_scales fp32 [T].

    Raises:
        ValueError: as `tokenize_chat`; a model that `hf.attach` does not take.
    """
    from deepalign_kernels import hf  # imports transformers, which `train` alone does not need
    from deepalign_kernels.hf.gathered import gathered

    examples = tokenize_chat(tokenizer, data, **options)
    rows = [
        {
            "input_ids": torch.tensor(list(e.input_ids)),
            "labels": torch.tensor(list(e.labels)),
            "response_positions": torch.tensor(list(e.positions)),
        }
        for e in examples
    ]
    weighted = any(e.weights is not None for e in examples)
    scaled = any(e.beta_scale != 1 for e in examples)
    for row, e in zip(rows, examples, strict=True):
        length = len(e.input_ids)
        if weighted:
            row["token_weights"] = torch.tensor(e.weights or [1.0] * length)
        if scaled:
            row["beta_scales"] = torch.full((length,), float(e.beta_scale))
    device = next(model.parameters()).device
    with hf.attached(model), gathered(model), evaluating(model):
        for at in range(0, len(rows), batch_size):
            few = rows[at : at + batch_size]
            batch = {k: x.to(device) for k, x in hf.collate(few).items() if k in _TAKEN}
            logp = hf.compute_loss(model, hf.TokenLogp(), **batch).logp
            assert logp is not None
            for row, line in zip(few, logp.float().cpu(), strict=True):
                length = len(row["input_ids"])
                row["ref_logp"] = torch.nn.functional.pad(line[: length - 1], (1, 0))
    return rows


_TAKEN = ("input_ids", "labels", "attention_mask")
