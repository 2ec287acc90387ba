"""Training: token-wise constrained fine-tuning and safety-recovery augmentation (arXiv 2406.05946).

    from deepalign_kernels.train import ConstrainedSFTConfig, ConstrainedSFTTrainer

    config = ConstrainedSFTConfig(output_dir="out", objective="constrained", epochs=3)
    result = ConstrainedSFTTrainer(model, tokenizer, config, train_data="chat.jsonl").train()

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
from deepalign_kernels.train.config import ConstrainedSFTConfig
from deepalign_kernels.train.loop import ConstrainedSFTTrainer, TrainResult

__all__ = [
    "ConstrainedSFTConfig",
    "ConstrainedSFTTrainer",
    "Conversation",
    "Example",
    "RecoveryAugmentation",
    "TrainResult",
    "load_chat_data",
    "tokenize_chat",
]
