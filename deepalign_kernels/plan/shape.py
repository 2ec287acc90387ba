"""Sizes of a model, and what its layers keep for the backward, without any of its weights.

The layers run once on fake tensors, which have shapes and no data: a model of one and of two
layers, and the rest is their difference times the number of layers. No architecture is known here.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from deepalign_kernels.train.load import config_of, text_part

Adapt = Callable[[Any], Any]  # a model -> the same one with adapters, alone to be trained


@dataclass(frozen=True)
class Kept:
    """Bytes that the forward below the head keeps for the backward, beside the weights."""

    outside: int  # embedding and final norm
    layer: int  # of one decoder layer
    inputs: int  # of one decoder layer, its input alone: what checkpointing keeps


@dataclass(frozen=True)
class ModelShape:
    """A causal language model in numbers.

    Attributes:
        config: of transformers.
        parameters: all of them, a tied head counted once.
        embedding: those of the input embedding.
        head: those of the output head; the same tensor as the embedding where `tied`.
        layer: those of one decoder layer.
        layers, hidden, vocab: numbers of decoder layers, of features, of tokens.
        adapters: parameters that are trained in the place of all those; None: there are none.
        adapt: puts adapters into a model.
    """

    config: Any
    parameters: int
    embedding: int
    head: int
    tied: bool
    layer: int
    layers: int
    hidden: int
    vocab: int
    adapters: int | None = None
    adapt: Adapt | None = None

    def kept(
        self, batch: int, length: int, dtype: torch.dtype, autocast: torch.dtype | None
    ) -> Kept:
        """For a batch [batch, length] of weights of `dtype`, the forward under `autocast`."""
        how = batch, length, dtype, autocast, self.adapt
        one, two = (_saved(self.config, n, *how) for n in (1, 2))
        rows = batch * length * self.hidden * dtype.itemsize
        return Kept(one - (two - one), two - one, rows)


def shape_of(model: str | Path | Any, adapt: Adapt | None = None) -> ModelShape:
    """The shape of a model.

    Args:
        model: a config of transformers, a folder with one, or a name that transformers resolves; of
            a model of text and images its text part counts.
        adapt: gives a model its adapters and freezes all else; None: all weights are trained.

    Raises:
        ValueError: no such model, or not a decoder-only language model with layers of one kind.
    """
    from transformers import PretrainedConfig

    is_config = isinstance(model, PretrainedConfig)
    config: Any = text_part(model) if is_config else config_of(model)
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "num_hidden_layers"):
        raise ValueError(f"model: {type(config).__name__} is not that of a decoder-only model")
    sizes = [_parameters(_cut(config, n)) for n in (1, 2)]
    (whole, embedding, head, tied), (more, *_) = sizes
    layer = more - whole
    adapters = None
    if adapt is not None:
        one, two = (_adapters(_cut(config, n), adapt) for n in (1, 2))
        adapters = one + (config.num_hidden_layers - 1) * (two - one)
    return ModelShape(
        config=config,
        parameters=whole + (config.num_hidden_layers - 1) * layer,
        embedding=embedding,
        head=head,
        tied=tied,
        layer=layer,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        adapters=adapters,
        adapt=adapt,
    )


def _cut(config: Any, layers: int) -> Any:
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types)[:layers]
    return config


def _built(config: Any, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"model: {type(config).__name__} makes no causal LM: {error}") from error


def _parameters(config: Any) -> tuple[int, int, int, bool]:
    with torch.device("meta"):
        model: Any = _built(config, torch.float32)
    model.tie_weights()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    count = sum(p.numel() for p in model.parameters())
    return count, embedding.numel(), head.numel(), embedding is head


def _adapters(config: Any, adapt: Adapt) -> int:
    with torch.device("meta"):
        model = adapt(_built(config, torch.float32))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _saved(
    config: Any,
    layers: int,
    batch: int,
    length: int,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    adapt: Adapt | None,
) -> int:
    seen: dict[int, Any] = {}
    with torch.device("meta"):
        outline: Any = _built(_cut(config, layers), dtype)
        outline = outline if adapt is None else adapt(outline)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: Any = outline.to_empty(device="cpu").train()
        ids = torch.zeros(batch, length, dtype=torch.int64)
        weights = {id(p.untyped_storage()): p for p in model.parameters()}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if id(storage) not in weights:
                seen[storage._cdata] = storage
            return x

        cast = contextlib.nullcontext()
        if autocast is not None:
            cast = torch.autocast("cpu", dtype=autocast)
        with saved_tensors_hooks(pack, lambda x: x), cast:
            inner = model if adapt is None else model.get_base_model()
            inner.base_model(input_ids=ids, use_cache=False)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        return sum(s.nbytes() for key, s in seen.items() if key not in own)
