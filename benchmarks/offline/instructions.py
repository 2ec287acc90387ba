"""Instructions that the native CPU kernels execute per column: a regression shows without a clock.

Callgrind counts one row through one kernel, in the objects that `make build` left. Valgrind knows
no AVX-512, so these are the AVX2 kernels. Counts depend on the compiler; they are held against a
record of the same compiler only.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable

from benchmarks.harness import report

ROOT = pathlib.Path(__file__).resolve().parents[2]
OBJECTS = ROOT / "build/native/cpu"
RECORD = ROOT / "benchmarks/results/instructions.json"
COLUMNS = 32_000
TYPES = ("f32", "bf16")
THRESHOLD = 0.02  # more of a change than this is one


def compiler() -> list[str]:
    return os.environ.get("CXX", "c++").split()


def missing() -> str | None:
    """What is needed and not there."""
    for tool in ("valgrind", compiler()[0]):
        if not shutil.which(tool):
            return f"{tool} is not installed"
    return None if list(OBJECTS.glob("rows.*.avx2.o")) else f"run `make build`: no {OBJECTS}"


def version() -> str:
    """One line that names the compiler."""
    done = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def build(folder: pathlib.Path) -> pathlib.Path:
    """The driver, linked with the kernels."""
    driver = folder / "driver"
    source = pathlib.Path(__file__).with_suffix(".cpp")
    objects = [OBJECTS / "cpu.isa.o"]
    for kernels in ("rows", "panels"):
        objects += sorted(OBJECTS.glob(f"{kernels}.*.o"))
    command = [*compiler(), "-O2", "-std=c++20", f"-I{ROOT / 'csrc'}", str(source)]
    subprocess.run([*command, *map(str, objects), "-o", str(driver)], check=True)
    return driver


def count(driver: pathlib.Path, op: str, dtype: str) -> float:
    """Instructions per column of one row."""
    tool = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    call = [*tool, "--toggle-collect=measured", str(driver), op, dtype, str(COLUMNS)]
    env = {**os.environ, "DEEPALIGN_CPU_ISA": "avx2"}
    done = subprocess.run(call, env=env, capture_output=True, text=True, check=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if not found:
        raise RuntimeError(f"callgrind said no count: {done.stderr[-500:]}")
    return int(found[1]) / COLUMNS


def measure(say: Callable[[str], None]) -> dict[str, float]:
    """{"op dtype": instructions per column}"""
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        driver = build(pathlib.Path(folder))
        listed = subprocess.run([driver, "list"], capture_output=True, text=True, check=True)
        for op in listed.stdout.split():
            found = {dtype: round(count(driver, op, dtype), 3) for dtype in TYPES}
            counts |= {f"{op} {dtype}": n for dtype, n in found.items()}
            say(f"{op}: {found}")
    return counts


def changes(before: dict[str, float], after: dict[str, float]) -> list[list[str]]:
    """[case, before, after, ratio] of what changed by more than THRESHOLD or came or went."""
    lines = []
    for name in sorted({*before, *after}):
        a, b = before.get(name), after.get(name)
        if a and b and abs(b / a - 1) <= THRESHOLD:
            continue
        ratio = f"{b / a:.3f}x" if a and b else "-"
        lines.append([name, f"{a:.2f}" if a else "-", f"{b:.2f}" if b else "-", ratio])
    return lines


def main(record: bool, say: Callable[[str], None]) -> int:
    """Count, print, and compare with RECORD, or write it; exit status 1 if a count rose."""
    if why := missing():
        say(f"instructions: {why}")
        return 2
    counts, made_by = measure(say), version()
    header = ["instructions per column, AVX2", *TYPES]
    lines = []
    for op in dict.fromkeys(name.split()[0] for name in counts):
        lines.append([op, *(f"{counts[op + ' ' + dtype]:.2f}" for dtype in TYPES)])
    print(report.table(header, lines))
    if record:
        RECORD.write_text(json.dumps({"compiler": made_by, "counts": counts}, indent=1) + "\n")
        return 0
    old = json.loads(RECORD.read_text())
    if old["compiler"] != made_by:
        print(f"not compared: the record is of {old['compiler']}, this is {made_by}")
        return 0
    found = changes(old["counts"], counts)
    print(report.table(["changed", "before", "now", "ratio"], found) if found else "as recorded")
    return 1 if any(counts.get(line[0], 0) > old["counts"].get(line[0], 0) for line in found) else 0


def command(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks instructions", description=__doc__)
    p.add_argument("--record", action="store_true", help="keep them as what later ones must be")
    return main(p.parse_args(argv).record, report.say)
