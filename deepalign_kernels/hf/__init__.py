"""Runs a loss inside a Hugging Face causal language model's own `lm_head` call.

The logits are then never whole in memory, and no model code is copied or patched.

    from deepalign_kernels import hf
    model = hf.attach(AutoModelForCausalLM.from_pretrained(...))
    hf.verify(model, input_ids)               # once: log-probs as from the model's own logits
    loss = hf.ConstrainedLoss(beta=beta, ref_logp=ref_logp)
    out = model(input_ids=ids, attention_mask=mask, labels=labels, dak_loss=loss)
    out.loss.backward()                       # and per token: out.logp, out.mask, out.parts

Because the loss is the head's output, every hook around the head does its work as in any other
forward: DDP, FSDP, ZeRO-3, PEFT, autocast, activation checkpointing. No code here knows a model
family: what lies between the head and the logits (a scale, a tanh cap, columns cut off) is learned
by probing.

`hf.collate` and `hf.loss_of` bring batches of `train.constrained_rows` into any loop, Lightning or
accelerate; `hf.ConstrainedMixin` into transformers' Trainer.

Two smaller ways in, both with whole logits in memory: `dak.constrained_loss(logits, ...)` in any
PyTorch loop, and `hf.install(model, hf.LogitsLoss(...))` under the Hugging Face Trainer.

A model that is not attached ignores `dak_loss=` and trains plain cross-entropy. `hf.compute_loss`
raises there; a loss object that is thrown away without having run says so in a warning.

Limits. The head's forward is swapped during a call, so threads that share a model must take turns,
and `nn.DataParallel` does not work. A forward hook of one's own on the head sees the packed losses
instead of logits, and what it changes changes the loss (`verify` finds it). `torch.compile(model)`
works, with graph breaks at the model's entry and at the head; where `fullgraph=True` is wanted,
compile the decoder layers. Needs transformers (`pip install "deepalign_kernels[train]"`).
"""

from deepalign_kernels.hf.attach import attach, attached, detach, verify
from deepalign_kernels.hf.head import Head
from deepalign_kernels.hf.logits_loss import LogitsLoss
from deepalign_kernels.hf.loss_function import compute_loss, install, uninstall
from deepalign_kernels.hf.losses import (
    ConstrainedLoss,
    HiddenRows,
    LossOutput,
    TokenKL,
    TokenLogp,
)
from deepalign_kernels.hf.rows import ReferencePass, hidden_rows, reference_pass
from deepalign_kernels.hf.trainer import ConstrainedMixin, collate, loss_of, weight_of

__all__ = [
    "ConstrainedLoss",
    "ConstrainedMixin",
    "Head",
    "HiddenRows",
    "LogitsLoss",
    "LossOutput",
    "ReferencePass",
    "TokenKL",
    "TokenLogp",
    "attach",
    "attached",
    "collate",
    "compute_loss",
    "detach",
    "hidden_rows",
    "install",
    "loss_of",
    "reference_pass",
    "uninstall",
    "verify",
    "weight_of",
]
