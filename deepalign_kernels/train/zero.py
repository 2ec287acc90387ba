"""A model in DeepSpeed's hands: ZeRO-2 and ZeRO-3, in the place of DDP and FSDP2.

DeepSpeed exchanges gradients, keeps this process's share of states (ZeRO-3: of weights as well) and
makes the update. The objective, the token counts, the optimizer and its rate are this library's;
a checkpoint holds whole tensors by name, as in the other ways.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

STAGES = {"zero2": 2, "zero3": 3}
BUCKET = 50_000_000  # elements sent at once; DeepSpeed's own 5e8 are a buffer of 2 GB in fp32
_SLOT = "_deepalign_zero"


class Zero:
    """`model` and `optimizer` as DeepSpeed runs them.

    Args:
        model: on the device of this process; of ZeRO-3 perhaps on the CPU, from where it goes to
            the device parameter by parameter. fp32, or bf16: then the update is made on an fp32
            copy of the weights, of which each process has its share.
        optimizer: over the parameters of `model`, element by element (AdamW): it gets flat pieces.
        device: of this process.
        stage: 2 or 3.
        offload: states, and with ZeRO-3 weights, lie in host memory.
        batch_size: conversations of a forward; DeepSpeed only tells it.
        max_grad_norm: 2-norm to which the gradient of all processes is clipped; None: not.
        autocast_dtype: of the forward; DeepSpeed takes no autocast from outside.

    Attributes:
        engine: what a forward calls.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        device: torch.device,
        *,
        stage: int,
        offload: bool,
        batch_size: int,
        max_grad_norm: float | None,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        import deepspeed

        place = deepspeed.accelerator.get_accelerator().device_name()
        if place != device.type:
            raise ValueError(
                f"device: DeepSpeed works on {place} here, the model is on {device.type}; the"
                " environment variable DS_ACCELERATOR chooses"
            )
        self.model, self.optimizer, self.stage = model, optimizer, stage
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET}
        if offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        if offload and stage == 3:
            zero["offload_param"] = {"device": "cpu"}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_clipping": max_grad_norm or 0.0,
            "steps_per_print": float("inf"),
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW runs on the CPU, too
        }
        if next(model.parameters()).dtype == torch.bfloat16:
            config["bf16"] = {"enabled": True}
            config["data_types"] = {"grad_accum_dtype": "fp32"}
            config["communication_data_type"] = "fp32"
        if autocast_dtype is not None:
            config["torch_autocast"] = {
                "enabled": True,
                "dtype": str(autocast_dtype).removeprefix("torch."),
                "lower_precision_safe_modules": [],  # weights and gradients are sent as they are
            }
        self._gathered: Any = deepspeed.zero.GatheredParameters
        self._utils: Any = deepspeed.utils
        self.engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        vars(model)[_SLOT] = self

    def backward(self, loss: Tensor) -> None:
        """Gradients of a micro-batch, added up over those of the step and over the processes."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def update(self) -> Tensor:
        """One step of the optimizer; the 2-norm of the gradient before clipping, 0-d. It is
        infinite where the gradient was not finite: then nothing was updated."""
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.engine.device)

    def close(self) -> None:
        """Give the model back, if it is whole; what ZeRO-3 has shared out stays so."""
        self.engine.zero_grad()
        if self.stage == 2:
            self.engine.destroy()
            vars(self.model).pop(_SLOT, None)

    # As the functions of state.py. All processes must call; the first one gets what is whole, the
    # others nothing; each must have all of what is loaded.

    def trained_state(self) -> dict[str, Any]:
        """Trained parameters as they are updated, in fp32, and buffers, on the CPU."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return self._by_name(trained, self._utils.safe_get_full_fp32_param)

    def full_state(self) -> dict[str, Any]:
        """The state dict in the dtypes of the model, on the CPU."""
        return self._by_name(list(self.model.parameters()), self._whole)

    def load_trained(self, state: dict[str, Any]) -> None:
        """Put what `trained_state` gave back."""
        with torch.no_grad():
            for name, p in self._trained():
                self._put(p, state[name])
                self._put_share(p, state[name])
            for name, x in self._buffers():
                x.copy_(state[name])

    def optimizer_state(self) -> dict[str, Any]:
        """States as whole tensors by the names of parameters, on the CPU."""
        self._link()
        one = next(iter(self.optimizer.state.values()), {})  # each has the same keys
        out: dict[str, Any] = {}
        for name, p in self._trained():
            out[name] = {}
            for key, x in one.items():
                if x.dim() > 0:  # else the number of steps
                    x = self._utils.safe_get_full_optimizer_state(p, key)
                out[name] |= {key: x.to("cpu", copy=True)} if self._main else {}
        names = {id(p): name for name, p in self._trained()}
        groups = [
            {**group, "params": [names[id(p)] for p in params]}
            for group, params in zip(self.optimizer.param_groups, self._groups, strict=True)
        ]
        return {"state": out, "param_groups": groups} if self._main else {}

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Put what `optimizer_state` gave back."""
        every = state["state"]
        for flat in self._flats:
            self.optimizer.state[flat] = {
                key: x.to(flat.device, copy=True) if x.dim() == 0 else torch.zeros_like(flat)
                for key, x in next(iter(every.values()), {}).items()
            }
        self._link()
        for name, p in self._trained():
            for key, x in every.get(name, {}).items():
                if x.dim() > 0:
                    self._put_share(p, x, key)

    @property
    def _flats(self) -> list[Tensor]:
        """This process's share of the weights in fp32, which is what the optimizer updates."""
        zero = self.engine.optimizer
        two = self.stage == 2
        return zero.single_partition_of_fp32_groups if two else zero.fp32_partitioned_groups_flat

    def _link(self) -> None:
        """DeepSpeed 0.19 finds states by parameter only in the first of its groups."""
        if self.stage == 2:
            for group, flat in zip(self.engine.optimizer.bit16_groups, self._flats, strict=True):
                self._utils.lazy_init_hp_params_optimizer_state(group, flat, self.optimizer.state)

    def _whole(self, p: nn.Parameter) -> Tensor:
        """As the model computes with it."""
        if self.stage == 2:
            return p.detach()
        with self._gathered([p]):
            return p.detach().clone()

    def _put(self, p: nn.Parameter, x: Tensor) -> None:
        """`x` [shape of p] is what the model computes with."""
        if self.stage == 2:
            p.copy_(x)
            return
        with self._gathered([p], modifier_rank=0):
            p.copy_(x)

    def _put_share(self, p: Any, x: Tensor, key: str | None = None) -> None:
        """`x` [shape of p] is what is updated, or the optimizer's state `key` of it."""
        utils, named = self._utils, () if key is None else (key,)
        if self.stage == 2:
            put = utils.safe_set_full_optimizer_state if key else utils.safe_set_full_fp32_param
            put(p, x, *named)
            return
        group, size = p.ds_process_group, p.ds_tensor.numel()
        rank, count = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        padded = torch.zeros(size * count)  # the last share is filled up
        padded[: x.numel()] = x.flatten()
        put = utils.safe_set_local_optimizer_state if key else utils.safe_set_local_fp32_param
        put(p, padded[size * rank : size * (rank + 1)], *named)

    @property
    def _main(self) -> bool:
        return torch.distributed.get_rank() == 0

    def _by_name(
        self, params: list[nn.Parameter], read: Callable[[nn.Parameter], Tensor]
    ) -> dict[str, Any]:
        """What `read` makes of `params`, by every name that each has, and the buffers."""
        main, held = self._main, {}
        for p in params:
            x = read(p)
            held |= {id(p): x.to("cpu", copy=True)} if main else {}
        named = self.model.named_parameters(remove_duplicate=False)
        out = {name: held[id(p)] for name, p in named if id(p) in held}
        return out | {name: x.to("cpu", copy=True) for name, x in self._buffers()} if main else {}

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """Those that a state dict holds."""
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        every = self.model.state_dict().items()
        return [(name, x) for name, x in every if name not in parameters]

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]


