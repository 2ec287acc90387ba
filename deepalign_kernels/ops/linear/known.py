"""Per-token values whose forward also leaves what the backward by tiles of the vocabulary needs.

The row functions here are those of the values, with the normalisers. The gradients are those of a
shard that is the whole vocabulary (`sharded.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepalign_kernels.ops._register import accumulator
from deepalign_kernels.ops.linear.constrained_loss import values_of
from deepalign_kernels.ops.linear.sharded import state_of
from deepalign_kernels.ops.linear.torch_ops import local_values, with_gradient
from deepalign_kernels.ops.linear.types import KINDS, KNOWN, Inputs, Options, RowFunction, Rows
from deepalign_kernels.ops.shard import merge
from deepalign_kernels.ops.shard.group import IGNORED


def _placed(x: Inputs, o: Options) -> tuple[Inputs, Options]:
    """Targets as columns of the shard."""
    assert x.target is not None
    column = torch.where(x.target == o.ignore_index, IGNORED, x.target)
    return x._replace(target=column), o._replace(ignore_index=IGNORED)


def _norm(value: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """[N, 2]; NaN where the value is: a target out of range has no column that could tell."""
    return torch.where(value.isnan()[:, None], torch.nan, torch.stack([m, s], -1))


def _logp(x: Inputs, o: Options) -> Tensor:
    x, o = _placed(x, o)
    value, m, s = local_values("logp_state", x, o)
    zeros = value.new_zeros(len(value), 3)
    x = x._replace(state=torch.cat([_norm(value, m, s), zeros, torch.ones_like(m)[:, None]], 1))
    return with_gradient("logp_shard", x, o, value)[None]


def _kl_state(x: Inputs, o: Options, value: Tensor, *found: Tensor) -> tuple[Tensor, ...]:
    """(norm_policy [N, 2], norm_ref [N, 2], center [N]) of rows m, s, m, s, center."""
    *norms, center = (row.double() for row in found)
    models = merge.models(*(row[None] for row in norms))
    acc = accumulator(o.logits)
    state = merge.kl_state(*models, value.double(), center, o.direction, acc)
    return merge.zeroed(x.valid, acc, *state)


def _kl(x: Inputs, o: Options) -> Tensor:
    value, *found = local_values("kl_state", x, o)
    state = _kl_state(x, o, value, *found)
    x = x._replace(state=state_of(value.dtype, *state, torch.zeros_like(value)))
    return with_gradient("kl_shard", x, o, value)[None]


def _constrained(x: Inputs, o: Options) -> Tensor:
    x, o = _placed(x, o)
    loss, logp, ref_logp, weight, m, s = local_values("constrained_state", x, o)
    # The gradient does not need the reference's scores again.
    x = x._replace(ref_hidden=None, ref_weight=None, ref_bias=None)
    zeros = loss.new_zeros(len(loss), 3)
    x = x._replace(state=torch.cat([_norm(loss, m, s), zeros, -weight[:, None]], 1))
    return torch.stack([with_gradient("logp_shard", x, o, loss), logp, ref_logp, weight])


def _constrained_kl(x: Inputs, o: Options) -> Tensor:
    x, o = _placed(x, o)
    loss, logp, ref_logp, weight, kl, *found = local_values("constrained_kl_state", x, o)
    norm, norm_ref, center = _kl_state(x, o, kl, *found)
    norm = torch.where(logp.isnan()[:, None], torch.nan, norm)
    x = x._replace(state=state_of(loss.dtype, norm, norm_ref, center, -weight))
    return torch.stack([with_gradient("both_shard", x, o, loss), logp, ref_logp, weight, kl])


# Row functions


def _logp_rows(r: Rows, o: Options) -> tuple[Tensor, ...]:
    tail = (o.ignore_index, o.temperature, o.softcap)
    logp, norm = r.call("token_logp_fwd", r.policy, r.target, *tail)
    return logp, *norm.unbind(1)


def _kl_rows(r: Rows, o: Options) -> tuple[Tensor, ...]:
    tail = (r.valid, o.direction, o.js_beta, o.temperature, o.softcap)
    kl, norm_policy, norm_ref, center = r.call("token_kl_fwd", r.policy, r.ref, *tail)
    return kl, *norm_policy.unbind(1), *norm_ref.unbind(1), center


def _constrained_rows(r: Rows, o: Options) -> tuple[Tensor, ...]:
    *values, norm = values_of(r, o)
    return *values, *norm.unbind(1)


def _constrained_kl_rows(r: Rows, o: Options) -> tuple[Tensor, ...]:
    loss, *rest = _constrained_rows(r, o)[:4]
    kl, *found = _kl_rows(r, o)
    return loss + o.kl_coef * kl, *rest, kl, *found


_LOSS = ("constrained_loss_fwd", "token_logp_fwd")
KINDS["logp_state"] = RowFunction(_logp_rows, 3, ("token_logp_fwd",), (2.0, 0.0))
KINDS["constrained_state"] = RowFunction(_constrained_rows, 6, _LOSS, (2.0, 0.0))
KINDS["kl_state"] = RowFunction(_kl_rows, 6, ("token_kl_fwd",), (9.25, 0.0))
KINDS["constrained_kl_state"] = RowFunction(
    _constrained_kl_rows, 10, (*_LOSS, "token_kl_fwd"), (9.25, 0.0)
)
KNOWN |= {"logp": _logp, "kl": _kl, "js": _kl, "constrained": _constrained}
KNOWN |= {"constrained_kl": _constrained_kl, "constrained_js": _constrained_kl}
