"""Two ways to be sure that a loss is what is trained: neither lets a model ignore it in silence.

A Hugging Face model takes any keyword and any attribute. A loss given to a model that is not
attached, or put on a PEFT wrapper, or on a model whose trainer computes the loss by itself (trl),
changes nothing, and plain cross-entropy is trained: the very attack that the constraint is for.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from deepalign_kernels.hf.attach import inner_model
from deepalign_kernels.hf.losses import LossOutput

Model = TypeVar("Model", bound=nn.Module)


def compute_loss(model: nn.Module, dak_loss: Callable[..., Any], **batch: Any) -> LossOutput:
    """`model(**batch, dak_loss=dak_loss)`, and an error if the model did not see the loss.

    Args:
        model: attached (`attach`), in whatever wrapper it is trained.
        dak_loss: a loss of this package, or a callable of one's own.
        batch: what the model's call takes; `labels` or `shift_labels` among it.

    Returns:
        What `attach` describes.

    Raises:
        ValueError: the model is not attached, so that it would have trained its own loss.
    """
    out = model(**batch, dak_loss=dak_loss)
    if not isinstance(out, LossOutput):
        raise ValueError(
            f"model: {type(model).__name__} took no notice of dak_loss and returned a"
            f" {type(out).__name__}; call dak.hf.attach(model) first"
        )
    return out


class _Watch:
    """The loss function of a model, and whether each training forward came to it."""

    def __init__(self, owner: str, loss: Callable[..., Any]) -> None:
        self.loss, self.owner, self.missed = loss, owner, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.missed = False
        return self.loss(*args, **kwargs)

    def ran(self, decoder: nn.Module, *_: Any) -> None:
        """After the decoder layers, before the loss, which is computed in the same forward."""
        self.check()
        self.missed = decoder.training and torch.is_grad_enabled()

    def check(self, *_: Any) -> None:
        if not self.missed:
            return
        self.missed = False
        raise RuntimeError(
            f"{type(self.loss).__name__} was installed on {self.owner}, and a training"
            " step went by without it: whoever called the model computed another loss. The call"
            " must bring labels; trl's SFTTrainer computes its own loss (use"
            " deepalign_kernels.trl.ConstrainedSFTTrainer); Trainer(label_smoothing_factor=,"
            " compute_loss_func=) does too"
        )


def install(model: Model, loss_function: Callable[..., Any]) -> Model:
    """Make `loss_function` the loss of `model`, as `model.loss_function = ...` only seems to.

    Finds the model inside a PEFT, DDP or torch.compile wrapper. A step whose forward (in training
    mode, with gradient) did not call `loss_function` raises a RuntimeError at the optimizer's step
    or at the next forward. Installing again replaces the loss.

    Args:
        model: a Hugging Face causal language model.
        loss_function: as transformers calls it, such as `LogitsLoss`.

    Returns:
        `model`.

    Raises:
        ValueError: not a model whose loss can be set. TypeError: `loss_function` is no callable.
    """
    if not callable(loss_function):
        raise TypeError(f"loss_function: expected a callable, got {loss_function!r}")
    inner: Any = inner_model(model)
    decoder = getattr(inner, "base_model", None)
    if not hasattr(type(inner), "loss_function") or decoder is None or decoder is inner:
        raise ValueError(
            f"model: {type(inner).__name__} has no loss_function to set; expected a transformers"
            " causal language model"
        )
    uninstall(model)
    watch = _Watch(type(inner).__name__, loss_function)
    inner.loss_function = watch
    inner.__dict__[_KEY] = (
        decoder.register_forward_hook(watch.ran),
        register_optimizer_step_pre_hook(watch.check),
    )
    weakref.finalize(inner, inner.__dict__[_KEY][1].remove)
    return model


def uninstall(model: Model) -> Model:
    """Undo `install`; a model without one stays as it is. Returns `model`."""
    inner: Any = inner_model(model)
    hooks = inner.__dict__.pop(_KEY, ())
    for hook in hooks:
        hook.remove()
    if hooks:
        with contextlib.suppress(AttributeError):
            del inner._loss_function
    return model


_KEY = "_dak_installed"
