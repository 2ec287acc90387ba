"""The toy model: a Llama of about half a million parameters with random weights."""

from __future__ import annotations

from typing import cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


def build_model(
    tokenizer: PreTrainedTokenizerBase, seed: int = 0, *, hidden: int = 96, layers: int = 4
) -> LlamaForCausalLM:
    """An untrained fp32 model, the same for the same `seed`; torch's random state is kept.

    `hidden` must be a multiple of 24 (four heads of even width). Tied embeddings.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
