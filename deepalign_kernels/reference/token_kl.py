"""Specification of token_kl.

For one row, q = softmax of the policy's scores, p = softmax of the reference's, b = js_beta and
m = b p + (1 - b) q:

    POLICY_REF   KL(q || p) = sum_v q_v (log q_v - log p_v)
                 d/dz_v = q_v (log q_v - log p_v - KL)
    REF_POLICY   KL(p || q) = sum_v p_v (log p_v - log q_v)
                 d/dz_v = q_v - p_v
    JS           b KL(p || m) + (1 - b) KL(q || m)
                 d/dz_v = (1 - b) q_v (log(q_v / m_v) - KL(q || m))

z are the policy's scores; the gradient with respect to its logits has the slope of `_rows.py` on
top. The reference is frozen. `center` is the row sum that the gradient subtracts: KL for
POLICY_REF, KL(q || m) for JS, 0 for REF_POLICY. The generalised JS divergence is that of GKD (arXiv
2306.13649, eq. 1); it goes to 0 with b or 1 - b: JS / b -> KL(p || q) for b -> 0, JS / (1 - b) ->
KL(q || p) for b -> 1.

Edge cases, which every backend must match:
  * rows with valid = False: everything is 0 and the logits are never used (NaN too);
  * a column whose own logit is -inf contributes 0 (0 log 0 = 0), also where both are -inf;
  * support mismatch in a KL (own logit finite, the other -inf): the KL is +inf, even where the own
    probability underflows. POLICY_REF then has a NaN gradient row; REF_POLICY has q - p as always;
  * equal logits: value exactly 0, gradient exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepalign_kernels.reference._rows import log_probs, masked, normaliser, score_slope, scores

POLICY_REF, REF_POLICY, JS = 0, 1, 2


def kl_terms(own: Tensor, other: Tensor) -> Tensor:
    """Elementwise terms of KL(own || other) from log-probabilities."""
    term = own.exp() * (own - other)
    term = torch.where(other == -torch.inf, torch.inf, term)
    return torch.where(own == -torch.inf, 0.0, term)


def log_mixture_ratios(logq: Tensor, logp: Tensor, b: float) -> tuple[Tensor, Tensor]:
    """log(m/q) and log(m/p): exactly 0 where p = q, and no overflow where they are far apart."""
    d = logp - logq
    far = d.abs().neg_()
    near = torch.where(d <= 0, _log_mix(b, 1 - b, far), _log_mix(1 - b, b, far))
    return near + d.clamp(min=0), near - d.clamp(max=0)


def _log_mix(share: float, rest: float, far: Tensor) -> Tensor:
    """log(share exp(far) + rest), for far <= 0 and share + rest = 1: by log1p where the sum is near
    1. Where it is small it is summed as it stands: fp32 has no share between 1 - 6e-8 and 1."""
    below_one = torch.expm1(far).mul_(share)
    small = torch.exp(far).mul_(share).add_(rest).log_()
    return torch.where(below_one < -0.5, small, below_one.log1p_())


def mixture_parts(logq: Tensor, logp: Tensor, b: float) -> tuple[Tensor, Tensor]:
    log_mq, log_mp = log_mixture_ratios(logq, logp, b)
    q_part = torch.where(logq == -torch.inf, 0.0, -logq.exp() * log_mq).sum(-1)
    return q_part, torch.where(logp == -torch.inf, 0.0, -logp.exp() * log_mp).sum(-1)


def token_kl_fwd(
    policy: Tensor,
    ref: Tensor,
    valid: Tensor | None,
    direction: int,
    js_beta: float,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    zq, zp = scores(policy, temperature, softcap), scores(ref, temperature, softcap)
    norm_q, norm_p = normaliser(zq), normaliser(zp)
    logq, logp = log_probs(zq, norm_q), log_probs(zp, norm_p)
    if direction == POLICY_REF:
        kl = kl_terms(logq, logp).sum(-1)
        center = kl.clone()
    elif direction == REF_POLICY:
        kl = kl_terms(logp, logq).sum(-1)
        center = torch.zeros_like(kl)
    else:
        center, ref_part = mixture_parts(logq, logp, js_beta)
        kl = js_beta * ref_part + (1 - js_beta) * center
    return masked(valid, kl, norm_q, norm_p, center)  # type: ignore[return-value]


def token_js_parts(
    policy: Tensor,
    ref: Tensor,
    valid: Tensor | None,
    norm_policy: Tensor,
    norm_ref: Tensor,
    js_beta: float,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """What these columns add to KL(q || m) and KL(p || m), [N] each, under normalisers that may be
    those of a larger vocabulary."""
    logq = log_probs(scores(policy, temperature, softcap), norm_policy)
    logp = log_probs(scores(ref, temperature, softcap), norm_ref)
    return masked(valid, *mixture_parts(logq, logp, js_beta))  # type: ignore[return-value]


def token_kl_bwd(
    grad: Tensor,
    policy: Tensor,
    ref: Tensor,
    valid: Tensor | None,
    norm_policy: Tensor,
    norm_ref: Tensor,
    center: Tensor,
    direction: int,
    js_beta: float,
    temperature: float,
    softcap: float,
    out: Tensor,
) -> None:
    logq = log_probs(scores(policy, temperature, softcap), norm_policy)
    logp = log_probs(scores(ref, temperature, softcap), norm_ref)
    if direction == POLICY_REF:
        d = torch.where(logq == -torch.inf, 0.0, logq.exp() * ((logq - logp) - center[:, None]))
        d = torch.where(center[:, None] == torch.inf, torch.nan, d)
    elif direction == REF_POLICY:
        d = logq.exp() - logp.exp()
    else:
        log_mq, _ = log_mixture_ratios(logq, logp, js_beta)
        d = (1 - js_beta) * logq.exp() * (-log_mq - center[:, None])
        d = torch.where(logq == -torch.inf, 0.0, d)
    d = grad[:, None].to(d.dtype) * d * score_slope(policy, temperature, softcap)
    (d,) = masked(valid, d)
    out.copy_(d.view(out.shape))


def token_kl_fused(
    grad: Tensor,
    policy: Tensor,
    ref: Tensor,
    valid: Tensor | None,
    direction: int,
    js_beta: float,
    temperature: float,
    softcap: float,
    out: Tensor,
) -> Tensor:
    """The divergence [N] where its upstream gradient is known before: both in one call."""
    tail = (direction, js_beta, temperature, softcap)
    kl, norm_policy, norm_ref, center = token_kl_fwd(policy, ref, valid, *tail)
    token_kl_bwd(grad, policy, ref, valid, norm_policy, norm_ref, center, *tail, out)
    return kl
