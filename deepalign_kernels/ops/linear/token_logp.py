from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepalign_kernels import check
from deepalign_kernels.ops.linear import sharded
from deepalign_kernels.ops.linear.options import Head, call
from deepalign_kernels.ops.linear.torch_ops import per_token
from deepalign_kernels.ops.linear.types import KINDS, Options, RowFunction, Rows
from deepalign_kernels.ops.shard.group import shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_token_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    max_workspace_bytes: int | None = None,
    compact: bool = True,
    grad_weight_dtype: torch.dtype = torch.float32,
    logits_dtype: torch.dtype | None = None,
    process_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> Tensor:
    """Log-probability of each target from hidden states; the logits are never whole in memory.

        x    = hidden @ (weight + lora_scale * lora_b @ lora_a).T + bias
        z    = softcap * tanh(logit_scale * x / softcap) / temperature
               (without softcap: logit_scale * x / temperature)
        logp = log softmax(z)[target]

    The arguments that all linear ops share are described here.

    Args:
        hidden: [..., H] bf16, fp16, fp32 or fp64. Receives the gradient.
        weight: [V, H] in the dtype of hidden; under torch.autocast both are cast, as in F.linear.
            It must be whole: no DTensor, no empty ZeRO-3 placeholder. Receives the gradient if it
            requires one, as do bias, lora_a and lora_b; for a frozen head nothing of the size V * H
            is allocated.
        target: [...] int32 or int64. Rows with `ignore_index` give 0 and gradient 0. A target
            outside 0..V-1 gives NaN.
        bias: [V], any float dtype, or None.
        softcap: > 0 or None. logit_scale: > 0. temperature: > 0.
        lora_a: [r, H], lora_b: [V, r], lora_scale: a low-rank term of the head, multiplied in the
            dtype of weight: beside a 16-bit head hidden @ lora_a.T is rounded to 16 bit, as a LoRA
            layer does, and with it up to 2^-8 (bf16) of this term of the scores. Their gradients
            need no V * H buffer either.
        max_workspace_bytes: upper bound on what a call allocates beside its inputs, results and
            gradients (bytes), what it keeps for backward included. None: chunks of 1024 to 2047
            tokens; on CUDA, for a 16-bit head that is trained, chunks of up to 1024 tokens, and
            the 16-bit gradient of the logits for up to 2 H tokens. `estimate_memory` says what a
            call takes.
        compact: True drops ignored rows before the GEMM: the work is that of the rows left. On CUDA
            this waits once for their number. False computes all rows, of which the ignored ones
            give 0: fixed shapes, no wait, and the call can be captured in a CUDA graph; the hidden
            states of ignored rows must then be finite.
        grad_weight_dtype: what the gradient of the head is summed in over chunks: torch.float32, or
            the dtype of weight (half the memory for 16-bit heads, one more rounding per chunk).
        logits_dtype: of the chunk of logits. None: fp32 (fp64 for fp64). A 16-bit head may ask for
            its own dtype, which halves the chunk, and on a CPU makes the forward GEMM 2-3 times
            faster; logits rounded to bf16 cost 4-23 % error in the gradient.
        process_group: the ranks that hold the head between them: weight, bias and lora_b are
            shards [V_r, ...], hidden, lora_a and the targets are whole and alike on all ranks.
            Every rank must make the call, and each of its backward. The gradient of every input
            is its full one: those of hidden and lora_a are all-reduced in backward, so the caller
            must not do it again. A trainer that reduce-scatters the gradient of hidden (sequence
            parallelism) splits it instead.
        vocab_start: as in `token_logp`.

    Returns:
        [...] fp32 (fp64 for fp64), in nats. Unreduced.

    Raises:
        ValueError: a wrong shape, dtype or device, a shard instead of the whole weight, a budget
            too small for one row; the message names the argument and says what to do. RuntimeError:
            a second derivative.

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
    head = Head(
        bias=bias,
        lora_a=lora_a,
        lora_b=lora_b,
        lora_scale=lora_scale,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        max_workspace_bytes=max_workspace_bytes,
        compact=compact,
        grad_weight_dtype=grad_weight_dtype,
        logits_dtype=logits_dtype,
    )
    inputs, options, like = call(hidden, weight, head)
    shard = shard_of(process_group, vocab_start, len(inputs.weight))
    flat = check.targets("target", target, like, ignore_index, shard=shard is not None)
    inputs = inputs._replace(target=flat, valid=flat != ignore_index)
    options = options._replace(ignore_index=ignore_index)
    if shard is not None:
        return sharded.logp(inputs, options, shard, target).view(target.shape)
    return per_token("logp", inputs, options)[0].view(target.shape)


def _rows(r: Rows, o: Options) -> tuple[Tensor, ...]:
    tail = (o.ignore_index, o.temperature, o.softcap)
    if r.upstream is None:
        return (r.call("token_logp_fwd", r.policy, r.target, *tail)[0],)
    return (r.call("token_logp_fused", r.upstream_rows(), r.policy, r.target, *tail, r.out),)


KINDS["logp"] = RowFunction(_rows, 1, ("token_logp_fwd", "token_logp_fused"), (2.0, 4.0))
