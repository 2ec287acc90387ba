"""The constrained loss in LLaMA-Factory's own trainer, its model loaded by its own arguments:

python examples/18_llamafactory.py arguments.yaml chats.jsonl

Its command names the trainer's class and the collator in its code, so this script takes the place
of `llamafactory-cli train`. `dataset` and `template` of the YAML must be there and are not used.
"""

import sys

# --8<-- [start:llamafactory]
from llamafactory.hparams import get_train_args
from llamafactory.model import load_model, load_tokenizer
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

from deepalign_kernels import hf
from deepalign_kernels.train import constrained_rows


class ConstrainedTrainer(hf.ConstrainedMixin, CustomSeq2SeqTrainer):
    """LLaMA-Factory's, with the loss in the model's own head."""


data = sys.argv.pop()
model_args, _, training_args, finetuning_args, _ = get_train_args()  # of arguments.yaml
tools = load_tokenizer(model_args)
model = load_model(tools["tokenizer"], model_args, finetuning_args, is_trainable=True)
trainer = ConstrainedTrainer(
    model=model,
    args=training_args,
    finetuning_args=finetuning_args,
    train_dataset=constrained_rows(model, tools["tokenizer"], data),  # before it has moved
    data_collator=hf.collate,
    **tools,
)
trainer.train()
trainer.save_model()
# --8<-- [end:llamafactory]
