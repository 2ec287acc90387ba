from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepalign_kernels import check
from deepalign_kernels.ops.linear import sharded
from deepalign_kernels.ops.linear.options import Head, call
from deepalign_kernels.ops.linear.torch_ops import per_token
from deepalign_kernels.ops.linear.types import KINDS, Options, RowFunction, Rows
from deepalign_kernels.ops.logits.token_stats import TokenStats
from deepalign_kernels.ops.shard.group import shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    target: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    valid: Tensor | None = None,
    ignore_index: int = -100,
    js_beta: float | None = 0.5,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    max_workspace_bytes: int | None = None,
    compact: bool = True,
    logits_dtype: torch.dtype | None = None,
    process_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> TokenStats:
    """`token_stats` from the hidden states of both models, without gradients and without whole
    logits.

    The reference as in `linear_token_kl`; target, valid, ignore_index and js_beta as in
    `token_stats`; the rest as in `linear_token_logp` (over a process group ref_weight and ref_bias
    are shards too). Rows that `valid` or `ignore_index` leave out
    give 0 (False) in every field.

    Returns:
        TokenStats with fields [...]; fp32 (fp64 for fp64), in nats, top1_agree bool.

    Raises:
        ValueError: as in `linear_token_logp`.
    """
    with torch.no_grad():
        head = Head(
            bias=bias,
            lora_a=lora_a,
            lora_b=lora_b,
            lora_scale=lora_scale,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            softcap=softcap,
            logit_scale=logit_scale,
            temperature=temperature,
            max_workspace_bytes=max_workspace_bytes,
            compact=compact,
            logits_dtype=logits_dtype,
        )
        inputs, options, like = call(hidden, weight, head)
        if ref_hidden is None:
            raise ValueError("ref_hidden, ref_weight: expected tensors, got None")
        shard = shard_of(process_group, vocab_start, len(inputs.weight))
        keep = check.mask("valid", valid, like)
        if target is not None:
            flat = check.targets("target", target, like, ignore_index, shard=shard is not None)
            inputs, trained = inputs._replace(target=flat), flat != ignore_index
            keep = trained if keep is None else keep & trained
        b = 0.0 if js_beta is None else check.number("js_beta", js_beta, above=0.0, below=1.0)
        options = options._replace(ignore_index=ignore_index, js_beta=b)
        inputs = inputs._replace(valid=keep)
        if shard is None:
            values = per_token("stats", inputs, options)
        else:
            values = sharded.stats(inputs, options, shard, target)
    fields = values.view(8, *hidden.shape[:-1]).unbind(0)
    logp, ref_logp, kl, kl_rev, js, entropy, ref_entropy, agree = fields
    return TokenStats(
        logp if target is not None else None,
        ref_logp if target is not None else None,
        kl,
        kl_rev,
        None if js_beta is None else js,
        entropy,
        ref_entropy,
        agree > 0.5,
    )


def _rows(r: Rows, o: Options) -> tuple[Tensor, ...]:
    tail = (o.ignore_index, o.js_beta, o.temperature, o.softcap)
    return r.call("token_stats_fwd", r.policy, r.ref, r.target, r.valid, *tail).unbind(0)


KINDS["stats"] = RowFunction(_rows, 8, ("token_stats_fwd",), (10.5, 0.0))
