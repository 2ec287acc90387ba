"""`deepalign analyze`: where two models differ, position by position, as a run in a folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from deepalign_kernels.analyze.pairs import check_tokenizers, pairs_of
from deepalign_kernels.analyze.run import Settings, analyse
from deepalign_kernels.runs.names import title_of


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """Compare two models at every position of given or sampled answers.

    Attributes:
        model: folder or hub name of the aligned or fine-tuned model.
        base: what it is compared with: its base, or the model before fine-tuning.
        data: JSONL files of conversations or of prompt and completion; NAME=FILE names a group.
        out: folder of the run; running again goes on where it was interrupted.
        dtype: of the weights, "auto" as they are stored.
        device: where models run; not with device_map.
        device_map: "auto" spreads a model over all devices and the CPU (needs accelerate).
        max_tokens: with padding, in a batch of the forward.
    """

    model: str
    base: str
    data: tuple[str, ...]
    out: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = ""
    device_map: str | None = None
    max_tokens: int = 8192


def run(options: Options) -> int:
    """Make the run.

    Raises:
        ValueError: no such model; anything that `analyse` refuses.
    """
    tokenizer, other = (tokenizer_of(name, getattr(options, name)) for name in ("model", "base"))
    for note in check_tokenizers(tokenizer, other):
        print(f"note: {note}", file=sys.stderr)
    pairs = pairs_of(tokenizer, groups_of(options.data), options.positions)
    names = [f.name for f in fields(Settings)]
    values = {name: getattr(options, name) for name in names}
    for title, path in (("title", options.model), ("base_title", options.base)):
        if values[title] == getattr(Settings, title):
            values[title] = title_of(path)
    folder = analyse(
        options.out,
        lambda: load(options, options.model),
        lambda: load(options, options.base),
        tokenizer,
        pairs,
        Settings(**values),
        max_tokens=options.max_tokens,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(f"{len(pairs)} answers compared; records in {folder}, `deepalign report {folder}` shows")
    return 0


def tokenizer_of(name: str, path: str) -> Any:
    """Of a model that the option `name` names."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: no tokenizer of {path}: {error}") from error


def groups_of(data: Sequence[str]) -> dict[str, str]:
    """{"refusals": "a.jsonl"} of "refusals=a.jsonl"; a file without a name is the group "all".

    Raises:
        ValueError: two files for one group.
    """
    out: dict[str, str] = {}
    for each in data:
        name, _, path = each.rpartition("=")
        if (name or "all") in out:
            raise ValueError(
                f"data: two files for the group {name or 'all'!r}; name them NAME=FILE"
            )
        out[name or "all"] = path
    return out


def load(options: Options, path: str) -> Any:
    """One model, where the options want it."""
    from transformers import AutoModelForCausalLM

    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    if options.device_map is not None:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, device_map=options.device_map
        )
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.to(device)
