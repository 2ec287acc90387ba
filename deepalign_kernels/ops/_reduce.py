"""How a sum over tokens becomes a loss: what `reduction` and `normalizer` mean, in one place."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from deepalign_kernels import check

Reduction = Literal["none", "sum", "mean"]
"""One value for each token, their sum, or the sum divided by the number of valid tokens (or by
`normalizer`)."""
REDUCTIONS = get_args(Reduction)


def scale_of_sum(
    valid: Tensor, reduction: str, normalizer: float | Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What the sum of the token losses is multiplied by, as a 0-d tensor on the device of `valid`.

    "mean": 1 / normalizer, or 1 / (number of valid tokens); 0 where that count is 0, so that a
    batch without trained tokens gives loss 0 and gradients 0 instead of NaN. A tensor's value is
    not read: one that is negative, infinite or NaN makes loss and gradients NaN (a ValueError
    inside `checked()`). "sum" and "none": 1.

    Raises:
        ValueError: an unknown reduction, a normalizer without "mean", not above 0, or not 0-d.
    """
    check.one_of("reduction", reduction, REDUCTIONS)
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer: belongs to reduction='mean', got it with {reduction!r}")
    if reduction != "mean":
        return torch.ones((), dtype=dtype, device=valid.device)
    if normalizer is None:
        # Without a valid token every loss is 0, so what it is multiplied by does not matter.
        return valid.sum(dtype=dtype).clamp_(min=1.0).reciprocal_()
    elif isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(
                f"normalizer: expected a number or a 0-d tensor, got {check.describe(normalizer)}"
            )
        if normalizer.is_complex() or normalizer.dtype == torch.bool:
            raise ValueError(f"normalizer: expected a real number, got {normalizer.dtype}")
        check.same_device("normalizer", normalizer, "the target", valid)
        check.must_be_frozen("normalizer", normalizer)
        if check.checking():
            check.number("normalizer", normalizer.item(), low=0.0)
        count = normalizer.to(dtype)
        inverse = torch.where((count > 0) & (count < torch.inf), 1.0 / count, torch.nan)
        return torch.where(count == 0, 0.0, inverse)
    else:
        divisor = check.number("normalizer", normalizer, above=0.0)
        return torch.full((), 1.0 / divisor, dtype=dtype, device=valid.device)


def scaled_sum(values: Tensor, scale: Tensor) -> Tensor:
    """scale * sum(values), multiplied first: the sum of losses near 1e38 would overflow."""
    return (values * scale).sum()
