"""The linear ops over a process group: each rank holds [V_r, H] of the head and all hidden states.

Forward: one run of the engine over the local head for the local row scalars of all chunks, then one
exchange for the whole call (js: one more of each), so that ranks may cut their chunks as they like.
Backward: the scores again, with the normalisers of the whole vocabulary. The head's shards get
their gradient without communication. hidden and lora_a, which every rank holds whole, get a part of
theirs on every rank; `_Replicated` adds them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepalign_kernels import rules
from deepalign_kernels.ops._register import accumulator
from deepalign_kernels.ops.linear.torch_ops import local_values, with_gradient
from deepalign_kernels.ops.linear.types import KINDS, Inputs, Options, RowFunction, Rows
from deepalign_kernels.ops.logits.token_logp import settled
from deepalign_kernels.ops.shard import merge
from deepalign_kernels.ops.shard.group import IGNORED, Shard, all_reduce


class _Replicated(torch.autograd.Function):
    """A tensor that all ranks hold: itself; backward, the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_reduce(grad, ctx.group), None


def _exchanged(kind: str, x: Inputs, o: Options, shard: Shard, *more: Tensor) -> Sequence[Tensor]:
    """What the row function `kind` says about every rank's shard: [ranks, N] fp64 each."""
    with torch.no_grad():
        return shard.exchange(*local_values(kind, x, o).unbind(0), *more)


def state_of(dtype: torch.dtype, *columns: Tensor) -> Tensor:
    """`Inputs.state`: norm_policy (2), norm_ref (2), center, slope; what a kind does not use is
    0."""
    wide = torch.cat([c if c.dim() == 2 else c[:, None] for c in columns], 1)
    return wide.to(dtype)


def _attach(kind: str, x: Inputs, o: Options, shard: Shard, value: Tensor) -> Tensor:
    """`value` [N] with the gradients that the row function `kind` makes of `x.state`."""

    def replicated(t: Tensor | None) -> Tensor | None:
        if t is None or not (t.requires_grad and torch.is_grad_enabled()):
            return t
        return _Replicated.apply(t, shard.group)  # pyright: ignore[reportReturnType]

    x = x._replace(hidden=replicated(x.hidden), lora_a=replicated(x.lora_a))
    return with_gradient(kind, x, o, value)


def _placed(
    x: Inputs, o: Options, shard: Shard, shown: Tensor, start: Tensor
) -> tuple[Inputs, Options]:
    """Targets as columns of the shard; `shown`: the targets as the caller gave them."""
    assert x.target is not None
    shard.compare_targets(x.target, o.ignore_index, shown)
    column = shard.column(x.target, o.ignore_index, start)
    return x._replace(target=column), o._replace(ignore_index=IGNORED)


def logp(x: Inputs, o: Options, shard: Shard, shown: Tensor) -> Tensor:
    """[N], differentiable."""
    x, o = _placed(x, o, shard, shown, shard.starts_at(x.hidden.device))
    assert x.target is not None
    value, norm = settled(_exchanged("logp_rows", x, o, shard), x.target, o.logits)
    zeros = norm.new_zeros(len(norm), 3)
    x = x._replace(state=state_of(norm.dtype, norm, zeros, torch.ones_like(value)))
    return _attach("logp_shard", x, o, shard, value)


def kl(x: Inputs, o: Options, shard: Shard) -> Tensor:
    """[N], differentiable."""
    everywhere = torch.ones((), dtype=torch.bool, device=x.hidden.device).expand(len(x.hidden))
    shard.compare("valid", (everywhere if x.valid is None else x.valid).long())
    *norms, within = _exchanged("kl_rows", x, o, shard)
    value, *state = _divergence(x, o, shard, norms, within)
    x = x._replace(state=state_of(value.dtype, *state, torch.zeros_like(value)))
    return _attach("kl_shard", x, o, shard, value)


