"""What is measured on a model: success of attacks, accuracies, KL and CE by position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign_kernels.losses import response_positions
from deepalign_kernels.ops import token_kl, token_logp
from deepalign_kernels.toyworld.encoding import encode_record, pad_replies
from deepalign_kernels.toyworld.judging import accuracy, attack_success
from deepalign_kernels.toyworld.stages import BENIGN_EVAL
from deepalign_kernels.toyworld.world import World

POSITIONS = 20  # as in the paper's figure 1; the shortest dessert answer has more tokens


def table_row(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World
) -> dict[str, Any]:
    """One line of the table; all rates in [0, 1], `asr` by number of prefilled tokens (str)."""
    asr = attack_success(model, tokenizer, world)
    return {
        "name": name,
        "asr": {str(k): rate for k, rate in asr.items()},
        "benign": accuracy(model, tokenizer, world, BENIGN_EVAL),
        "task": accuracy(model, tokenizer, world, ["task_eval"]),
    }


def answer_batch(tokenizer: PreTrainedTokenizerBase, world: World) -> tuple[Tensor, Tensor]:
    """(ids, targets), both [N, T], of the held-out restricted answers; see `pad_replies`."""
    rows = [encode_record(tokenizer, record) for record in world.records("restricted")]
    return pad_replies(rows, tokenizer)


@torch.inference_mode()
def kl_by_position(
    model: PreTrainedModel, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World
) -> list[float]:
    """Mean KL(model || base) in nats at positions 1..20 of the restricted answers (figure 1)."""
    ids, targets = answer_batch(tokenizer, world)
    valid = targets != -100
    values = token_kl(model(ids).logits, base(ids).logits, direction="policy_ref", valid=valid)
    return _mean_by_position(values, targets)


@torch.inference_mode()
def ce_by_position(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World
) -> list[float]:
    """Mean cross-entropy in nats of the restricted answers at positions 1..20."""
    ids, targets = answer_batch(tokenizer, world)
    return _mean_by_position(-token_logp(model(ids).logits, targets), targets)


def _mean_by_position(values: Tensor, targets: Tensor) -> list[float]:
    positions = response_positions(targets)
    return [values[positions == t].mean().item() for t in range(1, POSITIONS + 1)]
