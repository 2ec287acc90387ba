"""An SFT script of trl's: two names changed, and the constraint is in.

python examples/13_trl.py [MODEL]
"""

import tiny
import torch
from datasets import Dataset

from deepalign_kernels.trl import ConstrainedSFTConfig, ConstrainedSFTTrainer

model, tokenizer = tiny.load()
here = {} if torch.cuda.is_available() else {"use_cpu": True, "bf16": False}
chats = Dataset.from_list(tiny.CHATS[:1] * 8)

# --8<-- [start:trl]
trainer = ConstrainedSFTTrainer(  # was SFTTrainer
    model,
    ConstrainedSFTConfig("out", max_steps=2, report_to="none", **here),  # was SFTConfig
    train_dataset=chats,
    processing_class=tokenizer,
)
trainer.train()
# --8<-- [end:trl]
