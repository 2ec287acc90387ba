"""The same loss from hidden states and the output head: the logits are never whole in memory.

python examples/02_hidden_states.py
"""

import torch
import torch.nn.functional as F

import deepalign_kernels as dak

torch.manual_seed(0)
B, T, H, V = 4, 64, 64, 8000
body = torch.nn.Embedding(V, H)  # your model without its last layer
head = torch.nn.Linear(H, V)
ids = torch.randint(V, (B, T))
labels = F.pad(ids.masked_fill(torch.arange(T) < 16, -100)[:, 1:], (0, 1), value=-100)
beta = dak.BetaSchedule()(dak.response_positions(labels))
with torch.no_grad():
    ref_logp = dak.linear_token_logp(body(ids), head.weight, labels, bias=head.bias)

# --8<-- [start:loss]
hidden = body(ids)  # [B, T, H], what the output head would take
loss = dak.linear_constrained_loss(
    hidden, head.weight, labels, beta=beta, ref_logp=ref_logp, bias=head.bias
)
loss.backward()  # gradients of hidden, head.weight and head.bias
# --8<-- [end:loss]

logits = head(body(ids))
plain = dak.constrained_loss(logits, labels, beta=beta, ref_logp=ref_logp)
torch.testing.assert_close(loss, plain)

# --8<-- [start:memory]
need = dak.estimate_memory(
    "linear_constrained_loss", tokens=8192, hidden_size=4096, vocab_size=128256
)
print(f"{need.peak / 2**30:.2f} GiB, in chunks of {need.chunk_tokens} tokens")
# --8<-- [end:memory]
print(f"whole logits in fp32: {8192 * 128256 * 4 / 2**30:.2f} GiB, and their gradient again")

# --8<-- [start:budget]
loss = dak.linear_constrained_loss(
    body(ids),
    head.weight,
    labels,
    beta=beta,
    ref_logp=ref_logp,
    bias=head.bias,
    max_workspace_bytes=8 << 20,  # at most 8 MiB beside inputs, results and gradients
)
# --8<-- [end:budget]
torch.testing.assert_close(loss, plain)
