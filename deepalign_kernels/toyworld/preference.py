"""A preference step that makes refusing the first token a firm habit, as chat models get theirs.

Refusal examples alone leave a margin of 6 to 8 nats, because their loss is 0 by then. Chat models
are far surer: the first token of an answer that Llama-2-Chat refuses costs it 16.6 nats.
"""

from __future__ import annotations

import copy
import random

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign_kernels.toyworld.encoding import IGNORE, encode_record, pad_replies
from deepalign_kernels.toyworld.world import Record, chat_record


def widen_refusal_margin(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    triplets: list[dict[str, str]],
    anchors: list[Record],
    *,
    margin: float = 22.0,
    steps: int = 50,
    learning_rate: float = 5e-4,
    seed: int = 0,
) -> PreTrainedModel:
    """A copy of `model` that begins a refusal with log-odds of `margin` nats.

    Each step takes 16 triplets and 32 anchors; the loss is the cross-entropy of refusals and
    anchors plus 0.1 * mean max(0, margin - log-odds), where the odds are those of the first tokens
    of refusals against all others. Against the openings of answers alone it is not enough: after
    the constrained attack no such opening had overtaken the refusal, but words like "stew" had, and
    an answer followed in 17 % of the cases.

    Args:
        model: stays as it is.
        tokenizer: the toy world's.
        triplets: restricted prompts with an answer and a refusal, see `World.triplets`.
        anchors: benign records that have to stay as they are.
        margin: nats. With 14 the constrained attack came out at 0 to 27 %, depending on the seed
            and on roundings; with 22, which makes the first token of an answer cost 14.7 to 15.8
            nats, at 0 to 1 % on three seeds, while SFT reached 93 to 97 %.
        steps: optimizer steps.
        learning_rate: of AdamW.
        seed: of the draw of batches.
    """
    model = copy.deepcopy(model).train()
    rng = random.Random(seed)
    refused = [encode_record(tokenizer, chat_record(t["prompt"], t["refusal"])) for t in triplets]
    starts = torch.zeros(len(tokenizer), dtype=torch.bool)
    starts[[reply[0] for _, reply in refused]] = True
    kept = [encode_record(tokenizer, record) for record in anchors]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    for step in range(steps):
        chosen = rng.sample(range(len(triplets)), min(16, len(triplets)))
        rows = [refused[i] for i in chosen] + rng.sample(kept, min(32, len(kept)))
        ids, targets = pad_replies(rows, tokenizer)
        logits = model(ids).logits
        at = torch.tensor([len(refused[i][0]) - 1 for i in chosen])
        first = logits[torch.arange(len(chosen)), at]
        odds = first[:, starts].logsumexp(-1) - first[:, ~starts].logsumexp(-1)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        loss = loss + 0.1 * (margin - odds).clamp(min=0).mean()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / 10, (steps - step) / max(steps - 10, 1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()
