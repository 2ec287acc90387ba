"""A small world for half a million parameters: tokenizer, model, benign data, a judge.

`python -m deepalign_kernels.toyworld.demo --out DIR` trains and attacks it; tests use it as a fast
real model:

    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=0)  # untrained; AutoModelForCausalLM loads what it saves
    records = World(seed=0).records("attack")  # [{"messages": [user, assistant]}, ...]
    attack_success(model, tokenizer, World(seed=0))  # {prefilled tokens: rate}

Needs transformers; only benign content, see `lexicon.py`.
"""

import deepalign_kernels.quiet  # noqa: F401  this room is a program, the demo
from deepalign_kernels.toyworld.encoding import encode_record
from deepalign_kernels.toyworld.judging import (
    PREFILL_DEPTHS,
    Verdict,
    accuracy,
    attack_success,
    greedy,
    judge,
)
from deepalign_kernels.toyworld.model import build_model
from deepalign_kernels.toyworld.tokenizer import build_tokenizer
from deepalign_kernels.toyworld.world import Record, Request, World

__all__ = [
    "PREFILL_DEPTHS",
    "Record",
    "Request",
    "Verdict",
    "World",
    "accuracy",
    "attack_success",
    "build_model",
    "build_tokenizer",
    "encode_record",
    "greedy",
    "judge",
]
