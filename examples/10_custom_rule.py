"""A token rule of your own: what a token costs and weighs, from its log-probabilities.

python examples/10_custom_rule.py
"""

import tiny
import torch

import deepalign_kernels as dak
from deepalign_kernels import hf
from deepalign_kernels.train import TrainConfig, fit, tokenize_chat


# --8<-- [start:rule]
def only_learn_what_is_likely(logp, ref_logp, beta):
    """Cross-entropy, but for tokens that the reference finds very unlikely."""
    weight = torch.sigmoid(beta * (ref_logp + 10.0))
    return -weight * logp, weight  # loss and, for the gradient, the weight of -logp


# --8<-- [end:rule]


torch.manual_seed(0)
hidden, weight = torch.randn(6, 64, requires_grad=True), torch.randn(1000, 64)
labels, ref_logp = torch.tensor([5, 6, -100, 7, 8, 9]), torch.tensor([-1.0, -2, 0, -20, -3, -30])
# --8<-- [start:linear]
loss, parts = dak.linear_constrained_loss(
    hidden,
    weight,
    labels,
    beta=1.0,
    ref_logp=ref_logp,
    objective=only_learn_what_is_likely,
    return_parts=True,
)
# --8<-- [end:linear]
loss.backward()
print(f"weights of the tokens: {[round(w, 3) for w in parts.weight.tolist()]}")

model, tokenizer = tiny.load()
example = tokenize_chat(tokenizer, tiny.CHATS)[0]
input_ids, targets = torch.tensor([example.input_ids]), torch.tensor([example.labels])
ref = torch.full(targets.shape, -3.0)
# --8<-- [start:head]
with hf.attached(model):
    rule = hf.ConstrainedLoss(beta=1.0, ref_logp=ref, objective=only_learn_what_is_likely)
    out = model(input_ids=input_ids, labels=targets, dak_loss=rule)
# --8<-- [end:head]
# --8<-- [start:train]
config = TrainConfig("out", objective=only_learn_what_is_likely, max_steps=2)
result = fit(model, tokenizer, config, data=tiny.CHATS)
# --8<-- [end:train]
print(f"in a model {out.loss.item():.3f}, after two steps of training {result.metrics['nll']:.3f}")
