"""Specification of scale_grad: grad *= factor, in place, and nothing at all where factor is 1.

`loss.backward()` sends factor = 1; a multiplication that is skipped saves a read and a write of [B,
T, V]. On a GPU the decision is taken inside the kernel, so nothing waits for the value.
"""

from __future__ import annotations

from torch import Tensor


def scale_grad(grad: Tensor, factor: Tensor) -> None:
    if grad.device.type != "cpu" or factor.item() != 1.0:  # reading a CPU scalar waits for nothing
        grad.mul_(factor)
