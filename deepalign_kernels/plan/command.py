"""`deepalign plan`: which recipe fits on a machine, and the command that runs it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from deepalign_kernels import check
from deepalign_kernels.plan.memory import Memory
from deepalign_kernels.plan.recipes import RECIPES, WITH_ADAPTERS, Recipe, first_that_fits
from deepalign_kernels.plan.shape import ModelShape, shape_of
from deepalign_kernels.train.lora import Lora

GIB = 2**30
RESERVED = 1.0  # GiB that the driver, torch's context and the allocator's gaps take


@dataclass(frozen=True)
class Options:
    """Which recipe of fine-tuning fits, from the model's config alone.

    Args:
        model: a folder or name with a config; no weights are read.
        gpu_memory: GiB of one device.
        gpus: devices that share weights, gradients and states.
        host_memory: GiB of the host, for what is offloaded.
        batch_size: conversations per forward on each device.
        seq: tokens of each.
        lora_rank: of adapters in the place of all weights; None: all weights are trained.
        lora_target_modules: layers that get one, as of `deepalign train`.
        json: print JSON.
    """

    model: str
    gpu_memory: float = 24.0
    gpus: int = 1
    host_memory: float = 64.0
    batch_size: int = 1
    seq: int = 2048
    lora_rank: int | None = None
    lora_target_modules: tuple[str, ...] | None = None
    json: bool = False


def run(options: Options) -> int:
    """Print what each recipe takes, and the first that fits; 1 where none does."""
    check.number("gpu_memory", options.gpu_memory, above=RESERVED)
    check.number("host_memory", options.host_memory, above=0.0)
    lora = Lora(options.lora_rank, target_modules=options.lora_target_modules)
    shape = shape_of(options.model, lora.adapt if lora.rank else None)
    found, memories = first_that_fits(
        shape,
        (options.gpu_memory - RESERVED) * GIB,
        batch=options.batch_size,
        length=options.seq,
        gpus=options.gpus,
        host_bytes=options.host_memory * GIB,
        recipes=recipes_of(options),
    )
    if options.json:
        print(json.dumps(as_dict(options, shape, found, memories), indent=2))
    else:
        print(as_text(options, shape, found, memories))
    return 0 if found else 1


def recipes_of(options: Options) -> tuple[Recipe, ...]:
    return RECIPES if options.lora_rank is None else WITH_ADAPTERS


def as_dict(
    options: Options, shape: ModelShape, found: Recipe | None, memories: dict[str, Memory]
) -> dict[str, object]:
    numbers = {k: getattr(shape, k) for k in ("parameters", "layers", "hidden", "vocab", "tied")}
    numbers["adapters"] = shape.adapters
    return {
        "asked": asdict(options),
        "model": numbers,
        "bytes": {name: memory.as_dict() for name, memory in memories.items()},
        "recipe": found.name if found else None,
        "command": command(options, found) if found else None,
    }


def as_text(
    options: Options, shape: ModelShape, found: Recipe | None, memories: dict[str, Memory]
) -> str:
    name = type(shape.config).__name__.removesuffix("Config")
    trained, width = "", max(len(recipe.name) for recipe in recipes_of(options))
    if shape.adapters is not None:
        trained = f"; trained: adapters of {shape.adapters / 1e6:.3g} million, fp32"
    lines = [
        f"{name}: {shape.parameters / 1e9:.2f} billion parameters, {shape.layers} layers,"
        f" vocabulary {shape.vocab}{trained}; {options.batch_size} x {options.seq} tokens a"
        f" forward, {options.gpus} x {options.gpu_memory:g} GiB",
        "",
        f"{'GiB':{width}s} weights   grads  states  layers    head   (whole logits)    peak  host",
    ]
    for recipe in recipes_of(options):
        m = memories[recipe.name]
        layers = m.activations + m.layer + m.gathered
        parts = (m.weights, m.gradients, m.states, layers, m.head)
        row = "".join(f"{x / GIB:8.1f}" for x in parts)
        mark = "<- fits" if recipe is found else ""
        lines.append(
            f"{recipe.name:{width}s}{row}{m.plain_head / GIB:17.1f}{m.peak / GIB:8.1f}"
            f"{m.host / GIB:6.0f}  {mark}".rstrip()
        )
    lines += ["", *_verdict(options, found, memories)]
    return "\n".join(lines)


def _verdict(options: Options, found: Recipe | None, memories: dict[str, Memory]) -> list[str]:
    if found:
        return [f"{found.name}: {found.says}.", "", f"  {command(options, found)}"]
    least = min(recipes_of(options), key=lambda recipe: memories[recipe.name].peak)
    short = memories[least.name].peak / GIB + RESERVED - options.gpu_memory
    host = memories[least.name].host / GIB
    if short <= 0:
        return [f"nothing fits: {least.name} needs {host:.0f} GiB of host memory"]
    ways = ["Shorter sequences (--seq)", "more devices (--gpus)"]
    ways += ["adapters in place of all weights (--lora-rank 16)"] * (options.lora_rank is None)
    told = ", or ".join((", ".join(ways[:-1]), ways[-1]))
    return [f"nothing fits: {least.name}, the smallest, is {short:.1f} GiB over. {told}"]


def command(options: Options, recipe: Recipe) -> str:
    """What a shell runs for it."""
    s = recipe.setting
    many = options.gpus > 1
    words = [f"torchrun --nproc-per-node={options.gpus} -m deepalign_kernels.train" * many]
    words += ["deepalign train" * (not many), f"--model {options.model}"]
    words += [
        "--data FILE --output DIR",
        f"--batch-size {options.batch_size}",
        f"--dtype {s.dtype}",
    ]
    words += ["--autocast-dtype bfloat16" * s.autocast, f"--optimizer {s.optimizer}"]
    words += ["--gradient-checkpointing" * s.gradient_checkpointing]
    words += ["--offload-activations" * s.offload_activations]
    words += ["--release-gradients --gradient-accumulation-steps 1" * s.release_gradients]
    words += [f"--lora-rank {options.lora_rank}" * (options.lora_rank is not None)]
    targets = " ".join(options.lora_target_modules or ())
    words += [f"--lora-target-modules {targets}" * bool(targets)]
    words += ["--parallel fsdp" * (many or s.cpu_offload), "--cpu-offload" * s.cpu_offload]
    return " ".join(word for word in words if word)
