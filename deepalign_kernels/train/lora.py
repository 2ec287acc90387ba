"""LoRA (arXiv 2106.09685) by peft, from the options of `deepalign train`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepalign_kernels import check

ALL_LINEAR = "all-linear"  # peft's name for every linear layer but the output head


@dataclass(frozen=True)
class Lora:
    """Adapters that are trained in the place of all weights.

    Args:
        rank: of each adapter; None: all weights are trained.
        alpha: an adapter's product is multiplied by alpha / rank; None: twice the rank.
        dropout: of what goes into an adapter.
        target_modules: last parts of the names of layers that get one, such as q_proj v_proj; None:
            every linear layer but the output head.
        merge: write the whole model with its adapters added in, in place of the adapters alone.

    Raises:
        ValueError: naming the option.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: Sequence[str] | None = None
    merge: bool = False

    def __post_init__(self) -> None:
        if self.rank is None:
            for name in ("alpha", "dropout", "target_modules", "merge"):
                if getattr(self, name) not in (None, 0.0, False):
                    raise ValueError(f"lora_{name}: without lora_rank all weights are trained")
            return
        check.count("lora_rank", self.rank, 1)
        check.number("lora_dropout", self.dropout, low=0.0, below=1.0)
        if self.alpha is not None:
            check.number("lora_alpha", self.alpha, above=0.0)

    def adapt(self, model: Any, seed: int = 0) -> Any:
        """`model` with adapters, its own weights frozen; without a rank `model` as it is.

        The adapters are fp32 and change nothing before they are trained. `seed`: of their random
        half, which then is the same in every process and at a resume.

        Raises:
            ValueError: no layer of such a name; peft is not installed.
        """
        if self.rank is None:
            return model
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ValueError("lora_rank: needs peft (pip install peft)") from error
        if self.target_modules is not None:
            _must_be_there(model, self.target_modules)
        where, named = next(model.parameters()).device, getattr(model, "name_or_path", "")
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=list(self.target_modules or ()) or ALL_LINEAR,
        )
        with torch.random.fork_rng(devices=[]), where:
            torch.manual_seed(seed)
            out: Any = get_peft_model(model, config)
        if Path(named).is_dir():  # to be found from any folder
            out.peft_config["default"].base_model_name_or_path = str(Path(named).resolve())
        return out


def _must_be_there(model: nn.Module, wanted: Sequence[str]) -> None:
    every = {name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    for name in wanted:
        if not any(each == name or each.endswith(f".{name}") for each in every):
            short = sorted({each.rpartition(".")[2] for each in every})
            near = difflib.get_close_matches(name, short, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(short)}"
            raise ValueError(f"lora_target_modules: the model has no layer {name!r}; {hint}")


def about_adapters(model: Any) -> dict[str, Any]:
    """What decides, beside their weights, about what the adapters of a PEFT model compute; {} of
    another model."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return {}
    left_out = ("auto_mapping", "inference_mode", "revision", "task_type", "peft_version")
    plain = {
        name: {
            key: value
            for key, value in config.to_dict().items()
            if key not in left_out and not key.endswith("name_or_path")
        }
        for name, config in configs.items()
    }
    return json.loads(json.dumps(plain, default=lambda x: sorted(map(str, x))))
