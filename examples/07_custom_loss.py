"""Losses of your own: from per-token values, and inside the output head of a model.

python examples/07_custom_loss.py [MODEL]
"""

import tiny
import torch

import deepalign_kernels as dak
from deepalign_kernels import hf
from deepalign_kernels.train import tokenize_chat

torch.manual_seed(0)
policy_logits = torch.randn(2, 6, 1000, requires_grad=True)
ref_logits = torch.randn(2, 6, 1000)
labels = torch.tensor([[-100, -100, 5, 6, 7, 8], [-100, 3, 4, -100, 9, 2]])
beta = dak.BetaSchedule()(dak.response_positions(labels))

# --8<-- [start:tokens]
valid = labels != -100
logp = dak.token_logp(policy_logits, labels)  # both carry gradient, 0 where not valid
kl = dak.token_kl(policy_logits, ref_logits, direction="ref_policy", valid=valid)
loss = dak.reduce_tokens(0.1 * kl - logp, valid)  # mean over the valid tokens
loss.backward()
# --8<-- [end:tokens]

# --8<-- [start:surrogate]
official = dak.constrained_loss(  # what the authors' published code computes
    policy_logits, labels, beta=beta, ref_logits=ref_logits, objective="surrogate", min_weight=1e-3
)
# --8<-- [end:surrogate]


# --8<-- [start:head]
def focal(head):  # any function of the head's input
    logp = dak.linear_token_logp(head.hidden, head.weight, head.target, **head.options)
    mask = head.target != -100
    return hf.LossOutput(loss=dak.reduce_tokens(-(1 - logp.exp()) * logp, mask), logp=logp)


# --8<-- [end:head]
model, tokenizer = tiny.load()
example = tokenize_chat(tokenizer, tiny.CHATS)[0]
input_ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
# --8<-- [start:call]
hf.attach(model)
out = model(input_ids=input_ids, labels=labels, dak_loss=focal)
out.loss.backward()
# --8<-- [end:call]
print(f"own loss {loss.item():.4f}, official {official.item():.4f}, focal {out.loss.item():.4f}")