def zero_of(model: nn.Module) -> Zero | None:
    """What DeepSpeed has of `model`."""
    return vars(model).get(_SLOT)


def installed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def zero_of_accelerate() -> tuple[str, bool]:
    """("zero2" or "zero3", whether it offloads to the CPU), as `accelerate launch` was configured.

    Raises:
        ValueError: something that this loop would not do.
    """
    asked = {
        name: os.environ.get(f"ACCELERATE_{name}", "none").lower()
        for name in (
            "DEEPSPEED_CONFIG_FILE",
            "DEEPSPEED_ZERO_STAGE",
            "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
            "DEEPSPEED_OFFLOAD_PARAM_DEVICE",
            "GRADIENT_CLIPPING",
        )
    }
    file, stage, states, weights, clipping = asked.values()
    way = {"none": "zero2"}.get(stage, f"zero{stage}")
    if file != "none":
        raise ValueError(
            "parallel: accelerate is configured with a deepspeed_config_file; this loop writes"
            " DeepSpeed's configuration itself, from zero_stage and the offload devices beside it"
        )
    if way not in STAGES:
        raise ValueError(f"parallel: accelerate is configured for ZeRO stage {stage}; set 2 or 3")
    if clipping != "none":
        raise ValueError(
            f"max_grad_norm: accelerate is configured for gradient_clipping {clipping}; leave it"
            " out there, this loop clips to its own max_grad_norm"
        )
    places = {states, weights} if way == "zero3" else {states}
    if len(places) > 1 or not places <= {"none", "cpu"}:
        raise ValueError(
            f"cpu_offload: accelerate is configured for states on {states}, weights on {weights};"
            " this loop offloads both to the cpu, or none"
        )
    return way, places == {"cpu"}
