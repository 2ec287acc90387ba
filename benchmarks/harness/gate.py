"""The correctness gate: nobody is timed before value and gradients were held against fp64.

The check runs at the size that is timed, on the very call that is timed. Where gradients are per
row, SAMPLE rows are checked (first, last, and spread between); a scalar is checked over all rows.

Ours: the largest error must stay within `deepalign_kernels.testing.budget`: twice what plain torch
itself loses in fp32 (the linear ops: in the inputs' dtype, whose logits plain torch rounds), plus
one rounding on output. Everyone else: ||x - gold|| / ||gold|| within PEER_BOUND, which only tells
right from wrong. The same relative error is reported for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.cases.logits import ROW_INPUTS, Case
from benchmarks.harness.plain import IGNORE, Inputs
from deepalign_kernels.testing import budget

SAMPLE = 32
CHUNK_ELEMENTS = {False: 1 << 23, True: 1 << 25}  # of [rows, V] per fp64 chunk; True: linear ops,
# for which every chunk converts the head anew
SLICE = 1 << 24  # entries that are held against the truth at a time
PEER_BOUND = {
    (False, torch.float32): 1e-3,
    (False, torch.bfloat16): 5e-2,
    (False, torch.float16): 1e-2,
    (True, torch.float32): 5e-3,  # tf32 products
    (True, torch.bfloat16): 0.25,  # logits rounded to bf16: gradients are known to lose up to 23 %
    (True, torch.float16): 5e-2,
}


class Refused(Exception):
    """A result that is wrong; the message says what, and by how much."""


@dataclass(frozen=True)
class Truth:
    """Values and gradients (by leaf) of some rows, or of all."""

    values: Tensor
    grads: dict[str, Tensor]


class Gold:
    """The truth for one case, phase and input set, computed when first asked for and shared by all
    providers.
    """

    def __init__(self, case: Case, x: Inputs, phase: str) -> None:
        self.case, self.phase = case, phase
        self.x = {n: v.detach() for n, v in x.items()}
        T = x["target"].shape[0]
        step = max(1, (T - 1) // (SAMPLE - 1)) if T > SAMPLE else 1
        few = sorted({*range(0, T, step), T - 1})
        self.rows = torch.tensor(few if case.row_gradients else range(T), device=x["target"].device)
        self.n = int((x["target"] != IGNORE).sum())
        self._known: dict[tuple[torch.dtype, bool], Truth] = {}

    def truth(self, dtype: torch.dtype, scalar: bool) -> Truth:
        """The checked rows in `dtype`. With `scalar` the upstream gradient is 1, that of the
        sum.
        """
        key = (dtype, scalar)
        if key not in self._known:
            self._known[key] = self._compute(dtype, scalar)
        return self._known[key]

    def _compute(self, dtype: torch.dtype, scalar: bool) -> Truth:
        leaves = self.case.leaves if self.phase == "fwd_bwd" else ()
        values, grads = [], {name: [] for name in leaves}
        for rows in self.rows.split(self._chunk()):
            part = _part(self.x, rows, dtype, leaves)
            value = self.case.tokens(part)
            values.append(value.detach())
            if leaves:
                up = torch.ones_like(value) if scalar else part["upstream"].to(value.dtype)
                got = torch.autograd.grad(value, [part[n] for n in leaves], up)
                for name, grad in zip(leaves, got, strict=True):
                    if name in ROW_INPUTS or not grads[name]:
                        grads[name].append(grad)
                    else:  # summed as they come: that of a head has gigabytes
                        grads[name][0] += grad
                del got, grad
            del part, value
        joined = {n: torch.cat(g) if len(g) > 1 else g[0] for n, g in grads.items()}
        return Truth(torch.cat(values, -1), joined)

    @cached_property
    def mean(self) -> dict[torch.dtype, Tensor]:
        """Mean over all trained tokens, in fp64 and from fp32 (or the inputs' dtype) row values."""
        every = torch.arange(self.x["target"].shape[0], device=self.rows.device)
        found = {}
        for dtype in (torch.float64, self.base_dtype):
            total = torch.zeros((), dtype=torch.float64, device=every.device)
            with torch.no_grad():
                for rows in every.split(self._chunk()):
                    total += self.case.tokens(_part(self.x, rows, dtype, ())).double().sum()
            found[dtype] = total / self.n
        return found

    @property
    def base_dtype(self) -> torch.dtype:
        return self.x[self.case.leaves[0]].dtype if self.case.linear else torch.float32

    def _chunk(self) -> int:
        wide = self.x["weight"].shape[0] if self.case.linear else self.x["policy"].shape[-1]
        return max(1, CHUNK_ELEMENTS[self.case.linear] // wide)


def _part(x: Inputs, rows: Tensor, dtype: torch.dtype, leaves: Sequence[str]) -> Inputs:
    part: Inputs = {}
    for name, value in x.items():
        value = value[rows] if name in ROW_INPUTS or name == "valid" else value
        if value.is_floating_point():  # vectors stay as wide as the losses make them
            value = value.to(dtype if value.dim() > 1 else torch.promote_types(dtype, value.dtype))
        part[name] = value.requires_grad_() if name in leaves else value
    return part


def check(gold: Gold, value: Tensor, grads: Sequence[Tensor], *, ours: bool, scalar: bool) -> float:
    """Largest relative error of value and gradients.

    Raises:
        Refused: over the bound of `ours` or of everyone else, a wrong shape, or a NaN.
    """
    case, worst = gold.case, 0.0
    wanted = gold.truth(torch.float64, scalar)
    base = gold.truth(gold.base_dtype, scalar)
    if scalar:
        pair = gold.mean[torch.float64], gold.mean[gold.base_dtype]
        worst = _held("value", value.detach().reshape(()), *pair, case, gold, ours)
    else:
        got = _rows(value.detach(), gold) if case.row_gradients else value.detach()
        worst = _held("value", got, wanted.values, base.values, case, gold, ours)
    leaves = case.leaves if gold.phase == "fwd_bwd" else ()
    for name, grad in zip(leaves, grads, strict=True):
        got = grad[gold.rows] if case.row_gradients else grad
        # The gradient of a mean is held against that of the sum: its own entries are so tiny that
        # any error would be within bounds.
        factor, step = gold.n if scalar else 1, torch.finfo(grad.dtype).eps
        told = f"gradient of {name}"
        pair = wanted.grads[name], base.grads[name]
        worst = max(worst, _held(told, got, *pair, case, gold, ours, step, factor))
    return worst


def _rows(value: Tensor, gold: Gold) -> Tensor:
    """The checked rows of per-token values [..., T]."""
    T = gold.x["target"].shape[0]
    if not value.dim() or value.shape[-1] != T:
        raise Refused(f"value: shape {tuple(value.shape)}, expected [..., {T}]")
    return value[..., gold.rows]


def _held(
    what: str,
    got: Tensor,
    wanted: Tensor,
    base: Tensor,
    case: Case,
    gold: Gold,
    ours: bool,
    rounding: float | None = None,
    factor: int = 1,
) -> float:
    """Relative error of `got * factor`, or Refused. rounding: eps of the dtype that `got` was
    stored in.
    """
    if got.shape != wanted.shape:
        raise Refused(f"{what}: shape {tuple(got.shape)}, expected {tuple(wanted.shape)}")
    apart = scale = error = allowed = top = 0.0
    for g, w, b in zip(*(t.reshape(-1).split(SLICE) for t in (got, wanted, base)), strict=True):
        g = g.double() * factor
        apart += (g - w).square().sum().item()
        scale += w.square().sum().item()
        if ours:
            error, allowed = map(max, budget(g, b, w), (error, allowed))
            top = max(top, w.abs().max().item())
    relative = math.sqrt(apart / (scale or 1.0)) if apart < math.inf else math.inf
    if not relative < math.inf:
        raise Refused(f"{what}: not finite")
    if ours:
        allowed += top * (torch.finfo(got.dtype).eps if rounding is None else rounding)
        if not error <= allowed:
            raise Refused(f"{what}: largest error {error:.2e}, budget {allowed:.2e}")
        return relative
    dtype = gold.x[case.leaves[0]].dtype if case.leaves else gold.x["policy"].dtype
    bound = PEER_BOUND[case.linear, dtype]
    if not relative <= bound:
        raise Refused(f"{what}: relative error {relative:.2e}, bound {bound:.0e}")
    return relative
