"""The optimizer of a run, by name or from a factory; which combinations would be silently wrong.

Each comes from a maintained library and gets the method's betas, epsilon, decay and learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Groups = list[dict[str, Any]]
Factory = Callable[..., Optimizer]  # (groups, lr=, betas=, eps=)


def _adamw(groups: Groups, **options: Any) -> Optimizer:
    device = groups[0]["params"][0].device.type
    return torch.optim.AdamW(groups, fused=device in ("cpu", "cuda"), **options)


def _rounding(groups: Groups, **options: Any) -> Optimizer:
    from torchao.optim import _AdamW

    return _AdamW(groups, bf16_stochastic_round=True, **options)


def _kahan(groups: Groups, **options: Any) -> Optimizer:
    from optimi import AdamW

    return AdamW(groups, kahan_sum=True, **options)


def _eight_bits(groups: Groups, **options: Any) -> Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(groups, bf16_stochastic_round=True, **options)


def _four_bits(groups: Groups, **options: Any) -> Optimizer:
    from torchao.optim import AdamW4bit

    return AdamW4bit(groups, bf16_stochastic_round=True, **options)


def _paged(groups: Groups, **options: Any) -> Optimizer:
    from bitsandbytes.optim import PagedAdamW8bit

    return PagedAdamW8bit(groups, **options)


def _offloaded(groups: Groups, **options: Any) -> Optimizer:
    from torchao.optim import CPUOffloadOptimizer, _AdamW

    first = groups[0]["params"][0]
    if first.is_meta:  # a run that is only looked at
        return torch.optim.AdamW(groups, **options)
    if first.device.type not in GPUS:
        raise ValueError(
            "optimizer: 'adamw_offload' moves states off a GPU; this model is on the"
            f" {first.device.type}, where 'adamw' keeps them too"
        )
    if first.dtype == torch.bfloat16:
        return CPUOffloadOptimizer(groups, _AdamW, bf16_stochastic_round=True, **options)
    return CPUOffloadOptimizer(groups, torch.optim.AdamW, **options)


def let_go(optimizer: Optimizer) -> None:
    """Take back what the optimizer has put on the parameters: torchao's, which updates on the CPU,
    leaves its hooks there."""
    for p in getattr(optimizer, "param_d2h_map", ()):
        hooks = p._post_accumulate_grad_hooks
        for key, hook in list(hooks.items()):
            if hook.__module__ == type(optimizer).__module__:
                del hooks[key]


class Kind(NamedTuple):
    """One name of `TrainConfig.optimizer`."""

    make: Factory
    package: str | None  # what has to be installed
    keeps_small_steps: bool  # with bf16 weights
    states: dict[torch.dtype, float]  # bytes per parameter, by the dtype of the weights
    host: dict[torch.dtype, float] | None = None  # the same in host memory


GPUS = ("cuda", "xpu")
BF16, FP32 = torch.bfloat16, torch.float32
OPTIMIZERS = {
    "adamw": Kind(_adamw, None, False, {FP32: 8, BF16: 4}),
    "adamw_bf16_sr": Kind(_rounding, "torchao", True, {FP32: 8, BF16: 4}),
    "adamw_kahan": Kind(_kahan, "torch-optimi", True, {FP32: 8, BF16: 6}),
    "adamw_8bit": Kind(_eight_bits, "torchao", True, {FP32: 2, BF16: 2}),
    "adamw_4bit": Kind(_four_bits, "torchao", True, {FP32: 1, BF16: 1}),
    "adamw_8bit_paged": Kind(_paged, "bitsandbytes", False, {FP32: 2, BF16: 2}),
    # A copy of weights and gradients is there as well.
    "adamw_offload": Kind(_offloaded, "torchao", True, {FP32: 0, BF16: 0}, {FP32: 16, BF16: 8}),
}
TOO_MANY_LOST = 0.05


def make_optimizer(
    optimizer: str | Factory,
    params: Sequence[nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rounds: bool = True,
) -> Optimizer:
    """The optimizer over `params`; only those of two or more dimensions decay. `rounds`: it updates
    16-bit weights as they are, not a copy in fp32.

    Raises:
        ValueError: its package is not installed, or it would lose most updates to rounding.
    """
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: Any = {"lr": learning_rate, "betas": betas, "eps": eps}
    if not isinstance(optimizer, str):
        return optimizer(groups, **options)
    kind = OPTIMIZERS[optimizer]
    if rounds and not kind.keeps_small_steps:
        _refuse_rounding_away(optimizer, params, learning_rate)
    try:
        return kind.make(groups, **options)
    except ImportError as error:
        raise ValueError(
            f"optimizer: {optimizer!r} needs {kind.package} (pip install {kind.package}): {error}"
        ) from error


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """The learning rate of the next update. torchao compiles it in unless it stays a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def share_rounded_away(params: Sequence[Tensor], step: float, sample: int = 1 << 16) -> float:
    """Of bf16 weights, how many a step of that size leaves where they were: it is below half the
    distance to the next bf16 number. `sample`: weights looked at in each parameter."""
    lost = seen = 0.0
    for p in params:
        if p.dtype == torch.bfloat16 and not p.is_meta:
            x = p.detach().flatten()[:sample].float()
            exponent = torch.frexp(x).exponent
            lost += (torch.ldexp(torch.ones_like(x), exponent - 9) > step).sum().item()
            seen += x.numel()
    return lost / seen if seen else 0.0


def _refuse_rounding_away(optimizer: str, params: Sequence[Tensor], rate: float) -> None:
    lost = share_rounded_away(params, rate)
    if lost > TOO_MANY_LOST:
        near = "'adamw_8bit'" if "8bit" in optimizer else "'adamw_bf16_sr' or 'adamw_kahan'"
        raise ValueError(
            f"optimizer: {optimizer!r} on bf16 weights rounds each step to the nearest, and"
            f" {lost:.0%} of them are further from the next bf16 number than two steps of"
            f" learning_rate {rate:g}: they would hardly move. Use {near}, or fp32 weights with"
            " autocast_dtype='bfloat16'"
        )


class Released:
    """Each gradient used and freed inside the backward, as soon as it is whole: at no time is there
    more than one. `norm` [] is that of all gradients since `begin`.

    One optimizer over all parameters does: it passes over those without a gradient, and when one
    has its own, no other has.
    """

    def __init__(self, optimizer: Optimizer, params: Sequence[nn.Parameter]) -> None:
        self._optimizer, self._params = optimizer, params
        self._squares: Tensor | None = None

    @contextmanager
    def on(self) -> Iterator[None]:
        """In the block a backward is the whole update."""
        self._squares = None
        handles = [p.register_post_accumulate_grad_hook(self._update) for p in self._params]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _update(self, p: Tensor) -> None:
        assert p.grad is not None
        square = torch.linalg.vector_norm(p.grad, dtype=torch.float32).square()
        self._squares = square if self._squares is None else self._squares + square
        self._optimizer.step()
        p.grad = None

    @property
    def norm(self) -> Tensor:
        assert self._squares is not None
        return self._squares.sqrt()
