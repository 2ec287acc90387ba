"""Training data: conversations, their tokens, and what of them is trained.

    records -> template -> examples (tokens, labels, positions) -> columns -> batches

Sources take plain arguments and know neither a model nor a trainer, so that any trainer can use
them. transformers is imported only to render a chat template.
"""

from deepalign_kernels.data.examples import Example, tokenize_chat
from deepalign_kernels.data.records import Conversation, load_chat_data
from deepalign_kernels.data.recovery import RecoveryAugmentation

__all__ = [
    "Conversation",
    "Example",
    "RecoveryAugmentation",
    "load_chat_data",
    "tokenize_chat",
]
