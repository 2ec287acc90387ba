"""KL to the model without its LoRA adapters: the reference costs no second model in memory.

python examples/04_lora_kl.py [MODEL]
"""

import peft
import tiny
import torch

import deepalign_kernels as dak
from deepalign_kernels import hf
from deepalign_kernels.train import tokenize_chat

base, tokenizer = tiny.load()
config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
model = hf.attach(peft.get_peft_model(base, config))
example = tokenize_chat(tokenizer, tiny.CHATS)[0]
input_ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
beta = dak.BetaSchedule()(dak.response_positions(labels))

# --8<-- [start:kl]
with model.disable_adapter():  # the reference: its hidden states of the trained tokens
    rows = hf.hidden_rows(model, input_ids=input_ids, labels=labels)

out = model(input_ids=input_ids, labels=labels, dak_loss=hf.TokenKL(rows, direction="policy_ref"))
out.loss.backward()
# --8<-- [end:kl]
kl = out.loss

# --8<-- [start:both]
loss = hf.ConstrainedLoss(beta=beta, ref_rows=rows, kl_coef=0.1)
out = model(input_ids=input_ids, labels=labels, dak_loss=loss)
out.loss.backward()
# --8<-- [end:both]
print(f"KL {kl.item():.4f} nats per token, constrained loss with it {out.loss.item():.4f}")
