"""Machine code of compiled CUDA kernels, and how many instructions a Triton kernel issues per
column.

A kernel that is not bound by memory is bound by these: one multiprocessor of a Hopper GPU issues 4
warp instructions per cycle, and a transcendental (MUFU) holds its unit for 8 cycles of a warp.
"""

from __future__ import annotations

import importlib.util
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple


class Instruction(NamedTuple):
    address: int
    name: str  # such as "MUFU.EX2"
    conditional: bool
    target: int  # of a branch, else -1


def cuobjdump() -> str | None:
    """Path of the toolkit's, else of the one that comes with Triton; None without either."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    folder = pathlib.Path(spec.origin).parent if spec and spec.origin else None
    path = folder / "backends" / "nvidia" / "bin" / "cuobjdump" if folder else None
    return str(path) if path and path.exists() else None


def dump(cubin: bytes, what: str) -> str:
    """What `cuobjdump WHAT` prints for a cubin in memory.

    Raises:
        RuntimeError: there is no cuobjdump.
    """
    if (tool := cuobjdump()) is None:
        raise RuntimeError("cuobjdump: expected the CUDA toolkit's or Triton's, found neither")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(text: str) -> list[Instruction]:
    """Those of what `cuobjdump -sass` printed.

    Raises:
        RuntimeError: there are none.
    """
    found = []
    line = r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*([^;]*);"
    for m in re.finditer(line, text, re.MULTILINE):
        to = re.search(r"0x([0-9a-f]+)\s*$", m[4]) if m[3].startswith("BRA") else None
        conditional = bool(m[2]) or bool(re.match(r"!?U?P\d", m[4]))
        found.append(Instruction(int(m[1], 16), m[3], conditional, int(to[1], 16) if to else -1))
    if not found:
        raise RuntimeError(f"cuobjdump: expected machine code, got {text[:300]!r}")
    return found


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of all loops: from the target of each backward branch to the branch."""
    back = [branch for branch in code if 0 <= branch.target < branch.address]
    return [[i for i in code if b.target <= i.address <= b.address] for b in back]


def sweeps(code: list[Instruction], columns: int) -> list[list[Instruction]]:
    """The loops over a row: those with at least an instruction per column. A kernel that has none
    is all one sweep, up to its end (what follows the last EXIT never runs)."""
    found = [body for body in loops(code) if len(body) >= columns]
    if found:
        return found
    last = max((n for n, i in enumerate(code) if i.name == "EXIT"), default=len(code) - 1)
    return [code[: last + 1]]


def per_column(cubin: bytes, constexprs: Mapping[str, Any]) -> float:
    """Instructions per column, summed over the sweeps of a row."""
    code = instructions(dump(cubin, "-sass"))
    columns = constexprs["VEC"] * constexprs["REPEATS"]  # of one thread and tile
    return round(sum(map(len, sweeps(code, columns))) / columns, 1)
