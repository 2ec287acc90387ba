"""Specification of constrained_loss: equation 3 of arXiv 2406.05946 and its gradient, equation 5.

For one trained token with log-probabilities logp (policy) and ref_logp (reference, frozen),
beta >= 0 and Delta = ref_logp - logp:

    weight     w    = 2 sigmoid(beta Delta), in (0, 2); 1 where the models agree
    exact      loss = (2 / beta) softplus(beta Delta); for beta = 0 its limit less a constant, Delta
    surrogate  loss = max(w, min_weight) * (-logp), w held fixed: the authors' code (floor 1e-3)
    gradient   d loss / d logp = -w      (surrogate: -max(w, min_weight))

Edge cases, which every backend must match:
  * target == ignore_index: loss, logp, ref_logp, weight and gradient are 0; nothing of the row is
    used;
  * target outside 0..V-1, beta < 0, or NaN in logp, ref_logp or beta (a row of only -inf is NaN,
    as in `token_logp.py`): loss, weight and the whole gradient row are NaN, also for beta = 0 and
    the surrogate, whose formulas could leave ref_logp out: no token trains on a broken reference;
  * ref_logp = -inf: w = 0 and loss 0; logp = -inf: w = 2 and loss +inf (for beta = 0: w = 1 and
    loss Delta = -inf and +inf); both -inf: Delta counts as 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepalign_kernels.reference._rows import masked
from deepalign_kernels.reference.token_logp import token_logp_bwd, token_logp_fwd


def token_loss(
    logp: Tensor, ref_logp: Tensor, beta: Tensor, surrogate: bool, min_weight: float
) -> tuple[Tensor, Tensor]:
    """(loss, weight), elementwise over vectors of one shape."""
    delta = torch.where(logp == ref_logp, 0.0, ref_logp - logp)
    u = torch.where(beta == 0, torch.zeros_like(delta), beta * delta)
    weight = torch.where((beta < 0) | delta.isnan(), torch.nan, 2 * torch.sigmoid(u))
    if surrogate:
        weight = weight.clamp(min=min_weight)
        return weight * -logp, weight
    softplus = u.clamp(min=0) + torch.log1p(torch.exp(-u.abs()))
    loss = torch.where(beta == 0, delta, 2 * softplus / beta)
    return torch.where(beta < 0, torch.nan, loss), weight


def constrained_loss_fwd(
    policy: Tensor,
    target: Tensor,
    beta: Tensor,
    ref_logits: Tensor | None,
    ref_logp: Tensor | None,
    ignore_index: int,
    surrogate: bool,
    min_weight: float,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logp, ref_logp, weight) [N] and the policy's normaliser [N, 2]."""
    logp, norm = token_logp_fwd(policy, target, ignore_index, temperature, softcap)
    if ref_logits is not None:
        ref_logp, _ = token_logp_fwd(ref_logits, target, ignore_index, temperature, softcap)
    assert ref_logp is not None
    ref_logp = ref_logp.to(logp.dtype)
    loss, weight = token_loss(logp, ref_logp, beta.to(logp.dtype), surrogate, min_weight)
    loss, ref_logp, weight = masked(target != ignore_index, loss, ref_logp.clone(), weight)
    return loss, logp, ref_logp, weight, norm


def constrained_loss_fused(
    policy: Tensor,
    target: Tensor,
    beta: Tensor,
    ref_logits: Tensor | None,
    ref_logp: Tensor | None,
    scale: Tensor,
    ignore_index: int,
    surrogate: bool,
    min_weight: float,
    temperature: float,
    softcap: float,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, logp, ref_logp, weight) [N]; writes the gradient of scale * sum(loss) to `out`."""
    loss, logp, ref_logp, weight, norm = constrained_loss_fwd(
        policy,
        target,
        beta,
        ref_logits,
        ref_logp,
        ignore_index,
        surrogate,
        min_weight,
        temperature,
        softcap,
    )
    token_logp_bwd(-scale * weight, policy, target, norm, ignore_index, temperature, softcap, out)
    return loss, logp, ref_logp, weight
