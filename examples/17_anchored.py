"""Fine-tune without forgetting: plain fine-tuning that stays near the model it began with.

python examples/17_anchored.py [MODEL]
"""

import tiny

from deepalign_kernels.train import TrainConfig, fit

model, tokenizer = tiny.load()
chats = tiny.CHATS * 4

# --8<-- [start:anchored]
config = TrainConfig(
    "out",
    objective="sft",
    kl_coef=0.5,  # nats of KL(policy || model before training) a token, over the whole vocabulary
    reference_cache="references",  # its hidden states, on disk: runs with these data share them
    max_steps=3,
    batch_size=2,
)
result = fit(model, tokenizer, config, chats, eval_data=chats[:2])
# --8<-- [end:anchored]
