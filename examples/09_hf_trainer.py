"""The constrained loss under the Hugging Face Trainer, in the model's head or from whole logits.

python examples/09_hf_trainer.py [MODEL]
"""

import tiny
from transformers import Trainer, TrainingArguments

import deepalign_kernels as dak
from deepalign_kernels import hf
from deepalign_kernels.train import constrained_rows

model, tokenizer = tiny.load()
paper = {"learning_rate": 2e-5, "adam_beta1": 0.5, "max_grad_norm": 0.0, "warmup_steps": 10}
arguments = TrainingArguments("out", max_steps=2, report_to="none", **paper)

# --8<-- [start:rows]
rows = constrained_rows(model, tokenizer, tiny.CHATS * 4)  # the model before training: reference
# --8<-- [end:rows]


# --8<-- [start:trainer]
class ConstrainedTrainer(hf.ConstrainedMixin, Trainer):
    """What a Trainer is, with the loss in the model's own head."""


trainer = ConstrainedTrainer(model, arguments, train_dataset=rows)
trainer.train()
# --8<-- [end:trainer]

# --8<-- [start:logits]
hf.install(model, hf.LogitsLoss(beta=dak.BetaSchedule()))  # from whole logits
arguments.remove_unused_columns = False
Trainer(model, arguments, train_dataset=rows, data_collator=hf.collate).train()
# --8<-- [end:logits]
