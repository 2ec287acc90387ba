from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from deepalign_kernels import check
from deepalign_kernels.ops.linear import sharded
from deepalign_kernels.ops.linear.options import LinearOptions, checked_call
from deepalign_kernels.ops.linear.torch_ops import per_token
from deepalign_kernels.ops.linear.types import KINDS, Options, RowFunction, Rows

if TYPE_CHECKING:
    from typing_extensions import Unpack


def linear_token_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    vocab_start: int | None = None,
    **options: Unpack[LinearOptions],
) -> Tensor:
    """Log-probability of each target from hidden states; the logits are never whole in memory.

        x    = hidden @ (weight + lora_scale * lora_b @ lora_a).T + bias
        z    = softcap * tanh(logit_scale * x / softcap) / temperature
               (without softcap: logit_scale * x / temperature)
        logp = log softmax(z)[target]

    Args:
        hidden: [..., H] bf16, fp16, fp32 or fp64. Receives the gradient.
        weight: [V, H] in the dtype of hidden; under torch.autocast both are cast, as in F.linear.
            It must be whole: no DTensor, no empty ZeRO-3 placeholder. Receives the gradient if it
            requires one, as do bias, lora_a and lora_b; for a frozen head nothing of the size V * H
            is allocated.
        target: [...] int32 or int64. A target outside 0..V-1 gives NaN.
        ignore_index: rows with this target give 0 and gradient 0.
        vocab_start: with process_group, as in `token_logp`.
        options: bias, softcap, logit_scale, temperature, lora_a, lora_b, lora_scale,
            max_workspace_bytes, compact, grad_weight_dtype, logits_dtype, process_group: see
            `LinearOptions`.

    Returns:
        [...] fp32 (fp64 for fp64), in nats. Unreduced.

    Raises:
        ValueError: a wrong shape, dtype or device, a shard instead of the whole weight, a budget
            too small for one row; the message names the argument and says what to do.
        RuntimeError: a second derivative.

    Memory: per-token results do not know their upstream gradient, but it is a factor of each row.
    Where all N tokens, ignored ones included, fit in one chunk, the forward keeps the gradient
    of the logits at an upstream of 1: trained rows * V elements (under torch.compile N * V) in
    the dtype of its products, 16 bit for 16-bit heads where their GEMMs are fast. Then
    backward is two GEMMs (3 in all). On a CPU a step does not take more for that than without,
    since a backward that makes the logits again holds the same chunk; but of several calls
    before one backward each keeps its own. A longer batch, or a max_workspace_bytes for two
    chunks or more, keeps nothing and makes the logits again (4 GEMMs). On CUDA that goes over
    tiles of the vocabulary for a head that is trained (not under torch.compile): every part of
    its gradient is written once and has no fp32 sum of its own. With a frozen head, of any
    length, the forward keeps the gradient of every row of hidden instead (2 GEMMs, [N, H]).
    Over a process group all linear ops make the logits again in backward, also with a frozen
    head and for scalar reductions; js makes them a third time.

    Communication (`process_group`): forward as in the op of the logits level, once per call and not
    per chunk; backward one all-reduce of the gradient of hidden, and one of lora_a's.
    """
    x, o, like, shard = checked_call(
        "linear_token_logp", hidden, weight, options, vocab_start=vocab_start
    )
    flat = check.targets("target", target, like, ignore_index, shard=shard is not None)
    x = x._replace(target=flat, valid=flat != ignore_index)
    o = o._replace(ignore_index=ignore_index)
    if shard is not None:
        return sharded.logp(x, o, shard, target).view(target.shape)
    return per_token("logp", x, o)[0].view(target.shape)


def _rows(r: Rows, o: Options) -> tuple[Tensor, ...]:
    tail = (o.ignore_index, o.temperature, o.softcap)
    if r.upstream is None:
        return (r.call("token_logp_fwd", r.policy, r.target, *tail)[0],)
    return (r.call("token_logp_fused", r.upstream_rows(), r.policy, r.target, *tail, r.out),)


KINDS["logp"] = RowFunction(_rows, 1, ("token_logp_fwd", "token_logp_fused"), (2.0, 4.0))
