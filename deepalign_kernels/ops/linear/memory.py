"""What a linear op will allocate, from shapes and dtypes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from deepalign_kernels import check
from deepalign_kernels.ops._reduce import REDUCTIONS
from deepalign_kernels.ops._register import accumulator
from deepalign_kernels.ops.linear import options
from deepalign_kernels.ops.linear.engine import eager_copies, total_dtypes
from deepalign_kernels.ops.linear.plan import (
    ChunkPlan,
    Phase,
    Sizes,
    backward_of,
    by_tiles,
    keeps,
    make_plan,
    refuse_late,
    released,
    tile_columns,
)
from deepalign_kernels.ops.linear.types import KINDS
from deepalign_kernels.ops.logits.token_kl import DIRECTIONS

OPS = ("linear_token_logp", "linear_token_kl", "linear_constrained_loss", "linear_token_stats")
TRAINED = ("hidden", "weight", "bias", "lora_a", "lora_b")


class MemoryEstimate(NamedTuple):
    """Bytes per part, beyond the inputs; the first two are counts."""

    chunk_tokens: int
    chunks: int
    logits: int  # chunk of the policy's logits, and of the reference's
    grad_logits: int  # their gradient where it has another dtype; else it overwrites them
    hidden_rows: int  # rows of hidden states that are gathered, converted, or scattered
    head_tile: int  # tile of the head that is converted (16-bit heads on a CPU)
    row_temporaries: int  # what the row functions hold; more for the eager backend
    workspace: int  # the five above: what max_workspace_bytes bounds
    head_copies: int  # heads in another dtype than they are multiplied in (autocast)
    grad_hidden: int
    grad_head: int  # gradients of weight, bias, LoRA, as they are summed
    results: int  # values per token, and masks
    kept: int  # of the parts above, what stays from forward to backward beside the results
    forward_peak: int
    backward_peak: int  # beyond what the forward left

    @property
    def peak(self) -> int:
        """Of one call, forward and backward; of several before a backward each keeps its own."""
        return max(self.forward_peak, self.kept + self.backward_peak)


def estimate_memory(
    op: str,
    *,
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    autocast_dtype: torch.dtype | None = None,
    trained_tokens: int | None = None,
    requires_grad: Sequence[str] = ("hidden", "weight"),
    reduction: str | None = None,
    ref_hidden_size: int | None = None,
    ref_dtype: torch.dtype | None = None,
    shared_head: bool = False,
    lora_rank: int = 0,
    kl_coef: float = 0.0,
    kl_direction: str = "policy_ref",
    max_workspace_bytes: int | None = None,
    compact: bool = True,
    grad_weight_dtype: torch.dtype = torch.float32,
    logits_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> MemoryEstimate:
    """Bytes that a linear op allocates beyond its inputs, part by part; to 2 % (tested).

    128 bytes of a row are set aside for short vectors, mostly not all used: with a vocabulary of
    1000 that is up to 3 % too much, with one of 32000 nothing. What BLAS and oneDNN keep to
    themselves (a few MB; up to 0.8 MB of packed bf16 operands in the tests) is not in it. `kept`
    is, of a scalar reduction, its gradients; of a per-token result the gradient of hidden (frozen
    head) or of the logits (all tokens are one chunk), or nothing. Under torch.compile the latter
    has a row for ignored tokens too.

    Args:
        op: name of the op, such as "linear_constrained_loss".
        tokens: N, all rows of hidden.
        hidden_size: H.
        vocab_size: V.
        dtype: of hidden, and of weight unless `weight_dtype` says otherwise.
        weight_dtype: of weight; None: as hidden.
        autocast_dtype: what torch.autocast casts both to; None: no autocast.
        trained_tokens: rows that are not ignored; None: all of them.
        requires_grad: which of "hidden", "weight", "bias", "lora_a", "lora_b" do; () for none.
        reduction: that of the call; None: the default of the op.
        ref_hidden_size: R, where the reference comes as hidden states.
        ref_dtype: of the reference's hidden states and head; None: as the policy's.
        shared_head: ref_weight is the tensor `weight`.
        lora_rank: r, 0 without.
        kl_coef: as in the call.
        kl_direction: as in the call; also the direction of linear_token_kl.
        max_workspace_bytes: as in the call.
        compact: whether ignored rows are dropped first.
        grad_weight_dtype: what the gradient of the head is summed in.
        logits_dtype: of the chunk of logits.
        device: "cpu" or "cuda", where the call would run.

    Raises:
        ValueError: an unknown name, an argument that no call of this op could have, a budget too
            small for one row.
    """
    check.one_of("op", op, OPS)
    for name in requires_grad:
        check.one_of("requires_grad", name, TRAINED)
    _check_sizes(tokens, trained_tokens, hidden_size, vocab_size, lora_rank)
    _check_dtypes(dtype, weight_dtype, autocast_dtype, ref_dtype)
    _check_reference(op, hidden_size, ref_hidden_size, shared_head, kl_coef)
    check.flag("compact", compact)
    options.workspace(max_workspace_bytes)
    weight_dtype = weight_dtype or dtype
    compute = autocast_dtype or weight_dtype
    ref_size = hidden_size if shared_head else ref_hidden_size or 0
    ref_compute = autocast_dtype or ref_dtype or dtype
    logits = options.logits_dtype(logits_dtype, (compute, ref_compute) if ref_size else (compute,))
    kind = _kind(op, kl_coef, kl_direction)
    device = _device(device)
    sizes = Sizes(
        rows=tokens if trained_tokens is None or not compact else trained_tokens,
        tokens=tokens,
        hidden=hidden_size,
        vocab=vocab_size,
        device=device,
        compute=compute,
        logits=logits,
        hidden_dtype=dtype,
        weight_dtype=weight_dtype,
        accumulate=options.accumulate_dtype(grad_weight_dtype, weight_dtype),
        ref_hidden=ref_size,
        ref_compute=ref_compute,
        ref_dtypes=(ref_dtype or dtype, ref_dtype or dtype),
        shared_head=shared_head,
        rank=lora_rank,
        values=KINDS[kind].values,
        eager_copies=eager_copies(kind, device, logits, False),
    )
    scalar = op in ("linear_constrained_loss", "linear_token_kl")  # has a reduction
    reduction = reduction or ("mean" if op == "linear_constrained_loss" else "none")
    check.one_of("reduction", reduction, REDUCTIONS if scalar else ("none",))
    wanted = tuple(name in requires_grad and kind != "stats" for name in TRAINED)
    made = sizes._replace(
        gradients=True, wanted=wanted, eager_copies=eager_copies(kind, device, logits, True)
    )
    return _estimate(sizes, made, reduction != "none", max_workspace_bytes)


def _check_sizes(tokens: Any, trained: Any, hidden: Any, vocab: Any, rank: Any) -> None:
    check.count("tokens", tokens, 0)
    if trained is not None:
        check.count("trained_tokens", trained, 0, tokens)
    check.count("hidden_size", hidden, 1)
    check.count("vocab_size", vocab, 1)
    check.count("lora_rank", rank, 0)


def _check_dtypes(dtype: Any, weight: Any, autocast: Any, ref: Any) -> None:
    named = {"dtype": dtype, "weight_dtype": weight, "autocast_dtype": autocast, "ref_dtype": ref}
    for name, x in named.items():
        if x not in check.DTYPES and (name == "dtype" or x is not None):
            raise ValueError(f"{name}: expected torch's bf16, fp16, fp32 or fp64, got {x!r}")


def _check_reference(op: str, hidden: int, ref: Any, shared: Any, kl_coef: Any) -> None:
    """The reference as hidden states: with some ops it must be there, with others it cannot."""
    given = check.flag("shared_head", shared) or ref is not None
    if ref is not None:
        check.count("ref_hidden_size", ref, 1)
        if shared and ref != hidden:
            raise ValueError(
                f"ref_hidden_size: expected hidden_size, {hidden}, with shared_head, got {ref}"
            )
    if op == "linear_token_logp" and given:
        raise ValueError("ref_hidden_size, shared_head: linear_token_logp has no reference")
    if op in ("linear_token_kl", "linear_token_stats") and not given:
        raise ValueError(f"ref_hidden_size, shared_head: {op} needs one of the two")
    if check.number("kl_coef", kl_coef, low=0.0) > 0 and not given:
        raise ValueError("kl_coef: a divergence needs ref_hidden_size or shared_head")


def _device(device: Any) -> str:
    name = str(device).partition(":")[0]
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {device!r}")
    return name


def _kind(op: str, kl_coef: float, direction: str) -> str:
    js = check.one_of("kl_direction", direction, DIRECTIONS) == DIRECTIONS.index("js")
    if op == "linear_constrained_loss":
        return "constrained" if kl_coef == 0 else "constrained_js" if js else "constrained_kl"
    if op == "linear_token_kl":
        return "js" if js else "kl"
    return op.removeprefix("linear_token_")


def _estimate(s: Sizes, made: Sizes, scalar: bool, budget: int | None) -> MemoryEstimate:
    """`s`: a run for values only; `made`: one that makes the gradients wanted as well."""
    results = s.tokens * (s.values * accumulator(s.logits).itemsize + 5) + 8 * s.rows * s.dropped
    per_token = not scalar and any(made.wanted[1:])
    if per_token and not keeps(made, budget):
        refuse_late(made, budget)
    values_only = _part(s, make_plan(s, budget), results)
    if not any(made.wanted):
        return values_only
    with_gradients = _part(made, make_plan(made, budget), results)
    converted = _converted(made, make_plan(made, budget).groups)
    grad_hidden = with_gradients.grad_hidden
    if scalar:
        late = converted if s.compute == torch.float16 else 0
        head = with_gradients.grad_head if late or not converted else converted
        return with_gradients._replace(kept=grad_hidden + head, backward_peak=late)
    if not any(made.wanted[1:]):
        wide = accumulator(s.logits).itemsize if s.hidden_dtype.itemsize == 2 else 0
        late = s.tokens * s.hidden * (s.hidden_dtype.itemsize + wide)
        return with_gradients._replace(kept=grad_hidden, backward_peak=late)
    if keeps(made, budget):
        return _keeping(made, budget, results)
    if by_tiles(made._replace(rows=made.tokens), budget):
        return _over_vocabulary(made, budget, results, values_only)
    again = _part(made, make_plan(made, budget), results, late=False)
    return again._replace(forward_peak=values_only.forward_peak, backward_peak=again.forward_peak)


def _keeping(made: Sizes, budget: int | None, results: int) -> MemoryEstimate:
    """A forward that keeps the gradient of the scores, with its backward."""
    keep = made._replace(phase=Phase.SAVE, wanted=(False,) * 5)
    forward = _part(keep, make_plan(keep, budget), results)
    then = backward_of(made)
    plan = make_plan(then, budget)._replace(grad_scores=0)  # what was kept
    backward = _part(then, plan, results, late=False)
    return forward._replace(
        grad_hidden=backward.grad_hidden,
        grad_head=backward.grad_head,
        kept=made.rows * made.vocab * made.grad_dtype.itemsize,
        backward_peak=backward.forward_peak,
    )


def _over_vocabulary(
    made: Sizes, budget: int | None, results: int, forward: MemoryEstimate
) -> MemoryEstimate:
    """A forward that keeps what is known of every row, with its backward by tiles."""
    s = made._replace(phase=Phase.TILES, vocab=tile_columns(made, budget))
    p, item = make_plan(s, budget), accumulator(s.compute).itemsize
    counts = (made.vocab * s.hidden, made.vocab, s.rank * s.rows, made.vocab * s.rank)
    sizes = [n * w for n, w in zip(counts, s.wanted[1:], strict=True)]
    head = sizes[0] * s.weight_dtype.itemsize + sum(sizes[1:]) * item
    summed = s.rows * s.hidden * item * s.wanted[0]
    grad = s.tokens * s.hidden * s.hidden_dtype.itemsize * s.wanted[0]
    last = grad * (s.hidden_dtype.itemsize < item) + grad * s.dropped
    grown = max(p.workspace, p.workspace - p.scores - p.grad_scores + last)
    known = s.tokens * 6 * accumulator(s.logits).itemsize
    return forward._replace(
        logits=max(p.scores, forward.logits),
        grad_logits=p.grad_scores,
        workspace=max(p.workspace, forward.workspace),
        grad_hidden=summed,
        grad_head=head,
        kept=known,
        backward_peak=forward.head_copies + summed + head + grown + results,
    )


def _part(s: Sizes, p: ChunkPlan, results: int, late: bool = True) -> MemoryEstimate:
    """One run of the engine. `late`: gradients of fp16 are converted in a later backward."""
    grad_hidden = s.tokens * s.hidden * s.hidden_dtype.itemsize * s.wanted[0]
    grad_head = sum(n * d.itemsize for n, d in _head_gradients(s, p.groups))
    copies = s.vocab * s.hidden * s.compute.itemsize * (s.weight_dtype != s.compute)
    if s.ref_dtypes is not None and s.ref_hidden and not s.shared_head:
        copied = s.ref_dtypes[1] != s.ref_compute
        copies += s.vocab * s.ref_hidden * s.ref_compute.itemsize * copied
    converted = 0 if late and s.compute == torch.float16 else _converted(s, p.groups)
    gradients = grad_hidden + grad_head
    # One group has its scores behind it when the gradients are allocated.
    before = gradients if p.groups > 1 or s.phase == Phase.SAVED else 0
    products = gradients + p.workspace - p.row_function - released(s, p)
    peak = max(before + p.workspace + copies, products + copies, gradients + converted)
    return MemoryEstimate(
        chunk_tokens=p.chunk,
        chunks=p.chunks,
        logits=p.scores,
        grad_logits=p.grad_scores,
        hidden_rows=p.gathered + p.scratch_rows,
        head_tile=p.scratch_tile,
        row_temporaries=p.vectors + p.row_function,
        workspace=p.workspace,
        head_copies=copies,
        grad_hidden=grad_hidden,
        grad_head=grad_head,
        results=results,
        kept=0,
        forward_peak=results + peak,
        backward_peak=0,
    )


def _head_gradients(s: Sizes, groups: int) -> list[tuple[int, torch.dtype]]:
    """(elements, dtype it is summed in) of every gradient of the head that is wanted."""
    counts = (s.vocab * s.hidden, s.vocab, s.rank * s.hidden, s.vocab * s.rank)
    dtypes = total_dtypes(s, groups)
    return [(n, d) for n, d, w in zip(counts, dtypes, s.wanted[1:], strict=True) if w]


def _converted(s: Sizes, groups: int) -> int:
    """Bytes of the head's gradients in their own dtype, where that is not what they are summed
    in."""
    gradients = _head_gradients(s, groups)
    return sum(n * s.weight_dtype.itemsize for n, d in gradients if d != s.weight_dtype)
