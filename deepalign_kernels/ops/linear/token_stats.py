from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepalign_kernels import check
from deepalign_kernels.ops.linear import sharded
from deepalign_kernels.ops.linear.options import HeadOptions, checked_call
from deepalign_kernels.ops.linear.torch_ops import per_token
from deepalign_kernels.ops.linear.types import KINDS, Options, RowFunction, Rows
from deepalign_kernels.ops.logits.token_stats import TokenStats, stats_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    target: Tensor | None = None,
    *,
    ref_bias: Tensor | None = None,
    valid: Tensor | None = None,
    ignore_index: int = -100,
    js_beta: float | None = 0.5,
    vocab_start: int | None = None,
    **options: Unpack[HeadOptions],
) -> TokenStats:
    """`token_stats` from the hidden states of both models, without gradients and without whole
    logits. Rows that `valid` or `ignore_index` leave out give 0 (False) in every field.

    Args:
        hidden: [..., H], as in `linear_token_logp`.
        weight: [V, H], as in `linear_token_logp`.
        ref_hidden: [..., R], as in `linear_token_kl`.
        ref_weight: [V, R], as in `linear_token_kl`.
        target: [...] int32 or int64, or None, as in `token_stats`.
        ref_bias: [V] or None.
        valid: [...] bool, or None for all.
        ignore_index: rows with this target are left out.
        js_beta: as in `token_stats`; None leaves js out.
        vocab_start: with process_group, as in `token_logp`.
        options: see `HeadOptions`.

    Returns:
        TokenStats with fields [...]; fp32 (fp64 for fp64), in nats, top1_agree bool.

    Raises:
        ValueError: as in `linear_token_logp`.
    """
    with torch.no_grad():
        x, o, like, shard = checked_call(
            "linear_token_stats",
            hidden,
            weight,
            options,
            (ref_hidden, ref_weight, ref_bias),
            vocab_start=vocab_start,
            gradient=False,
        )
        if ref_hidden is None:
            raise ValueError("ref_hidden, ref_weight: expected tensors, got None")
        keep = check.mask("valid", valid, like)
        if target is not None:
            flat = check.targets("target", target, like, ignore_index, shard=shard is not None)
            x, trained = x._replace(target=flat), flat != ignore_index
            keep = trained if keep is None else keep & trained
        b = 0.0 if js_beta is None else check.number("js_beta", js_beta, above=0.0, below=1.0)
        o = o._replace(ignore_index=ignore_index, js_beta=b)
        x = x._replace(valid=keep)
        full = shard is None
        values = per_token("stats", x, o) if full else sharded.stats(x, o, shard, target)
    fields = values.view(8, *hidden.shape[:-1]).unbind(0)
    return stats_of(fields, target=target is not None, js=js_beta is not None)


def _rows(r: Rows, o: Options) -> tuple[Tensor, ...]:
    tail = (o.ignore_index, o.js_beta, o.temperature, o.softcap)
    return r.call("token_stats_fwd", r.policy, r.ref, r.target, r.valid, *tail).unbind(0)


KINDS["stats"] = RowFunction(_rows, 8, ("token_stats_fwd",), (10.5, 0.0))
