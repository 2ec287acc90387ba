"""Specification of token_logp.

For one row with target y and z, m, s as in `_rows.py`:

    logp            = (z_y - m) - s                                     [nats], never above 0
    d logp / d x_v  = (1[v = y] - exp((z_v - m) - s)) * dz_v/dx_v       (1 - p_y is -expm1(logp))

Edge cases, which every backend must match:
  * target == ignore_index: logp, normaliser and gradient are 0; the logits and the upstream
    gradient of that row are never used (NaN there does not leak);
  * target outside 0..V-1: logp and the whole gradient row are NaN (no device sync is needed to
    notice);
  * a row of only -inf: NaN, as in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepalign_kernels.reference._rows import log_probs, masked, normaliser, score_slope, scores


def outside(target: Tensor, vocab: int) -> Tensor:
    return (target < 0) | (target >= vocab)


def token_logp_fwd(
    logits: Tensor, target: Tensor, ignore_index: int, temperature: float, softcap: float
) -> tuple[Tensor, Tensor]:
    z = scores(logits, temperature, softcap)
    norm, vocab = normaliser(z), z.shape[-1]
    picked = z.gather(-1, target.clamp(0, vocab - 1)[:, None])
    logp = torch.where(outside(target, vocab), torch.nan, log_probs(picked, norm)[:, 0])
    logp, norm = masked(target != ignore_index, logp, norm)
    return logp, norm


def token_logp_bwd(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    norm: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float,
    out: Tensor,
) -> None:
    logp = log_probs(scores(logits, temperature, softcap), norm)
    index = target.clamp(0, logp.shape[-1] - 1)[:, None]
    d = (-logp.exp()).scatter(-1, index, -torch.expm1(logp.gather(-1, index)))
    d = grad[:, None].to(d.dtype) * d * score_slope(logits, temperature, softcap)
    d = torch.where(outside(target, logp.shape[-1])[:, None], torch.nan, d)
    (d,) = masked(target != ignore_index, d)
    out.copy_(d.view(out.shape))


def token_logp_fused(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float,
    out: Tensor,
) -> Tensor:
    """logp [N] where its upstream gradient is known before: both in one call."""
    tail = (ignore_index, temperature, softcap)
    logp, norm = token_logp_fwd(logits, target, *tail)
    token_logp_bwd(grad, logits, target, norm, *tail, out)
    return logp
