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
from deepalign_kernels.train.zero import STAGES

# Temporaries of an update, in bytes per element of the largest parameter: torchao works in fp32
# copies (SmolLM2-135M takes 991 MiB where 838 were expected without them); the others need none.
IN_THE_UPDATE = {"adamw_bf16_sr": 8, "adamw_8bit": 8, "adamw_4bit": 8}
# What is divided among several devices, in each way. DeepSpeed updates a copy of the weights.
SHARES = {"ddp": (), "zero2": ("gradients", "states")}
SHARES |= dict.fromkeys(("fsdp", "zero3"), ("weights", "gradients", "states"))
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
        anchored: the loss has a divergence over the vocabulary from hidden states that were kept.
        reference_head: the reference's output head is in memory, for that or for evaluations.
        parallel: what several devices share, "ddp", "fsdp", "zero2" or "zero3".
    """

    dtype: str = "float32"
    autocast: bool = False
    optimizer: str = "adamw"
    release_gradients: bool = False
    gradient_checkpointing: bool = False
    offload_activations: bool = False
    cpu_offload: bool = False
    frozen_reference: bool = False
    anchored: bool = False
    reference_head: bool = False
    parallel: str = "fsdp"

    @classmethod
    def of_run(cls, config: TrainConfig, dtype: str = "float32", way: str = "fsdp") -> Setting:
        """That of `config` with weights of `dtype`; an optimizer of one's own counts as AdamW.

        `way`: in which several processes share, one of `parallel`."""
        named: dict[str, Any] = {f.name: getattr(config, f.name, None) for f in fields(cls)}
        named |= {"dtype": dtype, "autocast": config.autocast_dtype is not None}
        named["optimizer"] = config.optimizer if isinstance(config.optimizer, str) else "adamw"
        second = config.needs_reference and config.reference in ("frozen", "model")
        kept = config.kl_coef > 0 and config.reference == "precomputed"
        named |= {"frozen_reference": second, "anchored": config.kl_coef > 0, "parallel": way}
        named["reference_head"] = kept or config.eval_kl
        return cls(**named)

    def __post_init__(self) -> None:
        check.one_of("dtype", self.dtype, tuple(DTYPES))
        check.one_of("optimizer", self.optimizer, tuple(OPTIMIZERS))
        check.one_of("parallel", self.parallel, tuple(SHARES))

    def share(self, part: str, gpus: int) -> int:
        """Among how many devices a part is divided."""
        return gpus if part in SHARES[self.parallel] else 1


@dataclass(frozen=True)
class Memory:
    """Bytes of a step, on one device unless it says host.

    Attributes:
        weights, gradients, states: of parameters, a frozen reference's too, and optimizer; with
            DeepSpeed its copy of the weights in fp32 among the states.
        reference: the reference's output head, where hidden states are what is kept of it.
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
    reference: int = 0

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
    device: str = "cuda",
) -> Memory:
    """Memory of fine-tuning with the constrained loss, by default with a precomputed reference: of
    all weights, or of the adapters of `shape`, which are fp32.

    Args:
        shape: of the model.
        setting: of the run.
        batch: conversations per forward on each device.
        length: tokens of each.
        gpus: devices that share as `setting.parallel` says.
        accumulate: several forwards a step, so that gradients are there during the forward too.
        trained_share: of the tokens; the head sees no others.
        device: "cuda" or "cpu", where it will run: the head's chunks are others. A GPU need not be
            here; "cpu" means this machine's.

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

    frozen = shape.adapters is not None
    trained, trained_dtype = shape.parameters, dtype
    if shape.adapters is not None:
        trained, trained_dtype = shape.adapters, torch.float32
    weights_of, gradients_of, states_of = (
        setting.share(part, gpus) for part in ("weights", "gradients", "states")
    )
    zero = setting.parallel in STAGES and gpus > 1
    gradients = trained * (4 if zero else trained_dtype.itemsize) // gradients_of
    weights = shape.parameters * size * (2 if setting.frozen_reference else 1)
    weights = (weights + (shape.adapters or 0) * 4) // weights_of
    if setting.release_gradients:
        gradients = min(gradients, max(shape.layer, shape.head) * size)
    kind = OPTIMIZERS[setting.optimizer]
    copy = 4 * zero
    states = int(trained * (kind.states[torch.float32 if zero else trained_dtype] + copy))
    states //= states_of
    kept = shape.kept(batch, length, dtype, autocast)
    if setting.gradient_checkpointing:
        # Below frozen weights the first layer keeps less than others: `outside` is negative then.
        activations, layer = max(kept.outside, 0) + shape.layers * kept.inputs, kept.layer
    else:
        activations, layer = kept.outside + shape.layers * kept.layer, 0

    host = int(trained * (kind.host or {}).get(trained_dtype, 0)) // states_of
    if setting.cpu_offload:
        host, gradients, states = host + gradients + states, 0, 0
        if setting.parallel != "zero2":
            host, weights = host + weights, 0
    if setting.gradient_checkpointing and setting.offload_activations:
        away = max(shape.layers - 2, 0) * kept.inputs
        host, activations = host + away, activations - away
    gathered = 0
    if not weights or weights_of > 1:  # this layer and the next, and the head
        gathered = (2 * shape.layer + shape.head) * compute.itemsize
    rows = max(int(batch * length * trained_share), 1)
    fused = _head(shape, setting, rows, batch * length, dtype, autocast, device)
    # A frozen head of the policy is the reference's as well.
    reference = shape.head * size if setting.reference_head and not frozen else 0
    if setting.anchored and setting.reference_head:
        reference += rows * shape.hidden * size
    head = max(fused.peak - fused.grad_head, 0)
    plain = rows * shape.vocab * (compute.itemsize + 3 * 4)

    steady = weights + states + gathered + reference
    before = gradients if accumulate and not setting.release_gradients else 0
    end_of_forward = activations + head + max(before, fused.grad_head)
    # A tied embedding's own gradient is dense; when the backward ends it is added to the head's.
    tied = shape.embedding * size if shape.tied and not frozen else 0
    end_of_backward = gradients + kept.outside + (layer or kept.layer) + tied
    largest = max(shape.layer // 3, shape.head) if shape.adapters is None else shape.adapters
    copies = IN_THE_UPDATE.get(setting.optimizer, 0) * largest
    update = gradients + copies
    if setting.release_gradients:  # the update is a part of the backward
        update += kept.outside + layer
    peak = steady + max(end_of_forward, end_of_backward, update)
    parts = weights, gradients, states, activations, layer, head, plain, gathered, host, peak
    return Memory(*parts, reference)


def _head(
    shape: ModelShape,
    setting: Setting,
    rows: int,
    tokens: int,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    device: str,
) -> Any:
    frozen, more = shape.adapters is not None, {}
    if setting.anchored:
        more = {"kl_coef": 1.0, "ref_hidden_size": shape.hidden, "shared_head": frozen}
    return estimate_memory(
        "linear_constrained_loss",
        tokens=tokens,
        trained_tokens=rows,
        hidden_size=shape.hidden,
        vocab_size=shape.vocab,
        dtype=dtype,
        autocast_dtype=autocast,
        device=device,
        requires_grad=("hidden",) if frozen else ("hidden", "weight"),
        **more,
    )
