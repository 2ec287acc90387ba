"""From what each shard says about a row to what the whole row says: plain torch on [ranks, N].

A shard r of the columns has the normaliser (m_r, s_r) of `reference/_rows.py` and, under its own
normaliser, whatever the kernels of the plain ops return. With M = max m_r and

    S = log sum_r exp(m_r - M + s_r),    log w_r = m_r - M + s_r - S

(M, S) is the normaliser of the whole row and w_r the probability of shard r, so that

    log softmax(z)_y = logp_r(y) + log w_r                          r the shard that holds y
    KL(a || b)       = sum_r w_r (KL_r(a || b) + log w_r - log u_r)     w of a, u of b
    entropy          = sum_r w_r (entropy_r - log w_r)

The gradients need (M, S) and the divergence of the whole row only, and are the kernels of the plain
ops. A mixture does not come apart like this: Jensen-Shannon needs both models' normalisers first
and a second look at the shard (`token_js_parts`).

All of it is done in fp64: a few numbers per row. Models that agree give equal shares and a
divergence of 0 in every shard, so still exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepalign_kernels.ops.shard.group import ELSEWHERE, IGNORED

POLICY_REF, REF_POLICY, JS = 0, 1, 2
# Above this divergence (nats) the gradient gets it inside the reference's normaliser.
LARGE = 8.0
Call = Callable[..., Any]  # (name of an op of the logits level, its arguments)


class Joined(NamedTuple):
    """One model's rows over all shards, fp64."""

    top: Tensor  # [N] M
    log_sum: Tensor  # [N] S; -inf for a row of only -inf
    log_share: Tensor  # [ranks, N] log w_r; -inf where the shard is empty
    empty: Tensor  # [ranks, N] the shard holds nothing but -inf
    tops: Tensor  # [ranks, N] m_r, -inf where empty

    def norm(self, dtype: torch.dtype) -> Tensor:
        return torch.stack([self.top, self.log_sum], -1).to(dtype)


def joined(m: Tensor, s: Tensor) -> Joined:
    empty = s == -torch.inf
    tops = torch.where(empty, -torch.inf, m)
    top = tops.amax(0)
    top = torch.where(top == -torch.inf, 0.0, top)
    masses = torch.where(empty, -torch.inf, (m - top) + s)
    log_sum = torch.logsumexp(masses, 0)
    return Joined(top, log_sum, masses - log_sum, empty, tops)


def models(
    policy_m: Tensor, policy_s: Tensor, ref_m: Tensor, ref_s: Tensor
) -> tuple[Joined, Joined]:
    return joined(policy_m, policy_s), joined(ref_m, ref_s)


# What one shard says


def logp_rows(
    call: Call, logits: Tensor, column: Tensor, temperature: float, softcap: float
) -> tuple[Tensor, ...]:
    """(m, s, log-probability of the target within the shard; +inf if it is elsewhere), [N] each."""
    away = column == ELSEWHERE
    target = torch.where(away, 0, column)
    logp, norm = call("token_logp_fwd", logits, target, IGNORED, temperature, softcap)
    return norm[:, 0], norm[:, 1], torch.where(away, torch.inf, logp)


def kl_rows(
    call: Call,
    policy: Tensor,
    ref: Tensor,
    valid: Tensor | None,
    direction: int,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, ...]:
    """(m, s of the policy, m, s of the reference, divergence within the shard), [N] each."""
    tail = (direction, 0.5, temperature, softcap)
    kl, policy_norm, ref_norm, _ = call("token_kl_fwd", policy, ref, valid, *tail)
    return *policy_norm.unbind(1), *ref_norm.unbind(1), kl


def stats_rows(
    call: Call,
    policy: Tensor,
    ref: Tensor,
    column: Tensor | None,
    valid: Tensor | None,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, ...]:
    """Normalisers as in `kl_rows`, then the rows of `token_stats_fwd` without js."""
    target = away = None
    if column is not None:
        away, trained = column == ELSEWHERE, column != IGNORED
        target = torch.where(away, 0, column)
        valid = trained if valid is None else valid & trained
    tail = (temperature, softcap)
    *norms, _ = kl_rows(call, policy, ref, valid, POLICY_REF, *tail)
    stats = call("token_stats_fwd", policy, ref, target, valid, IGNORED, 0.0, *tail)
    logp, ref_logp, kl, kl_rev, _, entropy, ref_entropy, agree = stats.unbind(0)
    if away is not None:
        logp, ref_logp = (torch.where(away, torch.inf, x) for x in (logp, ref_logp))
    return *norms, logp, ref_logp, kl, kl_rev, entropy, ref_entropy, agree


# What the shards say together: [ranks, N] -> [N]


def logp_of(row: Joined, picked: Tensor) -> Tensor:
    """Log-probability of the target; NaN where no shard has it, or more than one does."""
    here = picked != torch.inf
    within = torch.where(row.empty, -torch.inf, picked)
    logp = torch.where(here, within + row.log_share, 0.0).sum(0)
    return torch.where(here.sum(0) == 1, logp.clamp(max=0.0), torch.nan)


def kl_of(own: Joined, other: Joined, within: Tensor) -> Tensor:
    """KL(own || other) from that within each shard; the edge cases of `reference/token_kl.py`."""
    parts = own.log_share.exp() * (within + (own.log_share - other.log_share))
    # A column of `own` that `other` masks is worth +inf also where its probability underflows.
    parts = torch.where((within == torch.inf) | other.empty, torch.inf, parts)
    kl = torch.where(own.empty, 0.0, parts).sum(0)
    return _poisoned(kl, own, other)


