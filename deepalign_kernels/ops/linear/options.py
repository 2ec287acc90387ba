"""The options that all linear ops share, and validation at their boundary; what it accepts goes to
the ops as `Inputs` and `Options`."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from deepalign_kernels import check
from deepalign_kernels.ops.linear.types import Inputs, Options
from deepalign_kernels.ops.shard.group import Shard, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_HALVES = (torch.bfloat16, torch.float16)


def plain_tensor(name: str, x: Any) -> Tensor:
    """`x` must be a plain tensor that holds its elements: no shard, no empty ZeRO-3 or FSDP
    placeholder."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {x!r}")
    if hasattr(x, "full_tensor"):
        raise ValueError(
            f"{name}: is a DTensor, a shard of the whole. Call the op inside the head's own "
            "forward, where FSDP2 "
            "has gathered it (deepalign_kernels.hf.attach does), or pass .full_tensor(); of a head "
            "sharded over the vocabulary .to_local() and process_group=mesh.get_group()"
        )
    if x.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name}: expected a CPU or CUDA tensor, got one on {x.device}")
    if not x.is_floating_point() or x.dtype not in check.DTYPES:
        raise ValueError(f"{name}: expected bf16, fp16, fp32 or fp64, got {x.dtype}")
    check.no_tangent(name, x)
    return x


def matrix(name: str, x: Any, columns: int | None, why: str) -> Tensor:
    """A whole [rows, columns] tensor."""
    x = plain_tensor(name, x)
    if x.dim() != 2 or x.shape[0] == 0 or x.shape[1] == 0:
        empty = x.numel() == 0 or x.dim() == 1
        hint = (
            "; ZeRO-3 and FSDP keep parameters empty or flat outside the call of their module: "
            "run the op inside "
            "the head's forward (deepalign_kernels.hf.attach does), or gather the parameter first"
        )
        raise ValueError(
            f"{name}: expected [rows, {columns or 'columns'}], got "
            f"{check.describe(x)}{hint * empty}"
        )
    if columns is not None and x.shape[1] != columns:
        flipped = f"; its transpose would fit: pass {name}.t()" if x.shape[0] == columns else ""
        raise ValueError(
            f"{name}: expected {columns} columns, {why}, got {check.describe(x)}{flipped}"
        )
    return x


def flat_rows(name: str, x: Any) -> Tensor:
    """[..., H] as [N, H] with last stride 1; a view wherever the strides allow it."""
    x = plain_tensor(name, x)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected hidden states [..., H], got {check.describe(x)}")
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def vocabulary(name: str, x: Tensor | None, head_name: str, head: Tensor) -> Tensor | None:
    if x is None:
        return None
    x = plain_tensor(name, x)
    if x.shape != head.shape[:1]:
        raise ValueError(
            f"{name}: expected shape [{head.shape[0]}], one entry per row of {head_name}, got "
            f"{check.describe(x)}"
        )
    check.same_device(name, x, head_name, head)
    return x


def compute_dtype(hidden_name: str, hidden: Tensor, head_name: str, head: Tensor) -> torch.dtype:
    """The dtype the head is multiplied in: that of autocast where it is on, else the one both
    operands have."""
    device = hidden.device.type
    if (
        torch.float64 not in (hidden.dtype, head.dtype)
        and device != "meta"
        and torch.is_autocast_enabled(device)
    ):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != head.dtype:
        raise ValueError(
            f"{hidden_name}: expected the dtype of {head_name}, {head.dtype}, got {hidden.dtype}; "
            "cast with "
            f".to({head.dtype}), or call under torch.autocast, which casts both"
        )
    return head.dtype


def logits_dtype(asked: torch.dtype | None, computes: tuple[torch.dtype, ...]) -> torch.dtype:
    """fp32 scores (fp64 for fp64 heads), or 16-bit ones where asked for and where every head is of
    that dtype."""
    if torch.float64 in computes:
        if len(set(computes)) > 1:
            raise ValueError("ref_weight: an fp64 head needs the other head in fp64 too")
        wide = torch.float64
    else:
        wide = torch.float32
    if asked is None or asked == wide:
        return wide
    if asked in _HALVES and all(c == asked for c in computes):
        return asked
    raise ValueError(
        f"logits_dtype: expected None, {wide} or the 16-bit dtype of every head, got {asked}"
    )


