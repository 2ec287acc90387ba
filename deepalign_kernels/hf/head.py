"""What an output head computes and with which weights: nn.Linear, or a PEFT layer around one.

Anything else raises. A head that is not understood must not be approximated: the loss would be that
of another model.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepalign_kernels import check

IGNORE = -100
_UNFUSED = "compute the loss from this model's logits instead (dak.constrained_loss, dak.token_kl)"


@dataclass(frozen=True)
class Head:
    """What a loss sees inside the head's call. T' is T - 1 for `labels` [B, T], T for shift_labels.

    The model's logits are softcap * tanh(logit_scale * (hidden @ W.T + bias) / softcap), with
    W = weight + lora_scale * lora_b @ lora_a. `options` has all of that but hidden and weight,
    named as `dak.linear_token_logp` and its siblings take it.
    """

    hidden: Tensor  # [B, T', H]: row t predicts target t
    weight: Tensor  # [V, H], whole on every rank; requires grad only where it is trained
    target: Tensor  # [B, T'] integers, -100 where nothing is trained
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float
    lora_a: Tensor | None  # [r, H]; several active adapters are stacked
    lora_b: Tensor | None  # [V, r]
    lora_scale: float
    frozen: bool  # weight and bias are not trained: what they are without the adapters, too
    num_items_in_batch: int | Tensor | None  # as handed to the model's call
    source: object  # which attached model this is; compare with `is`

    @property
    def options(self) -> dict[str, Any]:
        names = ("bias", "softcap", "logit_scale", "lora_a", "lora_b", "lora_scale")
        return {name: getattr(self, name) for name in names}

    def merged_weight(self) -> Tensor:
        """W [V, H], for losses of one's own; LoRA on the head makes it a new tensor."""
        if self.lora_a is None or self.lora_b is None:
            return self.weight
        a, b = self.lora_a.to(self.weight.dtype), self.lora_b.to(self.weight.dtype)
        return self.weight + self.lora_scale * (b @ a)

    def align(self, name: str, x: Any) -> Any:
        """`x`, per token, in the shape of `target`; in that of `labels` it is shifted as they are.

        Raises:
            ValueError: neither shape.
        """
        if not isinstance(x, Tensor) or x.dim() == 0:
            return x
        x = x.to(self.hidden.device)
        rows, columns = self.target.shape
        if tuple(x.shape) == (rows, columns):
            return x
        if tuple(x.shape) == (rows, columns + 1):
            return x[:, 1:]
        raise ValueError(
            f"{name}: expected {(rows, columns + 1)} like the labels or {(rows, columns)} like the"
            f" log-probs, got {check.describe(x)}; under prompt tuning PEFT lengthens `labels`,"
            " so pass `shift_labels` there"
        )


class HeadParameters(NamedTuple):
    """The fields of a Head that come from its module, see there."""

    weight: Tensor
    bias: Tensor | None
    frozen: bool
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    lora_scale: float = 1.0

    def first(self, vocab: int) -> HeadParameters:
        """Those of the first `vocab` logits (a slice costs a copy in backward)."""
        if self.weight.shape[0] == vocab:
            return self
        bias, b = self.bias, self.lora_b
        return self._replace(
            weight=self.weight[:vocab],
            bias=None if bias is None else bias[:vocab],
            lora_b=None if b is None else b[:vocab],
        )


def computing_module(head: nn.Module) -> nn.Module:
    """The module whose forward is the head's arithmetic.

    PEFT's wrappers call another module, which may be a sharding unit of its own; its hooks count.
    """
    peft = sys.modules.get("peft.utils.other")
    if peft is None or not isinstance(head, peft.AuxiliaryTrainingWrapper):
        return head
    wrapper: Any = head
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or any(n not in wrapper._adapters for n in active):
        return wrapper.original_module
    if isinstance(head, peft.ModulesToSaveWrapper):
        return wrapper.modules_to_save[active[0]]
    if isinstance(head, peft.TrainableTokensWrapper):
        return wrapper.token_adapter
    return head


def read_weights(module: Any) -> HeadParameters:
    """The weights `module` applies now. To be called inside its own call, where shards are whole.

    Raises:
        TypeError: neither nn.Linear nor a PEFT layer known here (quantised heads, DoRA, others).
        RuntimeError: weights that are not whole here.
        ValueError: LoRA dropout in training.
    """
    lora = sys.modules.get("peft.tuners.lora.layer")
    tokens = sys.modules.get("peft.tuners.trainable_tokens.layer")
    if lora is not None and type(module).forward is lora.Linear.forward:
        return _read_lora(module)
    if tokens is not None and type(module).forward is tokens.TrainableTokensLayer.forward:
        base = _read_linear(module.base_layer)
        if module.disable_adapters or module.merged or not module.active_adapters:
            return base
        merged = module.get_merged_weights(module.active_adapters)
        return HeadParameters(merged, None, frozen=False)  # PEFT, too, drops the bias here
    return _read_linear(module)


