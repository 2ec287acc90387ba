"""Specification of token_stats: what two models say about one position, without gradients.

The rows of the result [8, N], all fp32 (fp64 for fp64 logits), in nats:

    0 logp           log-probability of the target under the policy      (0 without a target)
    1 ref_logp       the same under the reference                        (0 without a target)
    2 kl_policy_ref  KL(policy || ref)
    3 kl_ref_policy  KL(ref || policy)
    4 js             generalised Jensen-Shannon divergence of `token_kl.py` (0 if js_beta is 0)
    5 entropy        of the policy
    6 ref_entropy    of the reference
    7 top1_agree     1.0 where the first maximum of both rows is the same column, else 0.0;
                     unspecified where entropy or ref_entropy is NaN (the public ops say False)

Rows that are not valid, and rows whose target is ignore_index, are 0. A target outside 0..V-1
poisons rows 0 and 1 with NaN and leaves the others alone. Infinities and masked columns as in
`token_kl.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepalign_kernels.reference._rows import log_probs, masked, normaliser, scores
from deepalign_kernels.reference.token_kl import JS, kl_terms, token_kl_fwd
from deepalign_kernels.reference.token_logp import outside


def _entropy(logp: Tensor) -> Tensor:
    return torch.where(logp == -torch.inf, 0.0, -logp.exp() * logp).sum(-1)


def token_stats_fwd(
    policy: Tensor,
    ref: Tensor,
    target: Tensor | None,
    valid: Tensor | None,
    ignore_index: int,
    js_beta: float,
    temperature: float,
    softcap: float,
) -> Tensor:
    zq, zp = scores(policy, temperature, softcap), scores(ref, temperature, softcap)
    logq, logp = log_probs(zq, normaliser(zq)), log_probs(zp, normaliser(zp))
    zero = logq.new_zeros(logq.shape[0])
    picked = [zero, zero]
    if target is not None:
        index, bad = target.clamp(0, zq.shape[-1] - 1)[:, None], outside(target, zq.shape[-1])
        picked = [torch.where(bad, torch.nan, x.gather(-1, index)[:, 0]) for x in (logq, logp)]
        trained = target != ignore_index
        valid = trained if valid is None else valid & trained
    js = (
        token_kl_fwd(policy, ref, None, JS, js_beta, temperature, softcap)[0]
        if js_beta > 0
        else zero
    )
    out = torch.stack(
        [
            *picked,
            kl_terms(logq, logp).sum(-1),
            kl_terms(logp, logq).sum(-1),
            js,
            _entropy(logq),
            _entropy(logp),
            (zq.argmax(-1) == zp.argmax(-1)).to(logq.dtype),
        ]
    )
    (rows,) = masked(valid, out.T)
    return rows.T.contiguous()
