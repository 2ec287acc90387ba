"""The losses in plain torch, as one would write them without a kernel: baselines, and in fp64 the
truth.

Each function maps the inputs of `cases.py` to one value per token, in fp32 (fp64 for fp64 inputs),
and leaves 0 where the target is IGNORE. Nothing here comes from `deepalign_kernels.reference`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
JS_BETA = 0.5
Inputs = dict[str, Tensor]


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def logp(logits: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy(wide(logits), target, ignore_index=IGNORE, reduction="none")


def log_probs(x: Inputs) -> tuple[Tensor, Tensor]:
    return wide(x["policy"]).log_softmax(-1), wide(x["ref"]).log_softmax(-1)


def kl(own: Tensor, other: Tensor) -> Tensor:
    return (own.exp() * (own - other)).sum(-1)


def js(q: Tensor, p: Tensor) -> Tensor:
    m = torch.logaddexp(q + math.log(1 - JS_BETA), p + math.log(JS_BETA))
    return JS_BETA * kl(p, m) + (1 - JS_BETA) * kl(q, m)


def trained(x: Inputs, values: Tensor) -> Tensor:
    return torch.where(x["target"] != IGNORE, values, torch.zeros_like(values))


def token_logp(x: Inputs) -> Tensor:
    return logp(x["policy"], x["target"])


def token_entropy(x: Inputs) -> Tensor:
    logp = wide(x["policy"]).log_softmax(-1)
    return trained(x, -(logp.exp() * logp).sum(-1))


def token_kl_policy_ref(x: Inputs) -> Tensor:
    q, p = log_probs(x)
    return trained(x, kl(q, p))


def token_kl_ref_policy(x: Inputs) -> Tensor:
    q, p = log_probs(x)
    return trained(x, kl(p, q))


def token_kl_js(x: Inputs) -> Tensor:
    q, p = log_probs(x)
    return trained(x, js(q, p))


def constrained(x: Inputs, policy_logp: Tensor, ref_logp: Tensor) -> Tensor:
    """(2 / beta) softplus(beta (ref_logp - policy_logp)), from log-probabilities [T]; beta > 0."""
    beta = x["beta"].to(policy_logp.dtype)
    delta = ref_logp.to(policy_logp.dtype) - policy_logp
    return trained(x, -2 / beta * F.logsigmoid(-beta * delta))


def constrained_ref_logits(x: Inputs) -> Tensor:
    with torch.no_grad():
        ref = logp(x["ref"], x["target"])
    return constrained(x, logp(x["policy"], x["target"]), ref)


def constrained_ref_logp(x: Inputs) -> Tensor:
    return constrained(x, logp(x["policy"], x["target"]), x["ref_logp"])


def token_stats(x: Inputs) -> Tensor:
    """[7, T]: logp, ref_logp, KL both ways, JS, both entropies."""
    q, p = log_probs(x)
    index = x["target"].clamp(min=0)[:, None]
    rows = (q.gather(-1, index)[:, 0], p.gather(-1, index)[:, 0], kl(q, p), kl(p, q), js(q, p))
    entropies = (-(q.exp() * q).sum(-1), -(p.exp() * p).sum(-1))
    return torch.stack([trained(x, row) for row in (*rows, *entropies)])


def with_logits(x: Inputs) -> Inputs:
    """Add the logits of the linear cases: hidden [T, H] times weight [V, H], in the inputs'
    dtype.
    """
    logits = {"policy": F.linear(x["hidden"], x["weight"])}
    if "ref_hidden" in x:
        with torch.no_grad():
            logits["ref"] = F.linear(x["ref_hidden"], x["ref_weight"])
    return {**x, **logits}
