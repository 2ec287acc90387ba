"""What the compiler says of the CUDA C++ kernels, and how they lie on a GPU, without one.

Registers, stack and local memory are read from the built library. Plans are those of
csrc/cuda/plan.h; a test holds both to the same choices.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
from typing import NamedTuple

import deepalign_kernels
from benchmarks.harness import report
from deepalign_kernels.traffic import IDEAL, ideal_bytes
from deepalign_kernels.triton_kernels import _sass

LIBRARY = pathlib.Path(deepalign_kernels.__file__).parent / "_native_cuda.so"
THREADS = 256
SCRATCH = 640  # bytes of shared memory beside the rows: sizeof(Scratch), rounded up
CHUNK = 16
# rows held, at most
MATRICES = dict.fromkeys(("kl_rows", "js_rows", "parts_rows", "stats_rows", "logp_rows"), 2)
# (cluster, blocks per multiprocessor), best first
CHOICES = (
    (1, 3),
    (2, 3),
    (4, 3),
    (8, 3),
    (4, 2),
    (8, 2),
    (16, 3),
    (16, 2),
    (1, 1),
    (8, 1),
    (16, 1),
)


class Gpu(NamedTuple):
    """Shared memory in bytes: most of a block, and of a multiprocessor."""

    block_shared: int
    sm_shared: int
    clusters: bool


GPUS = {
    "sm_80": Gpu(163 << 10, 164 << 10, False),
    "sm_90a": Gpu(227 << 10, 228 << 10, True),
    "sm_100": Gpu(227 << 10, 228 << 10, True),
}


class Kernel(NamedTuple):
    """One compiled kernel. Spills show as stack or local memory, which nothing else uses."""

    arch: str
    name: str
    dtype: str
    softcap: bool
    registers: int
    stack: int
    local: int
    shared: int  # static; the dynamic part is the plan's


class LaunchPlan(NamedTuple):
    """Blocks per row, bytes of shared memory per block, blocks that these leave room for on a
    multiprocessor, and whether a row stays on the chip."""

    cluster: int
    bytes: int
    blocks: int
    resident: bool


def plan(gpu: Gpu, columns: int, itemsize: int, matrices: int) -> LaunchPlan:
    """How rows of `columns` are laid over blocks, as `make_plan` in csrc/cuda/plan.h does."""
    vec = CHUNK // itemsize
    chunks = (columns + 2 * vec - 2) // vec

    def each(blocks: int) -> int:
        return min(gpu.block_shared, gpu.sm_shared // blocks - 1024)

    for cluster, blocks in CHOICES:
        size = SCRATCH + -(-chunks // cluster) * matrices * CHUNK
        if (cluster == 1 or gpu.clusters) and size <= each(blocks):
            return LaunchPlan(cluster, size, gpu.sm_shared // (size + 1024), True)
    cluster = 8 if gpu.clusters else 1
    tile = max(1, (each(3) - SCRATCH) // (matrices * CHUNK) // THREADS) * THREADS
    size = SCRATCH + min(tile, -(-chunks // cluster)) * matrices * CHUNK
    return LaunchPlan(cluster, size, gpu.sm_shared // (size + 1024), False)


def kernels(library: pathlib.Path = LIBRARY) -> list[Kernel] | str:
    """Every compiled kernel of the library, or why they cannot be listed."""
    tool = _sass.cuobjdump()
    if not library.exists():
        return f"{library.name} is not built (python -m deepalign_kernels says why)"
    if tool is None:
        return "there is no cuobjdump, neither of the CUDA toolkit nor of Triton"
    command = [tool, "-res-usage", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, arch = [], ""
    name = r"Function \S*?\d(\w+?)I(f|NS0_4bf16E|NS0_3f16E)(?:Lb([01])E)?(?:Li\dE)?\S*:"
    usage = r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    types = {"f": "fp32", "NS0_4bf16E": "bf16", "NS0_3f16E": "fp16"}
    pattern = rf"^arch = (\w+)|{name}\s*{usage}"
    for m in re.finditer(pattern, text, re.MULTILINE):
        if m[1]:
            arch = m[1]
            continue
        numbers = {k: int(m[i]) for i, k in enumerate(("registers", "stack", "shared", "local"), 5)}
        short = re.sub(r"^\w*?(?=(?:logp|kl|js|parts|stats|scale)_(?:rows|grad)$)", "", m[2])
        found.append(Kernel(arch, short, types[m[3]], m[4] == "1", **numbers))
    return found


def by_registers(registers: int) -> int:
    """Blocks that a multiprocessor's 65536 registers hold, 2048 threads at most."""
    return min(2048 // THREADS, 65536 // (THREADS * (-(-registers // 8) * 8)))


def table(columns: int, archs: list[str] | None = None) -> str:
    """Resources of all kernels, and the plan of the row kernels for rows of `columns`."""
    title = f"[CUDA C++ kernels, compiled without a GPU; rows of {columns} columns]"
    found = kernels()
    if isinstance(found, str):
        return f"{title}\n{found}"
    lines = []
    for k in found:
        if k.arch not in GPUS or (archs and k.arch.rstrip("a") not in archs):
            continue
        line = [k.arch, k.name, k.dtype, "yes" if k.softcap else "no"]
        line += [str(n) for n in (k.registers, k.stack + k.local, k.shared)]
        blocks = by_registers(k.registers)
        if k.name in MATRICES:
            p = plan(GPUS[k.arch], columns, 4 if k.dtype == "fp32" else 2, MATRICES[k.name])
            blocks = min(blocks, p.blocks)
            line += [str(p.cluster), str(p.bytes), "once" if p.resident else "per sweep"]
        else:
            line += ["-", "0", "once"]
        lines.append([*line, str(blocks)])
    header = ["arch", "kernel", "dtype", "softcap", "registers", "spills", "static smem"]
    header += ["cluster", "dynamic smem", "row read", "blocks/SM"]
    return f"{title}\n{report.table(header, lines)}"


def one_launch(tokens: int, columns: int, itemsize: int, rate: float) -> str:
    """Predicted milliseconds of the ops that give value and gradient in one launch: rows read
    once and written once, at `rate` bytes/s read + written.
    """
    title = f"[predicted: CUDA C++, value and gradient in one launch, {tokens}x{columns}]"
    lines = []
    for op in IDEAL:
        if "_fused" in op:
            n = sum(ideal_bytes(op, tokens, columns, itemsize, perfect_cache=True))
            lines.append([op, f"{n / 1e9:.2f}", f"{1e3 * n / rate:.2f}"])
    return f"{title}\n{report.table(['op', 'GB', 'ms'], lines)}"
