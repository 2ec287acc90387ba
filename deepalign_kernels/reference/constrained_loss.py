"""Specification of constrained_loss: equation 3 of arXiv 2406.05946 and its gradient, equation 5.

The formulas, `exact` and `surrogate`, stand in `rules.py`; here they meet the log-probabilities of
`token_logp.py`, which make the gradient over the logits.

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

from torch import Tensor

from deepalign_kernels import rules
from deepalign_kernels.reference._rows import masked
from deepalign_kernels.reference.token_logp import token_logp_bwd, token_logp_fwd


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
    name = "surrogate" if surrogate else "exact"
    loss, weight = rules.run(name, min_weight, logp, ref_logp, beta.to(logp.dtype))
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
