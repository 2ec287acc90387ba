from __future__ import annotations

import torch
from torch import Tensor

from deepalign_kernels.ops._register import define

scale_grad_ = define("scale_grad(Tensor(a!) grad, Tensor factor) -> ()")


@torch.library.register_fake("deepalign::scale_grad")
def _(grad: Tensor, factor: Tensor) -> None:
    return None
