"""Constrained fine-tuning of a chat model on a JSONL file: the whole of it.

python examples/05_trainer.py [MODEL]
"""

import json
import pathlib

import tiny

model, tokenizer = tiny.load()
pathlib.Path("chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in tiny.CHATS * 4))

# --8<-- [start:train]
from deepalign_kernels.train import TrainConfig, fit

config = TrainConfig(output_dir="out", learning_rate=2e-5, batch_size=4, epochs=3)
result = fit(model, tokenizer, config, data="chats.jsonl")
# --8<-- [end:train]

print(f"{result.steps} steps, log in {result.log_path}, last line: {result.metrics}")
