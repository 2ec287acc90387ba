"""Ways to fine-tune, the most exact first; each is what `deepalign train` takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deepalign_kernels.plan.memory import Memory, Setting, estimate
from deepalign_kernels.plan.shape import ModelShape


@dataclass(frozen=True)
class Recipe:
    """A setting with a name, and what it costs beside memory."""

    name: str
    setting: Setting
    says: str


_BF16 = {"dtype": "bfloat16", "gradient_checkpointing": True}
RECIPES = (
    Recipe("fp32", Setting(autocast=True), "fp32 weights, bf16 products: nothing given up"),
    Recipe(
        "fp32-checkpointing",
        Setting(autocast=True, gradient_checkpointing=True),
        "as fp32, to the same numbers, layers computed twice: about a third more time",
    ),
    Recipe(
        "bf16-kahan",
        Setting(optimizer="adamw_kahan", **_BF16),
        "bf16 weights with a compensation of what rounding takes",
    ),
    Recipe(
        "bf16-8bit",
        Setting(optimizer="adamw_8bit", **_BF16),
        "bf16 weights rounded stochastically, states of 8 bits",
    ),
    Recipe(
        "bf16-8bit-release",
        Setting(optimizer="adamw_8bit", release_gradients=True, **_BF16),
        "as bf16-8bit, updated inside the backward: no accumulation, no clipping",
    ),
    Recipe(
        "bf16-4bit-release",
        Setting(optimizer="adamw_4bit", release_gradients=True, **_BF16),
        "as bf16-8bit-release, with states of 4 bits",
    ),
    Recipe(
        "bf16-offload",
        Setting(optimizer="adamw_offload", release_gradients=True, **_BF16),
        "bf16 weights rounded stochastically, states and update on the CPU, slow",
    ),
    Recipe(
        "fp32-offload",
        Setting(autocast=True, gradient_checkpointing=True, cpu_offload=True),
        "fp32 weights, gradients and states in host memory: exact, slow",
    ),
)
WITH_ADAPTERS = (
    Recipe("lora-fp32", Setting(autocast=True), "frozen fp32 weights, bf16 products"),
    Recipe(
        "lora-fp32-checkpointing",
        Setting(autocast=True, gradient_checkpointing=True),
        "as lora-fp32, to the same numbers, layers computed twice: about a third more time",
    ),
    Recipe("lora-bf16", Setting(dtype="bfloat16"), "frozen bf16 weights, fp32 adapters"),
    Recipe(
        "lora-bf16-checkpointing",
        Setting(**_BF16),
        "frozen bf16 weights, fp32 adapters, layers computed twice: about a third more time",
    ),
)


def first_that_fits(
    shape: ModelShape,
    device_bytes: float,
    *,
    batch: int,
    length: int,
    gpus: int = 1,
    host_bytes: float = float("inf"),
    recipes: Iterable[Recipe] = RECIPES,
) -> tuple[Recipe | None, dict[str, Memory]]:
    """The most exact recipe whose peak fits, and the memory of each one.

    Args:
        shape: of the model.
        device_bytes: of one device, for tensors: what its driver and torch keep is not in it.
        batch: conversations per forward on each device.
        length: tokens of each.
        gpus: devices that share parameters, gradients and states (FSDP).
        host_bytes: for what is offloaded.
        recipes: to choose from, in this order.
    """
    found: Recipe | None = None
    all_of_them = {}
    for recipe in recipes:
        memory = estimate(shape, recipe.setting, batch=batch, length=length, gpus=gpus)
        all_of_them[recipe.name] = memory
        if found is None and memory.peak <= device_bytes and memory.host <= host_bytes:
            found = recipe
    return found, all_of_them
