"""Where two models differ, position by position, and how that moves while one is trained.

python examples/12_analyze.py [MODEL]
"""

import copy

import tiny
import torch

aligned, tokenizer = tiny.load()
base = copy.deepcopy(aligned)
with torch.no_grad():  # a change in place of an alignment
    for p in base.model.layers[0].parameters():
        p.add_(torch.randn_like(p), alpha=1.0 * float(p.std()) if p.dim() > 1 else 0.0)

# --8<-- [start:profile]
from deepalign_kernels import analyze
from deepalign_kernels.runs import curves

result = analyze.profile(aligned, base, tokenizer, {"chats": tiny.CHATS}, positions=8)
kl = result.kl_model_base  # [answers, positions], nats, NaN behind the end of an answer
band = result.curve("kl_model_base", "chats")  # mean, low, high, count by position
share = curves.share_within(kl, 5)  # of the divergence in the first five: value, low, high
# --8<-- [end:profile]
print(f"KL by position {band.mean.round(3)}, {share.value:.0%} of it in the first five")

# --8<-- [start:dynamics]
from deepalign_kernels.analyze.dynamics import Dynamics
from deepalign_kernels.train import TrainConfig, fit

watch = Dynamics(aligned, tokenizer, tiny.CHATS, every=1, folder="out/dynamics", share=None)
config = TrainConfig("out/train", objective="sft", max_steps=2, batch_size=2, log_every=1)
fit(aligned, tokenizer, config, tiny.CHATS * 8, callbacks=[watch])
# --8<-- [end:dynamics]
print("cross-entropy of the first token:", [r.data["values"]["nll"][0] for r in watch.records])

# --8<-- [start:page]
from deepalign_kernels.report import build

settings = analyze.Settings(title="aligned", positions=8, gradients="all")
pairs = analyze.pairs_of(tokenizer, tiny.CHATS, positions=8)
analyze.analyse("out/depth", aligned, base, tokenizer, pairs, settings)
page = build(["out/depth", "out/dynamics", "out/train"], "out/report.html")
# --8<-- [end:page]
print(page)