def lora(a: Tensor | None, b: Tensor | None, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if (a is None) != (b is None):
        raise ValueError("lora_a, lora_b: expected both or neither")
    if a is None:
        return None, None
    a = matrix("lora_a", a, weight.shape[1], "the hidden size of weight")
    b = matrix("lora_b", b, a.shape[0], "the rank of lora_a")
    if b.shape[0] != weight.shape[0]:
        raise ValueError(
            f"lora_b: expected {weight.shape[0]} rows, the vocabulary of weight, got "
            f"{check.describe(b)}"
        )
    for name, x in (("lora_a", a), ("lora_b", b)):
        check.same_device(name, x, "weight", weight)
        if (x.dtype == torch.float64) != (weight.dtype == torch.float64):
            raise ValueError(f"{name}: expected the dtype of weight, {weight.dtype}, got {x.dtype}")
    return a, b


def workspace(max_workspace_bytes: int | None) -> int:
    if max_workspace_bytes is None:
        return -1
    if (
        isinstance(max_workspace_bytes, bool)
        or not isinstance(max_workspace_bytes, int)
        or not 0 < max_workspace_bytes < 2**63
    ):
        raise ValueError(
            f"max_workspace_bytes: expected None or an int above 0, got {max_workspace_bytes!r}"
        )
    return max_workspace_bytes


def accumulate_dtype(asked: torch.dtype, weight: torch.dtype) -> torch.dtype:
    if weight == torch.float64:
        return torch.float64
    if asked not in (torch.float32, weight):
        raise ValueError(
            f"grad_weight_dtype: expected torch.float32 or the dtype of weight, {weight}, "
            f"got {asked}"
        )
    return asked


class HeadOptions(TypedDict, total=False):
    """Keyword arguments that every linear op takes, with their defaults.

    Attributes:
        bias: None, or [V], any float dtype: added to the logits.
        softcap: None, or > 0: softcap * tanh(logit_scale * x / softcap).
        logit_scale: 1.0; > 0, multiplies the logits before the softcap.
        temperature: 1.0; > 0, divides the scores after it.
        lora_a: None, or [r, H]: with lora_b a low-rank term of the head,
            weight + lora_scale * lora_b @ lora_a. It is multiplied in the dtype of weight: beside a
            16-bit head hidden @ lora_a.T is rounded to 16 bit, as a LoRA layer does, and with it up
            to 2^-8 (bf16) of this term of the scores. No gradient needs a V * H buffer.
        lora_b: None, or [V, r].
        lora_scale: 1.0, any number.
        max_workspace_bytes: None, or an upper bound on what a call allocates beside its inputs,
            results and gradients (bytes), what it keeps for backward included. None: chunks of 1024
            to 2047 tokens; on CUDA, for a 16-bit head that is trained, chunks of up to 1024 tokens,
            and the 16-bit gradient of the logits for up to 2 H tokens. `estimate_memory` says what
            a call takes.
        compact: True drops ignored rows before the GEMM: the work is that of the rows left. On CUDA
            this waits once for their number. False computes all rows, of which the ignored ones
            give 0: fixed shapes, no wait, and the call can be captured in a CUDA graph; the hidden
            states of ignored rows must then be finite.
        logits_dtype: of the chunk of logits. None: fp32 (fp64 for fp64). A 16-bit head may ask for
            its own dtype, which halves the chunk and on a CPU with the native library is hardly
            faster (forward 3 %, T = 256, H = 1024, V = 32000, AVX512-BF16); logits rounded to bf16
            cost 4-23 % error in the gradient.
        process_group: None, or the ranks that hold the head between them: weight, bias and lora_b
            are shards [V_r, ...], and so are ref_weight and ref_bias; hidden, lora_a and the
            targets are whole and alike on all ranks. Every rank must make the call, and each of its
            backward. The gradient of every input is its full one: those of hidden and lora_a are
            all-reduced in backward, so the caller must not do it again. A trainer that
            reduce-scatters the gradient of hidden (sequence parallelism) splits it instead.
    """

    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    temperature: float
    lora_a: Tensor | None
    lora_b: Tensor | None
    lora_scale: float
    max_workspace_bytes: int | None
    compact: bool
    logits_dtype: torch.dtype | None
    process_group: ProcessGroup | None


class LinearOptions(HeadOptions, total=False):
    """Keyword arguments of the linear ops that have a gradient: those of `HeadOptions`, and

    Attributes:
        grad_weight_dtype: torch.float32: what the gradient of the head is summed in over chunks; or
            the dtype of weight (half the memory for 16-bit heads, one more rounding per chunk).
    """

    grad_weight_dtype: torch.dtype


class _Head(NamedTuple):
    """The options of a call, and its reference."""

    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    lora_scale: float = 1.0
    max_workspace_bytes: int | None = None
    compact: bool = True
    logits_dtype: torch.dtype | None = None
    process_group: ProcessGroup | None = None
    grad_weight_dtype: torch.dtype = torch.float32
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None
    ref_bias: Tensor | None = None


_NO_REFERENCE = (None, None, None)
_NAMES = frozenset(LinearOptions.__annotations__)
_NAMES_WITHOUT_GRADIENT = frozenset(HeadOptions.__annotations__)


def _head(op: str, given: Any, reference: tuple, gradient: bool) -> _Head:
    names = _NAMES if gradient else _NAMES_WITHOUT_GRADIENT
    if unknown := [name for name in given if name not in names]:
        name = unknown[0]
        near = difflib.get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"{op}() got an unexpected keyword argument {name!r}{hint}")
    ref_hidden, ref_weight, ref_bias = reference
    return _Head(**given, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias)