def entropy_of(row: Joined, within: Tensor) -> Tensor:
    parts = row.log_share.exp() * (within - row.log_share)
    return _poisoned(torch.where(row.empty, 0.0, parts).sum(0), row)


def js_of(
    policy: Joined, ref: Joined, parts: Sequence[Tensor], js_beta: float
) -> tuple[Tensor, Tensor]:
    """(divergence, its center) from the `token_js_parts` of all ranks."""
    policy_part, ref_part = parts
    center = _poisoned(policy_part.sum(0), policy, ref)
    return js_beta * ref_part.sum(0) + (1.0 - js_beta) * center, center


def agree_of(policy: Joined, ref: Joined, agree: Tensor, starts: Tensor) -> Tensor:
    """Whether both models' first maximum is one column: their first shard is one, and there it is.

    `starts` [ranks, N]: the first columns, so that ties go to the first one.
    """

    def first(row: Joined) -> Tensor:
        highest = row.tops == row.tops.amax(0)
        return torch.where(highest, starts, torch.inf).amin(0)

    shard = first(policy)
    there = ((starts == shard) & (agree > 0.5)).any(0)
    return (there & (shard == first(ref))).double()


def stats_of(
    everyone: Sequence[Tensor], parts: Sequence[Tensor] | None, js_beta: float, has_target: bool
) -> tuple[Tensor, ...]:
    """The eight rows of `reference/token_stats.py` from `stats_rows` and the starts of all ranks,
    and from `token_js_parts` of all ranks."""
    q, p = models(*everyone[:4])
    logp, ref_logp, kl, kl_rev, entropy, ref_entropy, agree, starts = everyone[4:]
    zero = torch.zeros_like(q.top)
    return (
        logp_of(q, logp) if has_target else zero,
        logp_of(p, ref_logp) if has_target else zero,
        kl_of(q, p, kl),
        kl_of(p, q, kl_rev),
        zero if parts is None else js_of(q, p, parts, js_beta)[0],
        entropy_of(q, entropy),
        entropy_of(p, ref_entropy),
        agree_of(q, p, agree, starts),
    )


def kl_state(
    policy: Joined, ref: Joined, value: Tensor, center: Tensor, direction: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(norm_policy [N, 2], norm_ref [N, 2], center [N]) for token_kl_bwd on a shard.

    The gradient of POLICY_REF is q (log q - log p - KL). A KL of 600 is rounded by 3e-5, which the
    kernels take back by the sum of the whole row's gradient being 0; a shard's is not. Subtracting
    it from log p instead, inside a normaliser that is a pair of numbers, loses nothing to begin
    with. Not for small ones, so that models that agree get a gradient of exactly 0.
    """
    norm_policy, norm_ref = policy.norm(dtype), ref.norm(dtype)
    if direction == REF_POLICY:
        return norm_policy, norm_ref, torch.zeros_like(value, dtype=dtype)
    if direction == JS:
        return norm_policy, norm_ref, center.to(dtype)
    large = value > LARGE
    at = (ref.top + ref.log_sum) - value
    top = at.to(dtype)
    folded = torch.stack([top, (at - top).to(dtype)], -1)
    norm_ref = torch.where(large[:, None], folded, norm_ref)
    impossible = (value == torch.inf)[:, None]
    norm_policy, norm_ref = (
        torch.where(impossible, torch.nan, norm) for norm in (norm_policy, norm_ref)
    )
    return norm_policy, norm_ref, torch.where(large, 0.0, value).to(dtype)


def zeroed(keep: Tensor | None, dtype: torch.dtype, *rows: Tensor) -> tuple[Tensor, ...]:
    """[N] or [N, k] in `dtype`, 0 in rows that are left out."""
    if keep is not None:
        columns = (keep.view(-1, *[1] * (x.dim() - 1)) for x in rows)
        rows = tuple(torch.where(k, x, 0.0) for k, x in zip(columns, rows, strict=True))
    return tuple(x.to(dtype) for x in rows)


def _poisoned(value: Tensor, *models: Joined) -> Tensor:
    """NaN where a model's row holds nothing but -inf, as in the plain ops."""
    for row in models:
        value = torch.where(row.log_sum == -torch.inf, torch.nan, value)
    return value


# Gradients


def logp_grad(
    call: Call,
    grad: Tensor,
    logits: Tensor,
    column: Tensor,
    norm: Tensor,
    temperature: float,
    softcap: float,
    out: Tensor,
) -> None:
    """token_logp_bwd with the normaliser of the whole row; `out` may be `logits`.

    The kernel wants a target in every row. Rows that have theirs elsewhere give it column 0, whose
    gradient 1 - p is then put right: -p.
    """
    away = column == ELSEWHERE
    x = logits[..., 0].flatten().to(norm.dtype, copy=True)  # `out` may be the logits
    target = torch.where(away, 0, column)
    call("token_logp_bwd", grad, logits, target, norm, IGNORED, temperature, softcap, out)
    slope: float | Tensor = 1.0 / temperature
    if softcap > 0:
        t = torch.tanh(x / softcap)
        x, slope = softcap * t, (1.0 - t.square()) / temperature
    p = torch.exp((x / temperature - norm[:, 0]) - norm[:, 1])
    first = out[..., 0]
    right = (-grad * p * slope).to(out.dtype).view(first.shape)
    first.copy_(torch.where(away.view(first.shape), right, first))
