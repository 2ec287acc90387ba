"""Short training runs, and what they leave behind."""

import importlib.util
import json
import os
import traceback
from types import SimpleNamespace

import pytest
import torch
from tiny_chat import RECORDS, build_tokenizer
from torch import nn

from deepalign_kernels.train import TrainConfig, TrainingRun
from deepalign_kernels.train.optimizers import OPTIMIZERS

MODULES = {"torchao": "torchao", "torch-optimi": "optimi", "bitsandbytes": "bitsandbytes"}
RUN = {
    "max_steps": 1, "batch_size": 7, "gradient_accumulation_steps": 1, "warmup_steps": 0,
    "save_every": None, "progress": False,
}  # fmt: skip


def cubed(logp, ref_logp, beta):
    """A rule of the user's own: a token far behind the reference weighs more."""
    delta = ref_logp - logp
    return beta * delta**3, 3 * beta * delta**2


class Bigram(nn.Module):
    """The least that the loop asks of a model, with head="logits"."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(20, 20))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.table[input_ids])


def train(model, out, data=RECORDS, ref_model=None, callbacks=(), **options):
    config = TrainConfig(out, **{**RUN, **options})
    trainer = TrainingRun(
        model, build_tokenizer(), config, data, ref_model=ref_model, callbacks=callbacks
    )
    return trainer, trainer.train()


def record_gradients(model):
    """A list that fills with the gradients of the parameters, summed over a step's micro-batches.

    They are read when the backward is done with a parameter, before clipping and the update.
    """
    seen = {}
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(
            lambda p, name=name: seen.__setitem__(name, p.grad.clone())
        )
    return seen


def log_of(out):
    return [json.loads(x) for x in (out / "train_log.jsonl").read_text().splitlines()]


def relative(ours, gold):
    """Largest deviation of any parameter's gradient, relative to the largest entry of all."""
    assert ours.keys() == gold.keys()
    top = max(g.abs().max().item() for g in gold.values())
    return max((ours[n].double() - gold[n].double()).abs().max().item() for n in gold) / top


def in_child(act):
    """Begins `act` in a process of its own; the result waits for its exit status, as a negative
    number if a signal ended it."""
    pid = os.fork()
    if pid:
        return lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        torch.set_num_threads(1)
        act()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def same_weights(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


def needs_optimizer(name):
    """Skips a test of an optimizer whose package is not here."""
    package = OPTIMIZERS[name].package
    if package and importlib.util.find_spec(MODULES[package]) is None:
        pytest.skip(f"needs {package}")
