"""The constrained loss in a training loop of your own, from logits [B, T, V].

python examples/01_logits.py
"""

import torch
import torch.nn.functional as F

import deepalign_kernels as dak

torch.manual_seed(0)
B, T, V = 4, 24, 1000
model = torch.nn.Sequential(torch.nn.Embedding(V, 64), torch.nn.Linear(64, V))  # yours goes here
ids = torch.randint(V, (B, T))  # a prompt of 8 tokens, then the response
prompt = torch.arange(T) < 8
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

# --8<-- [start:labels]
labels = ids.masked_fill(prompt, -100)  # train on the response only
labels = F.pad(labels[:, 1:], (0, 1), value=-100)  # logits at t predict token t + 1
# --8<-- [end:labels]

# --8<-- [start:loop]
beta = dak.BetaSchedule()(dak.response_positions(labels))  # 0.5 for token 1, 2 for 2..5, then 0.1
with torch.no_grad():  # once: the model before training is the reference
    ref_logp = dak.token_logp(model(ids), labels)
for _ in range(20):
    loss = dak.constrained_loss(model(ids), labels, beta=beta, ref_logp=ref_logp)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
# --8<-- [end:loop]

# The same loss without this library, to compare with.
logits = model(ids)
# --8<-- [start:before]
logp = logits.float().log_softmax(-1)  # a [B, T, V] copy, one more in backward
logp = logp.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
loss = (2 / beta * F.softplus(beta * (ref_logp - logp)))[labels != -100].mean()
# --8<-- [end:before]
plain = loss
# --8<-- [start:after]
loss = dak.constrained_loss(logits, labels, beta=beta, ref_logp=ref_logp)  # no copy
# --8<-- [end:after]
torch.testing.assert_close(loss, plain)

# --8<-- [start:parts]
loss, parts = dak.constrained_loss(logits, labels, beta=beta, ref_logp=ref_logp, return_parts=True)
weight = parts.weight  # what each token's cross-entropy gradient is multiplied by, 0 to 2
# --8<-- [end:parts]
trained = labels != -100
print(f"loss {loss.item():.4f}, mean weight of a token {weight[trained].mean().item():.3f}")
