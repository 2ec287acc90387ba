"""Instructions that the CUDA C++ kernels execute per column, from their machine code.

`python -m benchmarks sass [--record] [FILE]`: FILE is a library or a cubin, default the built
library. One instruction per column costs 0.031 ms on an H100 (132 multiprocessors, 1.98 GHz) for
8192 rows of 128256 columns, if every cycle issues one.

Counted is the path that a thread takes where rows lie on 16 bytes: of all paths through a loop (or
through a kernel without one) the one with the most 16-byte accesses, and of those the shortest.
What a row costs once, for barriers and sums over the block, is left out.
"""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
from typing import NamedTuple

from benchmarks.harness import report
from benchmarks.offline import cuda_cpp
from benchmarks.offline.instructions import RECORD as CPU_RECORD
from deepalign_kernels.triton_kernels._sass import Instruction, cuobjdump, instructions

RECORD = CPU_RECORD.with_name("cuda-instructions.json")
TYPES = {"f": "fp32", "NS0_4bf16E": "bf16", "NS0_3f16E": "fp16"}
# What the summing loops of a kernel are, in order, with the matrices that each reads.
SUMS = {
    "logp_rows": (("exp", 1), ("exp_ref", 1)),
    "kl_rows": (("sum", 2),),
    "js_rows": (("exp", 1), ("exp_ref", 1), ("js", 2)),
    "stats_rows": (("sum", 2), ("js", 2)),
    "parts_rows": (("js", 2),),
}
ONE, TWO = ("load", "max"), ("load", "load_ref", "max", "max_ref")
# op -> the kernel, and the parts of it that run
OPS = {
    "token_logp/fwd": ("logp_rows", (*ONE, "exp")),
    "token_logp/bwd": ("logp_grad", ("whole",)),
    "token_logp/fused": ("logp_rows", (*ONE, "exp", "write")),
    "constrained_loss/fused": ("logp_rows", (*TWO, "exp", "exp_ref", "write")),
    "token_kl/policy_ref/fwd": ("kl_rows", (*TWO, "sum")),
    "token_kl/policy_ref/bwd": ("kl_grad0", ("whole",)),
    "token_kl/policy_ref/fused": ("kl_rows", (*TWO, "sum", "write")),
    "token_kl/ref_policy/bwd": ("kl_grad1", ("whole",)),
    "token_kl/js/fwd": ("js_rows", (*TWO, "exp", "exp_ref", "js")),
    "token_kl/js/bwd": ("kl_grad2", ("whole",)),
    "token_kl/js/fused": ("js_rows", (*TWO, "exp", "exp_ref", "js", "write")),
    "token_js_parts/fwd": ("parts_rows", ("load", "load_ref", "js")),
    "token_stats/fwd": ("stats_rows", (*TWO, "sum", "js")),
}


class Path(NamedTuple):
    """Instructions on it, by name, and how many chunks of 16 bytes it moves."""

    names: list[str]
    loads: int
    stores: int
    copies: int


def _wide(name: str) -> bool:
    return name.endswith(".128") or ".128." in name


def _hot_path(code: list[Instruction], first: int, last: int | None) -> Path:
    """The path from instruction `first` to `last` (None: to any EXIT), by indices into `code`."""
    at = {ins.address: i for i, ins in enumerate(code)}
    end = len(code) if last is None else last + 1
    best: dict[int, tuple[int, int]] = {}  # wide accesses, -instructions, from here to the end
    follow: dict[int, int] = {}
    for i in range(end - 1, first - 1, -1):
        ins, own = code[i], int(_wide(code[i].name))
        ends = i == last or (last is None and ins.name == "EXIT" and not ins.conditional)
        if ends:
            best[i] = (own, -1)
            continue
        stops = ins.name in ("EXIT", "RET") or (ins.name.startswith("BRA") and not ins.conditional)
        ways = [] if stops else [i + 1]
        if ins.target >= 0 and i < at.get(ins.target, -1) < end:
            ways.append(at[ins.target])
        ways = [w for w in ways if w in best]
        if ways:
            follow[i] = max(ways, key=best.__getitem__)
            wide, length = best[follow[i]]
            best[i] = (wide + own, length - 1)
    names, i = [], first
    while i in best:
        names.append(code[i].name)
        i = follow.get(i, -1)
    wide = [n for n in names if _wide(n)]
    kinds = [sum(n.startswith(k) for n in wide) for k in (("LDS.", "LDG."), "STG.", "LDGSTS.")]
    return Path(names, *kinds)


