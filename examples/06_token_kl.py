"""How deep does fine-tuning reach? KL between two models at each position of a response.

python examples/06_token_kl.py
"""

import torch

import deepalign_kernels as dak

torch.manual_seed(0)
B, T, V = 64, 20, 1000  # responses, positions, vocabulary
ref_logits = torch.randn(B, T, V)  # of the model before
change = torch.tensor([3.0, 2.0, 1.0] + [0.2] * (T - 3))[:, None]  # mostly in the first tokens
policy_logits = ref_logits + change * torch.randn(B, T, V)  # of the model after
labels = torch.randint(V, (B, T))
labels[: B // 2, 15:] = -100  # shorter responses: padding

# --8<-- [start:kl]
valid = labels != -100
kl = dak.token_kl(policy_logits, ref_logits, direction="policy_ref", valid=valid)  # [B, T], nats
by_position = kl.sum(0) / valid.sum(0)  # mean over responses: figure 1 of the paper
# --8<-- [end:kl]

# --8<-- [start:other]
kl_other = dak.token_kl(policy_logits, ref_logits, direction="ref_policy", valid=valid)
js = dak.token_kl(policy_logits, ref_logits, direction="js", js_beta=0.5, valid=valid)
# --8<-- [end:other]

# --8<-- [start:stats]
stats = dak.token_stats(policy_logits, ref_logits, labels)  # all of it in one pass, no gradient
shown = stats.kl_policy_ref, stats.entropy, stats.top1_agree
# --8<-- [end:stats]
torch.testing.assert_close(stats.kl_policy_ref, kl)
torch.testing.assert_close(stats.kl_ref_policy, kl_other)
assert (js >= -1e-6).all() and (js <= 0.7).all()  # never above log 2

for position, value in enumerate(by_position.tolist(), 1):
    print(f"{position:3d} {value:7.3f} {'#' * round(8 * value)}")
