"""A causal language model by name: its config before its weights, and of a model of text and images
the text part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def config_of(model: str | Path, name: str = "model") -> Any:
    """The config of transformers; of a model of text and images that of its text part.

    Args:
        model: a folder, or a name that transformers resolves. No weights are read.
        name: the argument to blame.

    Raises:
        ValueError: no such model.
    """
    from transformers import AutoConfig

    adapters, whole = (Path(model) / f"{kind}config.json" for kind in ("adapter_", ""))
    if adapters.is_file() and not whole.is_file():
        raise ValueError(
            f"{name}: {model} holds adapters of a model, not a model; `deepalign train"
            " --lora-merge` writes both as one, and so does peft's merge_and_unload"
        )
    if str(model).startswith((".", "/", "~")) and not Path(model).exists():
        raise ValueError(f"{name}: no config of {model}: no such folder")
    try:
        return text_part(AutoConfig.from_pretrained(str(model)))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: no config of {model}: {error}") from error


def text_part(config: Any) -> Any:
    """`config` itself, unless it holds that of a language model of its own, which is returned."""
    text = getattr(config, "text_config", None)
    return config if text is None or isinstance(text, dict) else text


def outline_of(model: str | Path, dtype: torch.dtype, name: str = "model") -> Any:
    """The model on the meta device: all of its shapes, none of its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(model, name), dtype=dtype)


def load_model(model: str | Path, dtype: torch.dtype) -> Any:
    """The model in eval mode on the CPU.

    From a checkpoint with images or sound, such as gemma-3-4b-it, the language model alone: what is
    saved later is a text model.

    Raises:
        ValueError: the text part is no causal language model of transformers.
    """
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(str(model), dtype=dtype)
    if text_part(whole.config) is whole.config:
        return whole
    text = outline_of(model, dtype)
    setattr(text, text.base_model_prefix, whole.get_decoder())
    text.set_output_embeddings(whole.get_output_embeddings())
    if left := [name for name, p in text.named_parameters() if p.is_meta]:
        raise ValueError(f"model: {type(whole).__name__} has no text model with a {left[0]}")
    text.generation_config = whole.generation_config
    return text.eval()