def _loops(code: list[Instruction]) -> list[Path]:
    """Hot paths of the innermost loops, in order."""
    at = {ins.address: i for i, ins in enumerate(code)}
    back = [(at[c.target], i) for i, c in enumerate(code) if 0 <= c.target < c.address]
    inner = [
        (a, b) for a, b in back if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in back)
    ]
    return [_hot_path(code, a, b) for a, b in sorted(inner)]


def _parts(kernel: str, code: list[Instruction], vec: int) -> dict[str, float]:
    """{part: instructions per column}"""
    if kernel.startswith(("logp_grad", "kl_grad")):
        path = _hot_path(code, 0, None)
        return {"whole": len(path.names) / (path.stores * vec)}
    sums = [p for p in _loops(code) if any("MUFU" in n for n in p.names) and not p.stores]
    if len(sums) != len(SUMS[kernel]):
        raise ValueError(f"{kernel}: {len(sums)} summing loops, expected {SUMS[kernel]}")
    parts: dict[str, float] = {}
    for (part, matrices), p in zip(SUMS[kernel], sums, strict=True):
        parts[part] = len(p.names) * matrices / (p.loads * vec)
    loads, tops, writes = [], [], []
    for p in _loops(code):
        largest = any("MNMX" in n for n in p.names)
        if p.copies:
            loads.append(len(p.names) / (p.copies * vec))
        elif p.stores and any("MUFU" in n for n in p.names):
            writes.append(len(p.names) / (p.stores * vec))
        elif p.loads and largest and p not in sums:
            tops.append(len(p.names) / (p.loads * vec))
    parts |= {"load": loads[0], "load_ref": loads[1], "write": max(writes, default=0.0)}
    # The compiler may have moved the loops, so by size.
    for part, n in zip(("max_ref", "max"), sorted(tops), strict=False):
        parts[part] = n
    return parts


def counts(file: pathlib.Path, arch: str = "sm_90a", dtype: str = "bf16") -> dict[str, float] | str:
    """{op: instructions per column} without a softcap, or why they cannot be counted."""
    tool = cuobjdump()
    if not file.exists() or tool is None:
        return f"no {file.name}" if tool else "there is no cuobjdump"
    command = [tool, "-sass", *(["-arch", arch] if file.suffix == ".so" else []), str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[str, float]] = {}
    name = r"^\S*?\d+((?:logp|kl|js|stats|parts)_(?:rows|grad))I"
    name += r"(f|NS0_4bf16E|NS0_3f16E)Lb0E(?:Li(\d)E)?E"
    for function in text.split("Function : ")[1:]:
        m = re.match(name, function)
        if m and TYPES[m[2]] == dtype:
            kernel = m[1] + (m[3] or "")
            found[kernel] = _parts(kernel, instructions(function), 4 if dtype == "fp32" else 8)
    return {
        op: round(sum(found[kernel][part] for part in parts), 2)
        for op, (kernel, parts) in OPS.items()
        if kernel in found
    }


def compiler() -> str:
    """Version of nvcc, or "" without one."""
    if not (nvcc := shutil.which("nvcc")):
        return ""
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V([\d.]+)", told)
    return f"nvcc {found[1]}" if found else ""


def command(arguments: list[str]) -> int:
    record = "--record" in arguments
    files = [pathlib.Path(a) for a in arguments if a != "--record"] or [cuda_cpp.LIBRARY]
    found: dict[str, float] = {}
    for file in files:
        one = counts(file)
        if isinstance(one, str):
            print(one)
            return 2
        found |= one
    old = json.loads(RECORD.read_text()) if RECORD.exists() else {"counts": {}, "before": {}}
    header = ["instructions per column, sm_90a, bf16", "before", "recorded", "now"]
    kept = [old["before"], old["counts"], found]
    rows = [[op, *(f"{k[op]:.1f}" if op in k else "-" for k in kept)] for op in OPS if op in found]
    print(report.table(header, rows))
    if record:
        new = {**old, "compiler": compiler(), "counts": found}
        RECORD.write_text(json.dumps(new, indent=1) + "\n")
    return 0
