"""Specification of token_entropy.

For one row with z, m, s as in `_rows.py`, log p_v = (z_v - m) - s and p = softmax(z):

    entropy             = - sum_v p_v log p_v                                              [nats]
    d entropy / d x_v   = - p_v (log p_v + entropy) * dz_v/dx_v

Edge cases, which every backend must match:
  * a masked column (z = -inf) adds 0 and has gradient 0: p log p goes to 0 with p;
  * a row that is not valid: entropy, normaliser and gradient are 0; its logits and its upstream
    gradient are never used;
  * a row of only -inf, or with a NaN: entropy and the whole gradient row are NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepalign_kernels.reference._rows import log_probs, masked, normaliser, score_slope, scores


def token_entropy_fwd(
    logits: Tensor, valid: Tensor | None, temperature: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Entropy [N] and normaliser [N, 2]."""
    z = scores(logits, temperature, softcap)
    norm = normaliser(z)
    logp = log_probs(z, norm)
    entropy = torch.where(logp == -torch.inf, 0.0, -logp.exp() * logp).sum(-1)
    entropy, norm = masked(valid, entropy, norm)
    return entropy, norm


def token_entropy_bwd(
    grad: Tensor,
    logits: Tensor,
    valid: Tensor | None,
    norm: Tensor,
    entropy: Tensor,
    temperature: float,
    softcap: float,
    out: Tensor,
) -> None:
    logp = log_probs(scores(logits, temperature, softcap), norm)
    d = torch.where(logp == -torch.inf, 0.0, -logp.exp() * (logp + entropy[:, None]))
    d = torch.where(entropy.isnan()[:, None], torch.nan, d)
    d = grad[:, None].to(d.dtype) * d * score_slope(logits, temperature, softcap)
    (d,) = masked(valid, d)
    out.copy_(d.view(out.shape))
