"""Tolerances, in one place: for the tests and for the correctness gate of the benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps


def budget(ours: Tensor, base: Tensor, gold: Tensor) -> tuple[float, float]:
    """(largest error of `ours`, largest it may have); infinities must agree in place and sign.

    Args:
        ours: result under test, any float dtype.
        base: the same inputs through unfused torch in the accumulation dtype the op promises
            (fp32).
        gold: the same, already rounded, inputs through unfused torch in fp64.

    The budget is 2 * max|base - gold|, what torch itself loses, plus eps(ours.dtype) * max|gold|
    for one rounding on output (two where Triton's interpreter truncates instead of rounding), plus
    16 * eps(fp32) * max(1, max|gold|) for fp32 sums in another order. The last two matter where
    `base` happens to be lucky on few rows.
    """
    ours, base, gold = ours.double().cpu(), base.double().cpu(), gold.cpu()
    if gold.numel() == 0:
        return 0.0, 0.0
    finite = torch.isfinite(gold)
    same = torch.where(finite, torch.isfinite(ours), (ours == gold) | (ours.isnan() & gold.isnan()))
    if not bool(same.all()):
        return float("inf"), 0.0
    zero = gold.new_zeros(())
    error = torch.where(finite, (ours - gold).abs(), zero).max().item()
    torch_error = torch.where(finite & base.isfinite(), (base - gold).abs(), zero).max().item()
    top = torch.where(finite, gold.abs(), zero).max().item()
    return error, 2 * torch_error + 16 * EPS32 * max(1.0, top)


def assert_in_budget(name: str, ours: Tensor, base: Tensor, gold: Tensor) -> None:
    """Hold `ours` to the error of plain torch, measured against fp64 (see `budget`)."""
    assert ours.shape == gold.shape, (
        f"{name}: shape {tuple(ours.shape)}, expected {tuple(gold.shape)}"
    )
    error, allowed = budget(ours, base, gold)
    top = (
        torch.nan_to_num(gold.double(), nan=0.0, posinf=0.0, neginf=0.0).abs().max().item()
        if gold.numel()
        else 0.0
    )
    allowed += torch.finfo(ours.dtype).eps * top
    assert error <= allowed, f"{name}: error {error:.3e} over its budget {allowed:.3e}"
