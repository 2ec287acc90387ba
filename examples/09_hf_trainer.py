"""The constrained loss under the Hugging Face Trainer, from whole logits.

python examples/09_hf_trainer.py [MODEL]
"""

import tiny
import torch
from transformers import Trainer, TrainingArguments

import deepalign_kernels as dak
from deepalign_kernels import hf
from deepalign_kernels.train import tokenize_chat

model, tokenizer = tiny.load()


# --8<-- [start:columns]
def row(example):
    ids, labels = torch.tensor(example.input_ids), torch.tensor(example.labels)
    with torch.no_grad():  # the model before training is the reference
        logits = model(input_ids=ids[None]).logits
    ref_logp = dak.token_logp(logits[:, :-1], labels[None, 1:])
    return {
        "input_ids": ids,
        "labels": labels,
        "response_positions": torch.tensor(example.positions),
        "ref_logp": torch.nn.functional.pad(ref_logp[0], (1, 0)),  # the first token has none
    }


# --8<-- [end:columns]

rows = [row(example) for example in tokenize_chat(tokenizer, tiny.CHATS[:1] * 4)]

# --8<-- [start:trainer]
hf.install(model, hf.LogitsLoss(beta=dak.BetaSchedule()))
arguments = TrainingArguments(
    output_dir="out", max_steps=2, remove_unused_columns=False, report_to="none"
)
Trainer(model, arguments, train_dataset=rows).train()
# --8<-- [end:trainer]
