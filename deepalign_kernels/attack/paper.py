"""The paper's numbers (arXiv 2406.05946, tables 3 and 4), to stand beside one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# By attack and one entry of its setting: attack success in percent, Llama-2-7B-Chat on HEx-PHI, as
# "initial" and after the paper's augmentation. GPT-4 was the judge, on the continuation alone.
PREFILL = {
    5: {"initial": 42.1, "augmented": 2.8},
    10: {"initial": 51.5, "augmented": 2.9},
    20: {"initial": 56.1, "augmented": 3.4},
    40: {"initial": 57.0, "augmented": 4.5},
}
WHOLE = {
    "gcg": {"initial": 36.5, "augmented": 18.4},
    "decoding": {"initial": 54.9, "augmented": 11.3},  # the reply that a scorer finds worst
}
FINETUNE = {"sft": 88.9, "constrained": 4.6}  # 100 harmful examples, last step; of "initial"
MODELS = ("initial", "augmented")


def published(attack: str, setting: Mapping[str, Any], model: str) -> float | None:
    """The paper's rate in percent for a cell of a table, None if it has none.

    Args:
        attack: name.
        setting: of the cell.
        model: one of MODELS.
    """
    if attack == "prefill":
        return PREFILL.get(setting.get("k", -1), {}).get(model)
    if attack == "finetune" and model == "initial" and setting.get("step") == 50:
        return FINETUNE.get(str(setting.get("objective")))
    return WHOLE.get(attack, {}).get(model)
