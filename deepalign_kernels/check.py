"""Validation at the boundary: every public op calls these; ValueErrors come from here.

Nothing here reads a value that lives in a tensor, so nothing waits for a device; values are checked
only inside `checked()`.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from deepalign_kernels import backends

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_checked = os.environ.get("DEEPALIGN_CHECKED", "0") == "1"


@contextlib.contextmanager
def checked(on: bool = True) -> Iterator[None]:
    """Check values inside tensors: a target out of range or a negative beta raises ValueError.

    Costs a device synchronisation per call; for debugging. It holds for all threads; of blocks that
    overlap the youngest counts. Outside it, such a row is poisoned with
    NaN. The environment variable DEEPALIGN_CHECKED=1 does the same for a whole process. Ignored
    under torch.compile.
    """
    with backends.overlapping(_blocks, on, _set_checked):
        yield


_blocks: list[list[Any]] = [[_checked]]


def _set_checked(on: bool) -> None:
    global _checked
    _checked = on


def checking() -> bool:
    return _checked and not torch.compiler.is_compiling()


def no_tangent(name: str, x: Tensor) -> None:
    """An op of torch.library drops the tangent of forward-mode AD without a word."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(
            f"{name}: carries a tangent, and the fused ops have no forward-mode derivative; use "
            "reverse mode, or the formula in deepalign_kernels/reference"
        )


def logits3(name: str, x: Tensor) -> Tensor:
    """Validate logits [..., V]; a view [B, T, V] (above 3 dimensions a copy, if need be)."""
    if not isinstance(x, Tensor) or x.dim() < 1:
        raise ValueError(f"{name}: expected a tensor [..., V], got {describe(x)}")
    no_tangent(name, x)
    if hasattr(x, "full_tensor"):
        raise ValueError(
            f"{name}: is a DTensor. Sharded over the vocabulary: pass .to_local() and "
            "process_group=mesh.get_group(); else .full_tensor()"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: expected bf16, fp16, fp32 or fp64 logits, got {x.dtype}")
    if x.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name}: expected a CPU or CUDA tensor, got one on {x.device}")
    if x.shape[-1] < 1:
        raise ValueError(
            f"{name}: expected at least one vocabulary column, got shape {tuple(x.shape)}"
        )
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected last stride 1, got strides {x.stride()} for shape {tuple(x.shape)}; "
            "call .contiguous() where the copy is affordable"
        )
    if x.dim() == 1:
        return x[None, None]
    if x.dim() == 2:
        return x[None]
    return x if x.dim() == 3 else x.flatten(0, -3)


def same_kind(name: str, x: Tensor, other_name: str, other: Tensor, *, frozen: bool = True) -> None:
    """`x` must match `other` in shape, dtype and device, and must not ask for a gradient."""
    if not isinstance(x, Tensor) or x.shape != other.shape:
        raise ValueError(
            f"{name}: expected the shape of {other_name}, {tuple(other.shape)}, got {describe(x)}"
        )
    if x.dtype != other.dtype:
        raise ValueError(
            f"{name}: expected the dtype of {other_name}, {other.dtype}, got {x.dtype}; "
            f"cast with .to({other.dtype})"
        )
    same_device(name, x, other_name, other)
    if frozen:
        must_be_frozen(name, x)


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(
            f"{name}: expected the device of {other_name}, {other.device}, got {x.device}"
        )


def must_be_frozen(name: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: the reference gets no gradient, but this tensor requires one; "
            "pass it .detach()ed"
        )


def targets(
    name: str, target: Tensor, logits: Tensor, ignore_index: int, *, shard: bool = False
) -> Tensor:
    """Validate integer targets [...] against logits [..., V]; contiguous int64 [N].

    `shard`: the logits are a shard, so V says nothing about the targets.
    """
    lead = logits.shape[:-1]
    if not isinstance(target, Tensor) or target.shape != lead:
        raise ValueError(
            f"{name}: expected shape {tuple(lead)}, the logits without their last dimension, "
            f"got {describe(target)}"
        )
    if target.dtype not in _INTEGERS:
        raise ValueError(f"{name}: expected int32 or int64, got {target.dtype}")
    same_device(name, target, "the logits", logits)
    index("ignore_index", ignore_index)
    flat = target.reshape(-1).contiguous().to(torch.int64)
    if checking() and not shard:
        in_vocabulary(name, flat, logits.shape[-1], ignore_index, target)
    return flat


