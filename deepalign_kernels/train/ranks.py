"""The processes of one run: who they are, what they tell each other, how they share a model.

Data parallelism: every process has its share of each batch, and DDP, FSDP2 or DeepSpeed (zero.py)
adds the gradients up. Counts of tokens need no message, since every process knows the whole step.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deepalign_kernels.train.economy import layers_of
from deepalign_kernels.train.zero import STAGES, zero_of_accelerate

T = TypeVar("T")


class ProcessLost(RuntimeError):
    """Another process of this run ended, so that this one cannot go on."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. Without a launcher: one of one, and nothing is sent."""

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # of what is sent

    @classmethod
    def here(cls, device: torch.device) -> Ranks:
        """As torchrun or `accelerate launch` say it; joins the others if nobody has done so yet.

        Args:
            device: of the model in this process.
        """
        dist = torch.distributed
        if not dist.is_available():
            return cls()
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if device.type == "meta":  # a model without weights, that is only looked at
            return cls(int(os.environ.get("RANK", "0")), launched)
        if not dist.is_initialized():
            if launched < 2:
                return cls()
            dist.init_process_group(_backend(device))
        if dist.get_world_size() < 2:
            return cls()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        sent = torch.device("cpu") if "gloo" in str(dist.get_backend_config()) else device
        return cls(dist.get_rank(), dist.get_world_size(), sent)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def first(self, act: Callable[[], T]) -> T:
        """What `act` gives in the first process, in all; what it raises there is raised in all."""
        if self.count == 1:
            return act()
        told: list[Any] = [None, None]
        if self.main:
            try:
                told[0] = act()
            except Exception as error:
                told[1] = error
        torch.distributed.broadcast_object_list(told, device=self.device)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def gather(self, value: T) -> list[T]:
        """`value` of every process, in all of them."""
        if self.count == 1:
            return [value]
        out: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(out, value)
        return out

    def sum(self, x: Tensor) -> Tensor:
        """Over the processes, in all of them."""
        if self.count == 1:
            return x
        sent = x.to(self.device, copy=True)
        torch.distributed.all_reduce(sent)
        return sent.to(x.device)

    def largest(self, value: float) -> float:
        if self.count == 1:
            return value
        sent = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sent, torch.distributed.ReduceOp.MAX)
        return sent.item()

    def must_agree(self, name: str, text: str) -> None:
        """Every process has the same `text`.

        Raises:
            ValueError: not so; in all of them.
        """
        digests = self.gather(hashlib.blake2b(text.encode(), digest_size=8).hexdigest())
        if odd := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
            raise ValueError(
                f"{name}: process {odd[0]} of {self.count} has other ones than process 0; each must"
                " read the same, in the same order"
            )

    def share(self, rows: list[int]) -> list[int]:
        """Those of a group of rows that are this process's; perhaps none."""
        return rows[self.rank :: self.count]

    @contextlib.contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """A connection that breaks in the block says what that means.

        Raises:
            ProcessLost: another process of the run ended.
        """
        try:
            yield
        except RuntimeError as error:
            if self.count > 1 and _is_connection(error):
                raise ProcessLost(
                    f"process {self.rank} of {self.count}: another process of this run ended; see"
                    " what it said. Start all of them again with resume='auto'"
                ) from error
            raise


ALONE = Ranks()


def _backend(device: torch.device) -> str:
    return "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"


def _is_connection(error: RuntimeError) -> bool:
    dist = torch.distributed
    kinds = (dist.DistBackendError, dist.DistNetworkError)
    return isinstance(error, kinds) or "gloo" in str(error) or "Connection closed" in str(error)


# How a model is shared.

PARALLEL = ("auto", "ddp", "fsdp", *STAGES)
SHARDED = ("fsdp", "zero3")  # of which no process has all weights
OFFLOADING = ("fsdp", *STAGES)


