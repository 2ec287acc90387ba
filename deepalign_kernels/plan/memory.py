"""Bytes on the device at the fullest moment of a step of full fine-tuning, part by part."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from deepalign_kernels import check
from deepalign_kernels.ops.linear.memory import estimate_memory
from deepalign_kernels.plan.shape import ModelShape
from deepalign_kernels.train.config import TrainConfig
from deepalign_kernels.train.optimizers import OPTIMIZERS

# Temporaries of an update, in bytes per element of the largest parameter: torchao works in fp32
# copies (SmolLM2-135M takes 991 MiB where 838 were expected without them); the others need none.
IN_THE_UPDATE = {"adamw_bf16_sr": 8, "adamw_8bit": 8, "adamw_4bit": 8}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """The choices of a training run that decide about memory, named as `TrainConfig` names them.

    Args:
        dtype: of the weights, "float32" or "bfloat16".
        autocast: the forward in bf16.
        optimizer: a name of `TrainConfig.optimizer`.
        release_gradients: each is used and freed inside the backward.
        gradient_checkpointing: layers are computed again in the backward.
        offload_activations: the inputs of the layers in host memory, two of them on the device.
        cpu_offload: weights, gradients and states in host memory, a layer at a time on the device.
        frozen_reference: a second model, which does not train, beside the first.
    """

    dtype: str = "float32"
    autocast: bool = False
    optimizer: str = "adamw"
    release_gradients: bool = False
    gradient_checkpointing: bool = False
    offload_activations: bool = False
    cpu_offload: bool = False
    frozen_reference: bool = False

    @classmethod
    def of_run(cls, config: TrainConfig, dtype: str = "float32") -> Setting:
        """That of `config` with weights of `dtype`; an optimizer of one's own counts as AdamW."""
        named: dict[str, Any] = {f.name: getattr(config, f.name, None) for f in fields(cls)}
        named |= {"dtype": dtype, "autocast": config.autocast_dtype is not None}
        named["optimizer"] = config.optimizer if isinstance(config.optimizer, str) else "adamw"
        named["frozen_reference"] = config.needs_reference and config.reference == "frozen"
        return cls(**named)

    def __post_init__(self) -> None:
        check.one_of("dtype", self.dtype, tuple(DTYPES))
        check.one_of("optimizer", self.optimizer, tuple(OPTIMIZERS))


@dataclass(frozen=True)
class Memory:
    """Bytes of a step, on one device unless it says host.

    Attributes:
        weights, gradients, states: of parameters, a frozen reference's too, and optimizer.
        activations: what the forward keeps for the backward, below the head.
        layer: what the backward of one layer holds in addition, where it is computed again.
        head: logits and gradients inside the fused loss, beyond the gradient of the head's weight.
        plain_head: what whole logits would take: 16-bit or fp32 logits, their fp32 copy, the
            log-softmax and its gradient, as transformers' own loss does.
        gathered: whole weights of layers at work, where they are sharded or offloaded.
        host: in host memory.
        peak: at the fullest moment: the end of the forward, of the backward, or the update.
    """

    weights: int
    gradients: int
    states: int
    activations: int
    layer: int
    head: int
    plain_head: int
    gathered: int
    host: int
    peak: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def estimate(
    shape: ModelShape,
    setting: Setting,
    *,
    batch: int,
    length: int,
    gpus: int = 1,
    accumulate: bool = False,
    trained_share: float = 1.0,
) -> Memory:
    """Memory of full fine-tuning with the constrained loss and a precomputed reference.

    Args:
        shape: of the model.
        setting: of the run.
        batch: conversations per forward on each device.
        length: tokens of each.
        gpus: devices that share weights, gradients and states (FSDP).
        accumulate: several forwards a step, so that gradients are there during the forward too.
        trained_share: of the tokens; the head sees no others.

    Raises:
        ValueError: a number out of range, or gradients released with accumulation.
    """
    for name, value in (("batch", batch), ("length", length), ("gpus", gpus)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
    check.number("trained_share", trained_share, above=0.0, below=1.0 + 1e-9)
    if setting.release_gradients and accumulate:
        raise ValueError("release_gradients: a gradient that is gone cannot be accumulated")
    dtype, size = DTYPES[setting.dtype], DTYPES[setting.dtype].itemsize
    autocast = torch.bfloat16 if setting.autocast and dtype is torch.float32 else None
    compute = autocast or dtype

    gradients = shape.parameters * size // gpus
    weights = gradients * (2 if setting.frozen_reference else 1)
    if setting.release_gradients:
        gradients = max(shape.layer, shape.head) * size // gpus
    states = int(shape.parameters * OPTIMIZERS[setting.optimizer].states[dtype]) // gpus
    kept = shape.kept(batch, length, dtype, autocast)
    if setting.gradient_checkpointing:
        activations, layer = kept.outside + shape.layers * kept.inputs, kept.layer
    else:
        activations, layer = kept.outside + shape.layers * kept.layer, 0

    kind, gathered = OPTIMIZERS[setting.optimizer], 0
    host = int(shape.parameters * (kind.host or {}).get(dtype, 0)) // gpus
    if setting.cpu_offload:
        host, weights, gradients, states = host + weights + gradients + states, 0, 0, 0
    if setting.gradient_checkpointing and setting.offload_activations:
        away = max(shape.layers - 2, 0) * kept.inputs
        host, activations = host + away, activations - away
    if setting.cpu_offload or gpus > 1:  # this layer and the next, and the head
        gathered = (2 * shape.layer + shape.head) * compute.itemsize
    rows = max(int(batch * length * trained_share), 1)
    fused = _head(shape, rows, batch * length, dtype, autocast)
    head = max(fused.peak - fused.grad_head, 0)
    plain = rows * shape.vocab * (compute.itemsize + 3 * 4)

    steady = weights + states + gathered
    before = gradients if accumulate and not setting.release_gradients else 0
    end_of_forward = activations + head + max(before, fused.grad_head)
    # A tied embedding's own gradient is dense; when the backward ends it is added to the head's.
    tied = shape.embedding * size if shape.tied else 0
    end_of_backward = gradients + kept.outside + (layer or kept.layer) + tied
    copies = IN_THE_UPDATE.get(setting.optimizer, 0) * max(shape.layer // 3, shape.head)
    update = gradients + copies
    if setting.release_gradients:  # the update is a part of the backward
        update += kept.outside + layer
    peak = steady + max(end_of_forward, end_of_backward, update)
    return Memory(weights, gradients, states, activations, layer, head, plain, gathered, host, peak)


def _head(
    shape: ModelShape, rows: int, tokens: int, dtype: torch.dtype, autocast: torch.dtype | None
) -> Any:
    return estimate_memory(
        "linear_constrained_loss",
        tokens=tokens,
        trained_tokens=rows,
        hidden_size=shape.hidden,
        vocab_size=shape.vocab,
        dtype=dtype,
        autocast_dtype=autocast,
    )
