"""What an analysis wants beside `linear_token_stats`, from the same scores: ranks, margins and the
gradient of the head.

    rank_t      = 1 + #{v : z_v > z_y}                        of the target y among the vocabulary
    top_logp_t  = max_v log p_v
    slope_t     = || d log p_y / d x ||_2                     x: what the head returns

With W the head and h its input, ||d log p_y / d W||_F = slope_t ||h_t||: the gradient is the outer
product of the two vectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from deepalign_kernels import check
from deepalign_kernels.ops.linear.options import HeadOptions, checked_call
from deepalign_kernels.ops.linear.plan import EAGER_BLOCK
from deepalign_kernels.ops.linear.torch_ops import per_token
from deepalign_kernels.ops.linear.types import KINDS, Options, RowFunction, Rows
from deepalign_kernels.ops.logits.token_stats import TokenStats, stats_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TokenProfile(NamedTuple):
    """Everything known about each position, [...], fp32 (fp64 for fp64 heads), in nats."""

    stats: TokenStats
    rank: Tensor  # of the target under the policy; 1 is the most probable
    ref_rank: Tensor
    top_logp: Tensor  # log-probability of the policy's most probable token
    ref_top_logp: Tensor
    slope: Tensor  # norm of the gradient of the target's log-probability over the scores
    ref_slope: Tensor


def linear_token_profile(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    target: Tensor,
    *,
    ref_bias: Tensor | None = None,
    js_beta: float = 0.5,
    **options: Unpack[HeadOptions],
) -> TokenProfile:
    """`linear_token_stats` and, from the same chunks of scores, ranks, margins and gradient norms.

    Two GEMMs, no gradient, and no scores beyond a chunk.

    Args:
        hidden: [..., H], as in `linear_token_stats`.
        weight: [V, H].
        ref_hidden: [..., R].
        ref_weight: [V, R].
        target: [...] int32 or int64, in 0..V-1.
        ref_bias: [V] or None.
        js_beta: as in `token_stats`.
        options: see `HeadOptions`; no process_group.

    Returns:
        TokenProfile with fields [...].

    Raises:
        ValueError: as in `linear_token_stats`; a process_group.
    """
    if options.get("process_group") is not None:
        raise ValueError("process_group: a head split over ranks has no profile, got one")
    with torch.no_grad():
        reference = (ref_hidden, ref_weight, ref_bias)
        x, o, like, _ = checked_call(
            "linear_token_profile", hidden, weight, options, reference, gradient=False
        )
        flat = check.targets("target", target, like, -100)
        x = x._replace(target=flat)
        o = o._replace(js_beta=check.number("js_beta", js_beta, above=0.0, below=1.0))
        values = per_token("profile", x, o).view(14, *hidden.shape[:-1]).unbind(0)
    return TokenProfile(stats_of(values[:8], target=True, js=True), *values[8:])


def _rows(r: Rows, o: Options) -> tuple[Tensor, ...]:
    tail = (o.ignore_index, o.js_beta, o.temperature, o.softcap)
    stats = r.call("token_stats_fwd", r.policy, r.ref, r.target, r.valid, *tail)
    rows, vocab = r.policy.shape[1:]
    own = stats.new_empty(6, rows)
    block = max(1, EAGER_BLOCK // vocab)  # temporaries that stay in the cache
    for a in range(0, rows, block):
        part = r.part(a, min(a + block, rows))
        assert part.ref is not None and part.target is not None
        for model, scores in enumerate((part.policy[0], part.ref[0])):
            own[model::2, a : a + block] = torch.stack(_one_model(scores, part.target, o))
    return (*stats.unbind(0), *own.unbind(0))


def _one_model(x: Tensor, target: Tensor, o: Options) -> tuple[Tensor, Tensor, Tensor]:
    """(rank, top_logp, slope) [n] of scores [n, V]."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    z = (x if o.softcap == 0 else o.softcap * torch.tanh(x / o.softcap)) / o.temperature
    at = target[:, None].clamp(min=0)
    rank = 1 + (z > z.gather(1, at)).sum(1)
    logp = z.log_softmax(1)
    top = logp.amax(1)
    d = logp.exp_()
    d.scatter_add_(1, at, d.new_full(at.shape, -1.0))
    if o.softcap:
        d *= 1 - torch.tanh(x / o.softcap).square()
    return rank.to(z.dtype), top, d.norm(dim=1) / o.temperature


KINDS["profile"] = RowFunction(_rows, 14, ("token_stats_fwd",), (10.5, 0.0))
