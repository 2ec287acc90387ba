"""Numbers of arXiv 2406.05946, to stand beside one's own: the one place for all of them.

Those of figures were read off the images, about 2 % exact; those of tables are the paper's. All are
of 7B models on HEx-PHI (330 harmful prompts), judged by GPT-4 on the continuation alone: comparable
in shape, not in size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LLAMA, AUGMENTED = "Llama-2-7B-Chat", "Llama-2-7B-Chat, augmented"
MODELS = {"initial": LLAMA, "augmented": AUGMENTED}
# Figures 1 and 4: KL(model || Llama-2-7B) in nats at positions 1 to 20 of an answer.
KL = {
    LLAMA: (9.28, 2.51, 2.70, 1.68, 1.34, 1.13, 1.06, 1.05, 1.10, 1.16, 1.01, 0.90, 0.82, 0.78,
            0.73, 0.75, 0.71, 0.68, 0.55, 0.68),
    AUGMENTED: (9.45, 7.8, 6.65, 8.5, 8.0, 8.8, 9.1, 8.95, 9.05, 9.05, 9.75, 9.25, 9.4, 9.85, 10.4,
                10.0, 10.15, 10.4, 10.5, 10.1),
}  # fmt: skip
# Share of the KL in the first 5 of 20 positions, of the curves of figures 1 and 4.
SHARE = {LLAMA: 0.57, "Gemma-1.1-7B-IT": 0.41, AUGMENTED: 0.22}
FIRST_TOKEN_NLL = 16.6  # figure 3a: nats, of a harmful answer's first token under LLAMA
# Table 3: attack success in percent, by attack and number of prefilled tokens.
PREFILL = {LLAMA: {5: 42.1, 10: 51.5, 20: 56.1, 40: 57.0},
           AUGMENTED: {5: 2.8, 10: 2.9, 20: 3.4, 40: 4.5}}  # fmt: skip
WHOLE = {  # of decoding the reply counts that a scorer finds worst
    "gcg": {LLAMA: 36.5, AUGMENTED: 18.4},
    "decoding": {LLAMA: 54.9, AUGMENTED: 11.3},
}
# Caption of figure 3: attack success by step of SFT on 100 harmful examples, batches of 64.
SFT_STEPS = {0: 1.5, 2: 22.4, 4: 76.4, 6: 87.9}
# Tables 4, 9 and 10, last step (50): by objective and whether it warmed up for 10 steps, on 100
# harmful examples; and of the backdoor, asked without and with its trigger.
TUNED = {
    LLAMA: {("sft", 0): 88.9, ("sft", 10): 89.4, ("constrained", 0): 29.1,
            ("constrained", 10): 4.6},
    AUGMENTED: {("sft", 0): 55.2, ("sft", 10): 51.5, ("constrained", 0): 9.4,
                ("constrained", 10): 5.2},
}  # fmt: skip
BACKDOOR = {
    LLAMA: {("sft", 0): (7.6, 90.9), ("sft", 10): (2.7, 80.5), ("constrained", 0): (2.7, 9.7),
            ("constrained", 10): (1.9, 10.9)},
    AUGMENTED: {("sft", 0): (3.9, 80.0), ("sft", 10): (2.7, 83.6), ("constrained", 0): (1.8, 16.4),
                ("constrained", 10): (0.9, 12.7)},
}  # fmt: skip


def published(attack: str, setting: Mapping[str, Any], model: str) -> float | None:
    """The paper's rate in percent for a cell of a table, None if it has none.

    Its decoding rate is of a whole grid ("over" in the setting), never of one of its settings; that
    of fine-tuning is of harmful examples, or of a backdoor where the setting has a "trigger".

    Args:
        attack: which it is, whatever it was named in a run.
        setting: of the cell.
        model: one of MODELS.
    """
    name = MODELS[model]
    if setting.get("benign"):
        return None
    if attack == "prefill":
        return PREFILL[name].get(setting.get("k", -1))
    if attack == "finetune" and setting.get("step") == 50:
        key = str(setting.get("objective")), int(setting.get("warmup", -1))
        if "trigger" in setting:
            return BACKDOOR[name].get(key, (None, None))[bool(setting["trigger"])]
        return TUNED[name].get(key)
    if attack == "decoding" and "over" not in setting:
        return None
    if setting.get("universal") == "train":  # the paper's are of prompts that were not searched on
        return None
    return WHOLE.get(attack, {}).get(name)
