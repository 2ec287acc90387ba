"""Instructions that a compiled CUDA kernel issues per column, read from its machine code.

A kernel that is not bound by memory is bound by these: one multiprocessor of a Hopper GPU issues 4
warp instructions per cycle, and a transcendental (MUFU) holds its unit for 8 cycles of a warp.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import triton


class Instruction(NamedTuple):
    address: int
    name: str  # such as "MUFU.EX2"
    operands: str


def disassemble(cubin: bytes) -> list[Instruction]:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*?);"
    found = re.findall(line, text, re.MULTILINE)
    if not found:
        raise RuntimeError(f"cuobjdump: expected machine code, got {text[:300]!r}")
    return [Instruction(int(at, 16), name, rest) for at, name, rest in found]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of all loops: from the target of each backward branch to the branch."""
    bodies = []
    for branch in code:
        goal = re.search(r"0x([0-9a-f]+)", branch.operands)
        if branch.name.startswith("BRA") and goal and int(goal[1], 16) < branch.address:
            start = int(goal[1], 16)
            bodies.append([i for i in code if start <= i.address <= branch.address])
    return bodies


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
    columns = constexprs["VEC"] * constexprs["REPEATS"]  # of one thread and tile
    return round(sum(map(len, sweeps(disassemble(cubin), columns))) / columns, 1)