def _divergence(
    x: Inputs, o: Options, shard: Shard, norms: Sequence[Tensor], within: Tensor
) -> tuple[Tensor, ...]:
    """(KL, norm_policy, norm_ref, center) [N] of the whole vocabulary."""
    q, p = merge.models(*norms)
    acc = accumulator(o.logits)
    if o.direction == merge.JS:
        value, center = merge.js_of(q, p, _js_parts(x, o, shard, q, p), o.js_beta)
    else:
        own, other = (q, p) if o.direction == merge.POLICY_REF else (p, q)
        value = center = merge.kl_of(own, other, within)
    state = merge.kl_state(q, p, value, center, o.direction, acc)
    return merge.zeroed(x.valid, acc, value, *state)


def _js_parts(
    x: Inputs, o: Options, shard: Shard, q: merge.Joined, p: merge.Joined
) -> Sequence[Tensor]:
    acc = accumulator(o.logits)
    norms = merge.zeroed(x.valid, acc, q.norm(acc), p.norm(acc))
    x = x._replace(state=state_of(acc, *norms, norms[0].new_zeros(len(norms[0]), 2)))
    return _exchanged("js_parts", x, o, shard)


def constrained(x: Inputs, o: Options, shard: Shard, shown: Tensor) -> tuple[Tensor, ...]:
    """(loss, logp, ref_logp, weight, kl) [N]; the first is differentiable, kl is there with
    kl_coef."""
    x, o = _placed(x, o, shard, shown, shard.starts_at(x.hidden.device))
    column, ref_logp = x.target, x.ref_logp
    assert column is not None
    keep, kind = column != IGNORED, "logp_rows"
    if x.ref_hidden is not None:
        kind = "pair_kl_rows" if o.kl_coef else "pair_rows"
    everyone = _exchanged(kind, x, o, shard)
    value, norm = settled(everyone[:3], column, o.logits)
    if x.ref_hidden is not None:
        ref_logp, _ = settled(everyone[3:6], column, o.logits)
    loss, weight = rules.run(o.rule, o.min_weight, value, ref_logp, x.beta)
    ref_logp = torch.zeros_like(value) if ref_logp is None else ref_logp
    loss, ref_logp, weight = merge.zeroed(keep, value.dtype, loss, ref_logp, weight)
    if not o.kl_coef:
        # The gradient does not need the reference's scores again.
        x = x._replace(ref_hidden=None, ref_weight=None, ref_bias=None)
        x = x._replace(state=state_of(norm.dtype, norm, norm.new_zeros(len(norm), 3), -weight))
        return _attach("logp_shard", x, o, shard, loss), value, ref_logp, weight
    norms = (*everyone[:2], *everyone[3:5])
    divergence, norm_policy, norm_ref, center = _divergence(x, o, shard, norms, everyone[6])
    # One NaN, of a target in no shard or of an impossible column, is enough for the row.
    norm = torch.where(norm.isnan(), norm, norm_policy)
    x = x._replace(state=state_of(norm.dtype, norm, norm_ref, center, -weight))
    loss = _attach("both_shard", x, o, shard, loss + o.kl_coef * divergence)
    return loss, value, ref_logp, weight, divergence


def stats(x: Inputs, o: Options, shard: Shard, shown: Tensor | None) -> Tensor:
    """[8, N], the rows of `token_stats_fwd`."""
    start = shard.starts_at(x.hidden.device)
    if shown is not None:
        x, o = _placed(x, o, shard, shown, start)
    acc, parts = accumulator(o.logits), None
    starts = start.to(acc).expand(len(x.hidden))
    everyone = _exchanged("stats_rows", x, o, shard, starts)
    if o.js_beta > 0:
        parts = _js_parts(x, o, shard, *merge.models(*everyone[:4]))
    out = merge.stats_of(everyone, parts, o.js_beta, shown is not None)
    return torch.stack(merge.zeroed(x.valid, acc, *out))


# Row functions: what a shard says of its rows, and the gradient of what all of them said


def _target(r: Rows) -> Tensor:
    assert r.target is not None
    return r.target


def _ref(r: Rows) -> Tensor:
    assert r.ref is not None
    return r.ref


def _logp_rows(r: Rows, o: Options) -> tuple[Tensor, ...]:
    return merge.logp_rows(r.call, r.policy, _target(r), o.temperature, o.softcap)


