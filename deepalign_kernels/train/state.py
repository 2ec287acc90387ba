"""The state of model and optimizer as plain tensors by name, whatever they are spread over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from deepalign_kernels.train.ranks import is_sharded
from deepalign_kernels.train.zero import zero_of


def trained_state(model: nn.Module) -> dict[str, Any]:
    """The state dict without parameters that are not trained: of LoRA, the adapter alone.

    Of a model that processes share whole tensors on the CPU, in the first one only; all must call.
    """
    if (zero := zero_of(model)) is not None:
        return zero.trained_state()
    return {name: x for name, x in full_state(model).items() if name not in _frozen(model)}


def full_state(model: nn.Module) -> dict[str, Any]:
    """The state dict; of a sharded model as in `trained_state`."""
    if (zero := zero_of(model)) is not None:
        return zero.full_state()
    if not is_sharded(model):
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def load_trained(model: nn.Module, state: dict[str, Any]) -> None:
    """Put what `trained_state` gave back.

    Raises:
        ValueError: another set of names.
    """
    expected = {name for name in model.state_dict() if name not in _frozen(model)}
    if odd := sorted(expected ^ state.keys()):
        raise ValueError(
            f"resume: the checkpoint and the parameters that model trains differ, first in {odd[0]}"
        )
    if (zero := zero_of(model)) is not None:
        zero.load_trained(state)
        return
    if not is_sharded(model):
        model.load_state_dict(state, strict=False)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, dict(state), options=options)


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """The optimizer's state dict with names of parameters in the place of numbers; of a sharded
    model as in `trained_state`."""
    if (zero := zero_of(model)) is not None:
        return zero.optimizer_state()
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_optimizer_state_dict,
        )

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(model, optimizer, options=options)
    state = optimizer.state_dict()
    if hasattr(optimizer, "param_d2h_map"):  # torchao's, on the CPU: its own order, no numbers
        return {"on the CPU": state}
    names = list(_names(optimizer, model))
    return {
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def load_optimizer(optimizer: Optimizer, model: nn.Module, state: dict[str, Any]) -> None:
    """Put what `optimizer_state` gave back."""
    if (zero := zero_of(model)) is not None:
        zero.load_optimizer(state)
        return
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_optimizer_state_dict,
        )

        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(model, optimizer, state, options=options)
        return
    if hasattr(optimizer, "param_d2h_map"):
        away: Any = optimizer
        for p, copy in away.param_d2h_map.items():  # of the weights before these were loaded
            copy.detach().copy_(p.detach())
        away.load_state_dict(state["on the CPU"])
        if away.d_opt is not None:  # else rates would be set in groups that nobody reads any more
            away.d_param_groups = away.d_opt.param_groups
        return
    numbers = {name: number for number, name in enumerate(_names(optimizer, model))}
    optimizer.load_state_dict(
        {
            "state": {numbers[name]: values for name, values in state["state"].items()},
            "param_groups": [
                {**group, "params": [numbers[name] for name in group["params"]]}
                for group in state["param_groups"]
            ],
        }
    )


def all_finite(model: nn.Module) -> bool:
    """Whether no trained parameter holds a NaN or an infinity, in this process."""
    every = [p for p in model.parameters() if p.requires_grad]
    return all(bool(_local(p).isfinite().all()) for p in every)


def _local(x: Tensor) -> Tensor:
    """This process's part of a sharded tensor."""
    x = getattr(x, "ds_tensor", x)
    return x.to_local() if hasattr(x, "to_local") else x  # type: ignore[operator]


def _frozen(model: nn.Module) -> set[str]:
    every = model.named_parameters(remove_duplicate=False)
    return {name for name, p in every if not p.requires_grad}


def _names(optimizer: Optimizer, model: nn.Module) -> Iterator[str]:
    """Of the optimizer's parameters, in the order of its state dict's numbers."""
    named = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            yield named[id(p)]
