"""Training: token-wise constrained fine-tuning and safety-recovery augmentation (arXiv 2406.05946).

    import deepalign_kernels as dak

    config = dak.train.TrainConfig(output_dir="out", objective="constrained", epochs=3)
    result = dak.train.fit(model, tokenizer, config, data="chat.jsonl")

`python -m deepalign_kernels.train --help` does the same from a terminal. The loss is computed
inside the model's own output head (`hf.attach`); head="logits" takes whole logits instead, and then
transformers is needed only to tokenise chats.
"""

from deepalign_kernels.data import (
    Conversation,
    Example,
    RecoveryAugmentation,
    load_chat_data,
    tokenize_chat,
)
from deepalign_kernels.train.config import TrainConfig
from deepalign_kernels.train.loop import TrainingRun, TrainResult, fit
from deepalign_kernels.train.renamed import ConstrainedSFTConfig, ConstrainedSFTTrainer
from deepalign_kernels.train.rows import constrained_rows
from deepalign_kernels.train.session import Terminated

__all__ = [
    "ConstrainedSFTConfig",
    "ConstrainedSFTTrainer",
    "Conversation",
    "Example",
    "RecoveryAugmentation",
    "Terminated",
    "TrainConfig",
    "TrainResult",
    "TrainingRun",
    "constrained_rows",
    "fit",
    "load_chat_data",
    "tokenize_chat",
]