def _pair_rows(r: Rows, o: Options) -> tuple[Tensor, ...]:
    tail = (_target(r), o.temperature, o.softcap)
    policy = merge.logp_rows(r.call, r.policy, *tail)
    return policy + merge.logp_rows(r.call, _ref(r), *tail)


def _kl_rows(r: Rows, o: Options) -> tuple[Tensor, ...]:
    swept = merge.POLICY_REF if o.direction == merge.JS else o.direction
    tail = (r.valid, swept, o.temperature, o.softcap)
    return merge.kl_rows(r.call, r.policy, _ref(r), *tail)


def _pair_kl_rows(r: Rows, o: Options) -> tuple[Tensor, ...]:
    return _pair_rows(r, o) + _kl_rows(r, o)[-1:]


def _stats_rows(r: Rows, o: Options) -> tuple[Tensor, ...]:
    tail = (r.target, r.valid, o.temperature, o.softcap)
    return merge.stats_rows(r.call, r.policy, _ref(r), *tail)


def _norms(r: Rows) -> tuple[Tensor, Tensor]:
    assert r.state is not None
    return r.state[:, :2].contiguous(), r.state[:, 2:4].contiguous()


def _js_rows(r: Rows, o: Options) -> tuple[Tensor, ...]:
    tail = (o.js_beta, o.temperature, o.softcap)
    return tuple(r.call("token_js_parts", r.policy, r.ref, r.valid, *_norms(r), *tail))


def _logp_shard(r: Rows, o: Options, out: Tensor | None = None) -> tuple[Tensor, ...]:
    assert r.state is not None and r.out is not None
    grad = r.upstream_rows() * r.state[:, 5]
    tail = (_target(r), _norms(r)[0], o.temperature, o.softcap, r.out if out is None else out)
    merge.logp_grad(r.call, grad, r.policy, *tail)
    return (grad,)  # a gradient run has no values; the engine wants one


def _kl_shard(r: Rows, o: Options, by: float = 1.0, out: Tensor | None = None) -> tuple[Tensor]:
    assert r.state is not None
    grad, center = r.upstream_rows() * by, r.state[:, 4].contiguous()
    tail = (o.direction, o.js_beta, o.temperature, o.softcap, r.out if out is None else out)
    r.call("token_kl_bwd", grad, r.policy, r.ref, r.valid, *_norms(r), center, *tail)
    return (grad,)


def _both_shard(r: Rows, o: Options) -> tuple[Tensor, ...]:
    """Each gradient is written where its input was, the KL's over the reference's scores."""
    assert r.out is not None
    _kl_shard(r, o, o.kl_coef, _ref(r))
    values = _logp_shard(r, o, r.policy)
    r.policy.add_(_ref(r))
    if r.out.dtype != r.policy.dtype:
        r.out.copy_(r.policy)
    return values


_KL = ("token_kl_fwd",)
KINDS["logp_rows"] = RowFunction(_logp_rows, 3, ("token_logp_fwd",), (2.0, 0.0))
KINDS["pair_rows"] = RowFunction(_pair_rows, 6, ("token_logp_fwd",), (2.0, 0.0))
KINDS["kl_rows"] = RowFunction(_kl_rows, 5, _KL, (5.0, 0.0))
KINDS["pair_kl_rows"] = RowFunction(_pair_kl_rows, 7, ("token_logp_fwd", *_KL), (5.0, 0.0))
KINDS["stats_rows"] = RowFunction(_stats_rows, 11, ("token_stats_fwd", *_KL), (11.25, 0.0))
KINDS["js_parts"] = RowFunction(_js_rows, 2, ("token_js_parts",), (9.25, 0.0))
KINDS["logp_shard"] = RowFunction(_logp_shard, 1, ("token_logp_bwd",), (0.0, 4.0))
KINDS["kl_shard"] = RowFunction(_kl_shard, 1, ("token_kl_bwd",), (0.0, 9.25))
KINDS["both_shard"] = RowFunction(_both_shard, 1, ("token_kl_bwd", "token_logp_bwd"), (0.0, 9.25))