def in_vocabulary(name: str, flat: Tensor, vocab: int, ignore_index: int, shown: Tensor) -> None:
    """Values of `flat` [N]; positions are those of `shown`, the same as the caller gave it."""
    bad = (flat != ignore_index) & ((flat < 0) | (flat >= vocab))
    _first(name, bad, shown, f"0..{vocab - 1} or ignore_index {ignore_index}")


def mask(name: str, valid: Tensor | None, logits: Tensor) -> Tensor | None:
    """Validate a bool mask [...] against logits [..., V] and return it as contiguous [N]."""
    if valid is None:
        return None
    lead = logits.shape[:-1]
    if not isinstance(valid, Tensor) or valid.shape != lead or valid.dtype != torch.bool:
        raise ValueError(
            f"{name}: expected a bool tensor of shape {tuple(lead)}, got {describe(valid)}"
        )
    same_device(name, valid, "the logits", logits)
    return valid.reshape(-1).contiguous()


def vector(
    name: str, x: float | Tensor, logits: Tensor, dtype: torch.dtype, *, low: float = -math.inf
) -> Tensor:
    """A number, or a float tensor [...] aligned with logits [..., V]; contiguous [N] of `dtype`."""
    lead = logits.shape[:-1]
    if isinstance(x, Tensor):
        if x.shape != lead:
            raise ValueError(
                f"{name}: expected a number or shape {tuple(lead)}, aligned with the target, "
                f"got {describe(x)}"
            )
        if not x.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point tensor, got {x.dtype}")
        same_device(name, x, "the logits", logits)
        must_be_frozen(name, x)
        flat = x.reshape(-1).contiguous().to(dtype)
        if checking() and low > -math.inf:
            _first(name, flat < low, x, f"values >= {low:g}")
        return flat
    value = number(name, x, low=low)
    return torch.full((lead.numel(),), value, dtype=dtype, device=logits.device)


def number(
    name: str,
    x: Any,
    *,
    low: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """A finite number in [low, inf), above `above` and below `below`, of a size that fp32 holds, in
    which kernels compute: elsewhere it would arrive there as 0 or inf."""
    if not isinstance(x, (int, float)) and isinstance(x, numbers.Real):
        x = float(x)  # numpy's
    known = isinstance(x, (int, float)) and not isinstance(x, bool)
    held = known and (x == 0 or SMALLEST <= abs(x) <= LARGEST)
    if not held or not (low <= x and above < x < below):
        bounds = (
            [f">= {low:g}"] * (low > -math.inf)
            + [f"> {above:g}"] * (above > -math.inf)
            + [f"< {below:g}"] * (below < math.inf)
        )
        if known and not held and abs(x) < math.inf:  # false for NaN
            bounds.append(f"of a size that fp32 holds, {SMALLEST:.2g} to {LARGEST:.2g}")
        raise ValueError(
            f"{name}: expected a finite number {' and '.join(bounds)}".rstrip() + f", got {x!r}"
        )
    return float(x)


def index(name: str, x: Any) -> None:
    """An integer that int64 holds."""
    if isinstance(x, bool) or not isinstance(x, numbers.Integral) or not -(2**63) <= int(x) < 2**63:
        raise ValueError(f"{name}: expected an int that int64 holds, got {x!r}")


def count(name: str, x: Any, low: int, most: int | None = None) -> None:
    """An integer >= low, and <= most."""
    inside = isinstance(x, numbers.Integral) and not isinstance(x, bool) and int(x) >= low
    if not inside or (most is not None and int(x) > most):
        upper = "" if most is None else f" and <= {most}"
        raise ValueError(f"{name}: expected an int >= {low}{upper}, got {x!r}")


def flag(name: str, x: Any) -> bool:
    if not isinstance(x, bool):
        raise ValueError(f"{name}: expected True or False, got {x!r}")
    return x


def tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {x!r}")


def score_options(temperature: float, softcap: float | None) -> tuple[float, float]:
    """(temperature, softcap) as the ops take them: softcap 0.0 stands for none."""
    cap = 0.0 if softcap is None else number("softcap", softcap, above=0.0)
    return number("temperature", temperature, above=0.0), cap


def one_of(name: str, x: str, allowed: Sequence[str]) -> int:
    if x not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {x!r}")
    return list(allowed).index(x)


def describe(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


def _first(name: str, bad: Tensor, shown: Tensor, expected: str) -> None:
    where = bad.nonzero()
    if len(where):
        at = torch.unravel_index(where[0, 0], shown.shape) if shown.dim() else ()
        position = tuple(int(i) for i in at)
        raise ValueError(
            f"{name}: expected {expected}, got {shown[position].item()} "
            f"at position {list(position)}"
        )
