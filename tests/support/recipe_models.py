"""The architectures of `recipes/`: as their checkpoints have them, and cut down to a few kB."""

import transformers

TEXT = {
    "vocab_size": 262, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": None,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EYES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


def real(name):
    """The config of the checkpoint that a recipe names, its sizes written out."""
    if name == "meta-llama/Llama-2-7b-chat-hf":
        return transformers.LlamaConfig()
    if name == "google/gemma-1.1-7b-it":
        return transformers.GemmaConfig()
    sizes = {
        "meta-llama/Llama-3.1-8B-Instruct": (128256, 4096, 14336, 32, 32, 8, 128),
        "Qwen/Qwen3-8B": (151936, 4096, 12288, 36, 32, 8, 128),
        "google/gemma-3-4b-it": (262208, 2560, 10240, 34, 8, 4, 256),
    }[name]
    named = dict(zip(TEXT, sizes, strict=False))
    if name.startswith("google"):
        return transformers.Gemma3Config(text_config=named)
    kind = "LlamaConfig" if "Llama" in name else "Qwen3Config"
    return getattr(transformers, kind)(**named, tie_word_embeddings=False)


def tiny(name):
    """A config of the same architecture."""
    like = real(name)
    if like.model_type == "gemma3":
        text = {**TEXT, "sliding_window": 16, "query_pre_attn_scalar": 8}
        return transformers.Gemma3Config(text_config=text, vision_config=EYES)
    return type(like)(**TEXT, tie_word_embeddings=like.tie_word_embeddings)