def _read_linear(module: nn.Module) -> HeadParameters:
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise TypeError(
            f"the output head is a {type(module).__module__}.{type(module).__qualname__}, expected"
            " a plain nn.Linear, or LoRA, modules_to_save or trainable tokens around one. Quantised"
            " heads and other adapters are not supported: keep the head in bf16 or fp32, or"
            f" {_UNFUSED}"
        )
    gathered("the head's weight", module.weight)
    trained = module.weight.requires_grad
    if module.bias is not None:
        gathered("the head's bias", module.bias)
        trained |= module.bias.requires_grad
    return HeadParameters(module.weight, module.bias, frozen=not trained)


def _read_lora(module: Any) -> HeadParameters:
    base = _read_linear(module.base_layer)
    if module.disable_adapters and module.merged:
        module.unmerge()  # as PEFT's own forward does
    names = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or not names:
        return base
    for name in names:
        _check_lora(module, name)
    a = [module.lora_A[name].weight for name in names]
    b = [module.lora_B[name].weight for name in names]
    scales = [float(module.scaling[name]) for name in names]
    if len(names) == 1:
        return base._replace(lora_a=a[0], lora_b=b[0], lora_scale=scales[0])
    scaled = [scale * x for scale, x in zip(scales, b, strict=True)]
    return base._replace(lora_a=torch.cat(a), lora_b=torch.cat(scaled, dim=1))


def _check_lora(module: Any, name: str) -> None:
    elsewhere = "take the head out of the adapter's target_modules"
    if (variant := module.lora_variant.get(name)) is not None:
        kind = getattr(variant, "__name__", type(variant).__name__)
        raise TypeError(
            f"the output head carries the LoRA variant {kind} (DoRA, aLoRA, ...), which is not"
            f" weight + B @ A: {elsewhere}, or {_UNFUSED}"
        )
    if module.lora_B[name].bias is not None:
        raise TypeError(f"lora_bias on the output head is not supported: {elsewhere}")
    if module.training and getattr(module.lora_dropout[name], "p", 0.0) > 0:
        raise ValueError(
            "lora_dropout on the output head cannot run inside the loss: set lora_dropout=0 or"
            f" {elsewhere}"
        )
    gathered(f"lora_A of adapter {name!r} on the head", module.lora_A[name].weight)
    gathered(f"lora_B of adapter {name!r} on the head", module.lora_B[name].weight)


def gathered(name: str, x: Tensor) -> Tensor:
    """`x`, if it is an ordinary tensor with all elements; else an error that says what to do."""
    from torch.distributed.tensor import DTensor

    if isinstance(x, DTensor):
        raise RuntimeError(
            f"{name}: a DTensor, sharded over {x.device_mesh}. Under FSDP2 it is whole only inside"
            " the head's own call: call the sharded model, not one of its parts; outside, use"
            " .full_tensor().detach(). A head sharded by tensor parallelism is not supported: leave"
            " lm_head out of the tp_plan"
        )
    if x.device.type == "meta" or x.numel() == 0 or x.dim() == 0:
        raise RuntimeError(
            f"{name}: empty here (shape {tuple(x.shape)} on {x.device}). Partitioned (ZeRO-3,"
            " FSDP1) and offloaded weights exist only inside the head's own call: call the wrapped"
            " model, not one of its parts; outside, use deepspeed.zero.GatheredParameters and a"
            " detached clone"
        )
    if x.dtype not in check.DTYPES or type(x) not in (Tensor, nn.Parameter):
        raise TypeError(
            f"{name}: a {type(x).__name__} of {x.dtype}; quantised heads are not supported: keep"
            f" the head in bf16 or fp32, or {_UNFUSED}"
        )
    return x


@contextlib.contextmanager
def swapped_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """`module` computes `forward` in the block; all hooks stay in force, accelerate's devices too.

    Raises:
        TypeError: somebody else has replaced the forward of this very module.
    """
    slot = "_old_forward" if hasattr(module, "_hf_hook") else "forward"  # accelerate moved it there
    before = module.__dict__.get(slot)
    if slot == "forward" and before is not None:
        raise TypeError(
            f"the output head's forward was replaced by {before!r}; what it computes is unknown:"
            f" {_UNFUSED}"
        )
    module.__dict__[slot] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[slot]
        else:
            module.__dict__[slot] = before
