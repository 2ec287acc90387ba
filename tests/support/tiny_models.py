"""Randomly initialised causal language models with every kind of output head, a few kB each.

`build(name)` is deterministic and needs no download. The heads differ in: tied or own weight, bias,
scale, tanh cap, projection before the head, place in the module tree.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

VOCAB, HIDDEN = 160, 32
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **_TOKENS,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_OPT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "dropout": 0.0,  # functional, so build() does not see it
}
_GEMMA2_CAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 50.0}
_LOW_RANK = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}

# name -> (config class in transformers, its arguments)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_GROUPED, "tie_word_embeddings": False}),
    "llama_tied": ("LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": None, "head_dim": 8}),
    "qwen2": ("Qwen2Config", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 8, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            **_GROUPED,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "decoder_sparse_step": 1,
        },
    ),
    "gemma": ("GemmaConfig", {**_GROUPED, "head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        {
            **_GROUPED,
            **_GEMMA2_CAPS,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 16,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {**_GROUPED, **_SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8},
    ),
    "phi": ("PhiConfig", _GROUPED),
    "phi3": ("Phi3Config", _GROUPED),
    "cohere": ("CohereConfig", {**_GROUPED, "logit_scale": 0.0625}),
    "cohere2": ("Cohere2Config", {**_GROUPED, **_SLIDING, "logit_scale": 0.0625}),
    "granite": ("GraniteConfig", {**_GROUPED, "logits_scaling": 6.0, "embedding_multiplier": 12.0}),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": HIDDEN,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            **_TOKENS,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", _COMMON),
    "opt": ("OPTConfig", {**_OPT, "word_embed_proj_dim": HIDDEN}),
    "opt_proj": ("OPTConfig", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": HIDDEN, "n_layer": 2, "n_head": 4},
    ),
    "olmo2": ("Olmo2Config", _GROUPED),
    "smollm3": ("SmolLM3Config", _GROUPED),
    "glm4": ("Glm4Config", {**_GROUPED, "head_dim": 8}),
    "stablelm": ("StableLmConfig", _GROUPED),
    "mamba": (
        "MambaConfig",
        {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "state_size": 4},
    ),
    "mpt": (
        "MptConfig",
        {"vocab_size": VOCAB, "d_model": HIDDEN, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    ),
    "minicpm3": (
        "MiniCPM3Config",
        {**_COMMON, **_LOW_RANK, "num_key_value_heads": 4, "dim_model_base": 16},
    ),
    "hyperclovax": ("HyperCLOVAXConfig", {**_GROUPED, "logits_scaling": 0.5}),
    "nanochat": ("NanoChatConfig", {**_COMMON, "num_key_value_heads": 4}),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "lru_width": HIDDEN,
            "attention_window_size": 16,
            "logits_soft_cap": 3.0,
        },
    ),
    "modernbert_decoder": (
        "ModernBertDecoderConfig",
        {**_COMMON, "num_hidden_layers": 3, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "electra": ("ElectraConfig", {**_COMMON, "embedding_size": 16, "is_decoder": True}),
}
_EAGER_ATTENTION = ("recurrent_gemma", "mpt")


def build(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> nn.Module:
    """Family `name` in training mode, without dropout; `config` overrides its table entry."""
    import transformers

    transformers.logging.set_verbosity_error()
    kind, arguments = FAMILIES[name]
    if not hasattr(transformers, kind):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(seed)
    options = {"attn_implementation": "eager"} if name in _EAGER_ATTENTION else {}
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**{**arguments, **config}), **options
    )
    embeddings = [model.get_output_embeddings(), model.get_input_embeddings()]
    with torch.no_grad():
        for weight in {id(m.weight): m.weight for m in embeddings}.values():
            weight.mul_(0.3 / weight.std())  # neither a flat softmax, nor one-hot
        if embeddings[0].bias is not None:
            embeddings[0].bias.normal_()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.to(dtype).train()


def batch(
    *, rows: int = 2, length: int = 10, seed: int = 0, untrained: int = 4
) -> dict[str, torch.Tensor]:
    """input_ids, labels [rows, length]; not trained: each row's first `untrained`, and a hole."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :untrained] = -100
    if untrained + 3 < length:
        labels[0, untrained + 2] = -100
    return {"input_ids": ids, "labels": labels}


def plain_logp(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[B, T - 1] log-probs of the labels from logits, differentiable; 0 where not trained."""
    target = labels[:, 1:]
    scores = logits[:, -labels.shape[1] : -1].float().log_softmax(-1)
    picked = scores.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(target != -100, picked, 0.0)


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """All parameter gradients of `loss`, by name; leaves the model without any."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def gradient_error(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Worst difference of any parameter's gradient, relative to that parameter's largest one.

    Gradients that are zero but for rounding (attention key biases) count relative to 1e-4 of the
    largest of all.
    """
    if ours.keys() != theirs.keys() or not theirs:
        return float("inf")
    top = {name: g.abs().max().item() for name, g in theirs.items()}
    floor = 1e-4 * max(top.values())
    return max((ours[n] - theirs[n]).abs().max().item() / max(top[n], floor) for n in theirs)
