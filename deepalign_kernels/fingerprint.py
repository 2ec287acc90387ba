"""A name for a model's weights: whoever computes the same has the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn


def model_hash(model: nn.Module) -> str:
    """Of every parameter and buffer, and of what the config says about the computation.

    Of weights that DeepSpeed's ZeRO-3 has shared out, as of whole ones; all processes must call.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(type(model).__name__.encode())
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if to_dict is not None:
        about = {k: v for k, v in to_dict().items() if _is_maths(k)}
        digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if isinstance(tensor, Tensor):
            with _whole(tensor):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _whole(tensor: Tensor) -> Any:
    """In the block `tensor` is put together, if ZeRO-3 has shared it out."""
    if not hasattr(tensor, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed  # pyright: ignore[reportMissingImports]

    return deepspeed.zero.GatheredParameters([tensor])


def _is_maths(key: str) -> bool:
    """Whether a config entry can change what the model computes in eval()."""
    return key[0] != "_" and "drop" not in key and key not in _NOT_MATHS


_NOT_MATHS = ("transformers_version", "use_cache", "architectures", "name_or_path", "dtype")