def way_of(parallel: str, cpu_offload: bool, autocast: bool) -> tuple[str, bool]:
    """(one of PARALLEL but "auto", whether what is not in use lies on the CPU): of the
    configuration, or for "auto" what `accelerate launch` was configured for, else DDP.

    Raises:
        ValueError: accelerate was configured for something that this loop would not do.
    """
    asked = {
        name: os.environ.get(name, "").lower()
        for name in (
            "ACCELERATE_USE_FSDP",
            "ACCELERATE_MIXED_PRECISION",
            "FSDP_VERSION",
            "FSDP_OFFLOAD_PARAMS",
        )
    }
    mixed = asked["ACCELERATE_MIXED_PRECISION"]
    if mixed not in ("", "no") and not (mixed == "bf16" and autocast):
        raise ValueError(
            f"autocast_dtype: accelerate is configured for mixed_precision {mixed}; this loop does"
            " 'bf16', with autocast_dtype='bfloat16'"
        )
    if parallel == "auto" and asked["ACCELERATE_USE_FSDP"] == "true":
        if asked["FSDP_VERSION"] not in ("", "2"):
            raise ValueError("parallel: accelerate is configured for FSDP1; set fsdp_version: 2")
        return "fsdp", cpu_offload or asked["FSDP_OFFLOAD_PARAMS"] == "true"
    if parallel == "auto" and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        way, offload = zero_of_accelerate()
        return way, cpu_offload or offload
    return ("ddp" if parallel == "auto" else parallel), cpu_offload


def device_of(way: str, device: torch.device) -> torch.device:
    """Where a model on `device` is trained. What is sharded goes from the CPU to this process's
    GPU, if there is one, part by part: the whole of it need not fit there."""
    if way in SHARDED and device.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def share_out(
    model: nn.Module, way: str, cpu_offload: bool, device: torch.device | None = None
) -> nn.Module:
    """The module to call in the place of `model`. "fsdp" shards `model` itself, for good."""
    if way == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    return shard(model, cpu_offload, device)


def shard(
    model: nn.Module, cpu_offload: bool = False, device: torch.device | None = None
) -> nn.Module:
    """`model`, sharded in place by FSDP2: each layer a unit, an output head of its own as well."""
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard

    if isinstance(model, FSDPModule):
        return model
    device = device or next(model.parameters()).device
    on_cpu = device.type == "cpu"
    if not torch.distributed.is_initialized():  # one process, which offloads
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(_backend(device), store=store, rank=0, world_size=1)
        if not on_cpu:
            torch.cuda.set_device(device)
    options: Any = (
        {"offload_policy": CPUOffloadPolicy(pin_memory=not on_cpu)} if cpu_offload else {}
    )
    for module in _units(model):
        fully_shard(module, **options)
    fully_shard(model, **options)
    return model


def _units(model: Any) -> list[nn.Module]:
    """What is gathered and let go as one."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    units = layers_of(model)
    if hasattr(base, "get_output_embeddings"):
        head, inputs = base.get_output_embeddings(), base.get_input_embeddings()
        tied = getattr(head, "weight", 0) is getattr(inputs, "weight", 1)
        inside = any(head is m for unit in units for m in unit.modules())
        if head is not None and not tied and not inside:
            units.append(head)
    return units


@contextlib.contextmanager
def accumulating(model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients of a backward in the block are sent with those of the last one only."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield
    elif hasattr(model, "set_gradient_accumulation_boundary"):  # DeepSpeed
        model.set_gradient_accumulation_boundary(last)  # type: ignore[operator]
        yield
    elif last or not hasattr(model, "no_sync"):
        yield
    else:
        with model.no_sync():  # type: ignore[operator]
            yield


def whole(x: Tensor) -> Tensor:
    """A sharded tensor put together."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # type: ignore[operator]


def is_sharded(model: nn.Module) -> bool:
    """Whether weights are whole in no process: by FSDP2, or ZeRO-3."""
    first = next(iter(model.parameters()), None)
    return hasattr(model, "set_requires_gradient_sync") or hasattr(first, "ds_id")
