"""The loss inside the output head of a Hugging Face model, in a training loop of your own.

python examples/03_hugging_face.py [MODEL]
"""

import tiny
import torch

import deepalign_kernels as dak
from deepalign_kernels import hf
from deepalign_kernels.train import tokenize_chat

model, tokenizer = tiny.load()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
example = tokenize_chat(tokenizer, tiny.CHATS)[0]
input_ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])

# --8<-- [start:attach]
hf.attach(model)  # before or after PEFT, DDP, FSDP, ZeRO-3
hf.verify(model, input_ids)  # once: 8 tokens against the model's own logits, or raises
# --8<-- [end:attach]

# --8<-- [start:loop]
beta = dak.BetaSchedule()(dak.response_positions(labels))
with torch.no_grad():  # once: the model before training is the reference
    ref_logp = model(input_ids=input_ids, labels=labels, dak_loss=hf.TokenLogp()).logp
for _ in range(3):
    loss = hf.ConstrainedLoss(beta=beta, ref_logp=ref_logp)
    out = model(input_ids=input_ids, labels=labels, dak_loss=loss)
    out.loss.backward()  # also out.logp, out.mask, out.parts["weight"], out.parts["log_ratio"]
    optimizer.step()
    optimizer.zero_grad()
# --8<-- [end:loop]

print(f"loss {out.loss.item():.4f}, mean log ratio {out.parts['log_ratio'].mean().item():.4f}")
hf.detach(model)

# --8<-- [start:logits]
loss = dak.constrained_loss(  # the same from whole logits, for a model that attach does not take
    model(input_ids=input_ids).logits[:, :-1],
    labels[:, 1:],
    beta=beta[:, 1:],
    ref_logp=ref_logp,
)
# --8<-- [end:logits]