class Call(NamedTuple):
    """A checked call."""

    inputs: Inputs
    options: Options
    like: Tensor  # [..., V], without memory of its own: to check [...] arguments against
    shard: Shard | None


def checked_call(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    given: Any,
    reference: tuple[Tensor | None, Tensor | None, Tensor | None] = _NO_REFERENCE,
    *,
    vocab_start: int | None = None,
    gradient: bool = True,
) -> Call:
    """Check what all linear ops share.

    Args:
        op: its name, for messages.
        hidden: [..., H].
        weight: [V, H].
        given: the `LinearOptions` of the call (`HeadOptions` for an op without `gradient`).
        reference: ref_hidden, ref_weight, ref_bias.
        vocab_start: the first column of this rank's shard.
        gradient: whether the op has one.

    Raises:
        TypeError: an unknown keyword, with the nearest known one.
        ValueError: everything else.
    """
    head = _head(op, given, reference, gradient)
    rows = flat_rows("hidden", hidden)
    weight = matrix("weight", weight, rows.shape[1], "the last dimension of hidden")
    check.same_device("weight", weight, "hidden", hidden)
    a, b = lora(head.lora_a, head.lora_b, weight)
    compute = compute_dtype("hidden", hidden, "weight", weight)
    ref_rows, ref_weight, ref_compute = _reference(hidden, weight, head)
    computes = (compute,) if ref_rows is None else (compute, ref_compute)
    if (
        check.flag("compact", head.compact)
        and hidden.is_cuda
        and torch.cuda.is_current_stream_capturing()
    ):
        raise ValueError(
            "compact: dropping ignored tokens waits for their number, which a CUDA graph cannot; "
            "pass compact=False"
        )
    scale = check.number("logit_scale", head.logit_scale, above=0.0)
    temperature, softcap = check.score_options(head.temperature, head.softcap)
    ref_bias = None
    if ref_weight is not None:
        ref_bias = vocabulary("ref_bias", head.ref_bias, "ref_weight", ref_weight)
    inputs = Inputs(
        hidden=rows,
        weight=weight,
        bias=vocabulary("bias", head.bias, "weight", weight),
        lora_a=a,
        lora_b=b,
        ref_hidden=ref_rows,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        target=None,
        valid=None,
        beta=None,
        ref_logp=None,
    )
    options = Options(
        # cap * tanh(s x / cap) / T is (cap/s) * tanh(x / (cap/s)) / (T/s): the scale costs nothing
        temperature=check.number("temperature / logit_scale", temperature / scale, above=0.0),
        softcap=check.number("softcap / logit_scale", softcap / scale, low=0.0),
        lora_scale=check.number("lora_scale", head.lora_scale),
        js_beta=0.5,
        kl_coef=0.0,
        min_weight=0.0,
        ignore_index=-100,
        direction=0,
        max_workspace_bytes=workspace(head.max_workspace_bytes),
        rule="exact",
        compact=head.compact,
        compute=compute,
        ref_compute=ref_compute,
        logits=logits_dtype(head.logits_dtype, computes),
        accumulate=accumulate_dtype(head.grad_weight_dtype, weight.dtype),
    )
    like = hidden.detach()[..., :1].expand(*hidden.shape[:-1], weight.shape[0])
    shard = shard_of(head.process_group, vocab_start, weight.shape[0])
    return Call(inputs, options, like, shard)


def _reference(
    hidden: Tensor, weight: Tensor, head: _Head
) -> tuple[Tensor | None, Tensor | None, torch.dtype]:
    """(rows, weight, compute dtype) of the reference head; its dtype is that of `weight` where
    there is none."""
    if (head.ref_hidden is None) != (head.ref_weight is None):
        raise ValueError("ref_hidden, ref_weight: expected both or neither")
    if head.ref_hidden is None or head.ref_weight is None:
        if head.ref_bias is not None:
            raise ValueError("ref_bias: belongs to ref_hidden and ref_weight, got it without them")
        return None, None, weight.dtype
    rows = flat_rows("ref_hidden", head.ref_hidden)
    ref_weight = matrix(
        "ref_weight", head.ref_weight, rows.shape[1], "the last dimension of ref_hidden"
    )
    if head.ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden: expected the tokens of hidden, {tuple(hidden.shape[:-1])}, got "
            f"{check.describe(head.ref_hidden)}"
        )
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight: expected the vocabulary of weight, {weight.shape[0]} rows, got "
            f"{check.describe(ref_weight)}; "
            "cut padding rows off the longer head"
        )
    for name, x in (("ref_hidden", head.ref_hidden), ("ref_weight", ref_weight)):
        check.same_device(name, x, "hidden", hidden)
    for name, x in (
        ("ref_hidden", head.ref_hidden),
        ("ref_weight", ref_weight),
        ("ref_bias", head.ref_bias),
    ):
        if x is not None:
            check.must_be_frozen(name, x)
    return rows, ref_weight, compute_dtype("ref_hidden", head.ref_hidden, "ref_weight", ref_weight)
