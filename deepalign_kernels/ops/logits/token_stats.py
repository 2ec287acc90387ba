from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from deepalign_kernels import check
from deepalign_kernels.ops._register import accumulator, call, define
from deepalign_kernels.ops.shard import merge
from deepalign_kernels.ops.shard.group import IGNORED, Shard, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TokenStats(NamedTuple):
    """What `token_stats` returns; every field is [...], in nats unless said otherwise."""

    logp: Tensor | None  # log-probability of the target under the policy; None without a target
    ref_logp: Tensor | None  # the same under the reference
    kl_policy_ref: Tensor  # KL(policy || ref)
    kl_ref_policy: Tensor  # KL(ref || policy)
    js: Tensor | None  # generalised Jensen-Shannon divergence; None for js_beta=None
    entropy: Tensor  # of the policy
    ref_entropy: Tensor  # of the reference
    top1_agree: Tensor  # bool: both rows have their first maximum in the same column


def stats_of(rows: Sequence[Tensor], *, target: bool, js: bool) -> TokenStats:
    """The rows of the specification as TokenStats; `target`, `js`: whether they were asked for.

    Where a row holds a NaN its entropy is NaN; which column is then its maximum depends on the
    order in which a backend compares, and so it agrees with nothing.
    """
    logp, ref_logp, kl, kl_rev, js_row, entropy, ref_entropy, agree = rows
    known = ~(entropy + ref_entropy).isnan()
    return TokenStats(
        logp if target else None,
        ref_logp if target else None,
        kl,
        kl_rev,
        js_row if js else None,
        entropy,
        ref_entropy,
        (agree > 0.5) & known,
    )


def token_stats(
    policy_logits: Tensor,
    ref_logits: Tensor,
    target: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    ignore_index: int = -100,
    js_beta: float | None = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    process_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> TokenStats:
    """What two models say about each position: one launch over both logits, no gradients.

    Args:
        policy_logits: [..., V] bf16, fp16 or fp32 (fp64 on the eager backend), last stride 1, any
            row stride. No gradient flows, whether it is detached or not.
        ref_logits: same shape, dtype and device; no gradient flows.
        target: [...] int32 or int64, or None. Rows with `ignore_index` are left out.
        valid: [...] bool, or None for all. Rows left out give 0 (False) in every field.
        ignore_index: the target value that marks a row to leave out.
        js_beta: weight of the reference in the mixture, strictly between 0 and 1, or None: no JS.
            It alone needs both normalisers first, so it costs a second look at the row (in reverse,
            out of the cache).
        temperature: divides both models' scores, > 0.
        softcap: tanh cap applied before the temperature, > 0, or None.
        process_group: the ranks that hold [..., V_r] shards of both models' logits, as in
            `token_logp`.
        vocab_start: the first column of this rank's shard, as in `token_logp`.

    Returns:
        TokenStats; fp32 (fp64 for fp64 logits), top1_agree bool, False where an entropy is NaN.

    Raises:
        ValueError: a wrong shape, dtype, device or stride, a group this rank is not in; the message
            names the argument.

    Communication (`process_group`): one all-gather of 48 bytes per row from every other rank, and
    one of 8 for js (double for fp64); the shards are read twice, three times for js.

    Formulas and edge cases: `reference/token_stats.py`.
    """
    policy = check.logits3("policy_logits", policy_logits)
    check.same_kind("ref_logits", ref_logits, "policy_logits", policy_logits, frozen=False)
    ref = check.logits3("ref_logits", ref_logits)
    shard, flat = shard_of(process_group, vocab_start, policy.shape[-1]), None
    if target is not None:
        flat = check.targets("target", target, policy_logits, ignore_index, shard=shard is not None)
    keep = check.mask("valid", valid, policy_logits)
    b = 0.0 if js_beta is None else check.number("js_beta", js_beta, above=0.0, below=1.0)
    options = check.score_options(temperature, softcap)
    with torch.no_grad():
        x, y = policy.detach(), ref.detach()
        if shard is None:
            out = _fwd(x, y, flat, keep, ignore_index, b, *options)
        else:
            start, column = shard.starts_at(policy.device), None
            if flat is not None and target is not None:
                shard.compare_targets(flat, ignore_index, target)
                column = shard.column(flat, ignore_index, start)
            out = _sharded(x, y, column, start, keep, shard, b, *options)
        rows = out.view(8, *policy_logits.shape[:-1]).unbind(0)
    return stats_of(rows, target=target is not None, js=js_beta is not None)


_fwd = define(
    "token_stats_fwd(Tensor policy, Tensor ref, Tensor? target, Tensor? valid, int ignore_index,"
    " float js_beta, float temperature, float softcap) -> Tensor"
)


@torch.library.register_fake("deepalign::token_stats_fwd")
def _(policy: Tensor, *rest: Any) -> Tensor:
    return policy.new_empty((8, policy.shape[0] * policy.shape[1]), dtype=accumulator(policy.dtype))


# Over a process group


def _sharded(
    policy: Tensor,
    ref: Tensor,
    column: Tensor | None,
    start: Tensor,
    valid: Tensor | None,
    shard: Shard,
    js_beta: float,
    *options: float,
) -> Tensor:
    """[8, N], the rows of `token_stats_fwd`, under the whole vocabulary."""
    if column is not None:
        trained = column != IGNORED
        valid = trained if valid is None else valid & trained
    rows = merge.stats_rows(call, policy, ref, column, valid, *options)
    everyone = shard.exchange(*rows, start.to(rows[0].dtype).expand_as(rows[0]))
    acc, parts = accumulator(policy.dtype), None
    if js_beta > 0:
        norms = merge.zeroed(valid, acc, *(m.norm(acc) for m in merge.models(*everyone[:4])))
        parts = shard.exchange(
            *call("token_js_parts", policy, ref, valid, *norms, js_beta, *options)
        )
    out = merge.stats_of(everyone, parts, js_beta, column is not None)
    return torch.stack(merge.zeroed(valid, acc, *out))
