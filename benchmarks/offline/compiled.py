"""What is known of a GPU without one: compile report, bytes counted in the interpreter,
predictions.

Predictions at H200_COPY: `floor` counts what no cache can save, `asked` counts every byte the
Triton kernels ask for; the CUDA C++ kernels keep a row on the chip and ask for the floor. `issue`
is the time in which a GPU can issue the Triton kernels' instructions, as their machine code has
them: where it is the longest, arithmetic binds. `measured` beside them, once a GPU run exists, says
how good that model is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from benchmarks.cases.logits import DTYPES, LOGITS, Shape, traffic, work_of
from benchmarks.harness import report
from benchmarks.harness.cells import Row
from benchmarks.harness.machine import ROOT
from benchmarks.offline import cuda_cpp, linear_model
from benchmarks.offline.cards import CARDS
from benchmarks.studies import interpreted

H200_COPY = CARDS["H200"].copy
SHAPE, DTYPE = Shape(8192, 128256), "bf16"
ISSUE = (
    132 * 4 * 32 * 1.98e9
)  # thread instructions/s of a Hopper GPU: 4 warps a cycle and SM, boost
# Key of `traffic.IDEAL` -> (kernel, what its modes begin and end with); {d}: the direction.
COUNTED = {
    "token_logp_fwd": ("token_logp_fwd", "", ""),
    "token_logp_bwd": ("token_logp_bwd", "", ""),
    "token_kl_fwd": ("token_kl_fwd", "", ""),
    "token_kl_fwd_js": ("token_js_fwd", "", ""),
    "token_kl_bwd": ("token_kl_bwd", "DIRECTION={d},", ""),
    "constrained_loss_fwd": ("constrained_loss", "", "no ref_ptr,no scale_ptr,no out_ptr"),
    "constrained_loss_fused": ("constrained_loss", "", "no ref_ptr,no norm_ptr"),
    "constrained_loss_fwd_ref_logits": (
        "constrained_loss",
        "",
        "no given_ptr,no scale_ptr,no out_ptr",
    ),
    "constrained_loss_fused_ref_logits": ("constrained_loss", "", "no given_ptr,no norm_ptr"),
    "token_stats_fwd_js": ("token_stats", "WITH_JS=True", ""),
    "token_entropy_fwd": ("token_entropy_fwd", "", ""),
    "token_entropy_bwd": ("token_entropy_bwd", "", ""),
}
DIRECTIONS = ("policy_ref", "ref_policy", "js")
COMPILER = "deepalign_kernels.triton_kernels._offline"


def instructions(reports: list[dict], case: str, kernels: tuple[str, ...]) -> float | None:
    """Instructions per column of a case's kernels; None where the reports do not hold them all."""
    key = ("sm_90", DTYPE, DTYPE, "aligned", "plain")
    direction = case.partition("/")[2]
    d = DIRECTIONS.index(direction) if direction in DIRECTIONS else 0
    total = 0.0
    for name in kernels:
        kernel, first, last = COUNTED[name]
        found = [
            r["instructions"]
            for r in reports
            if (r["arch"], r["dtype"], r["out"], r["vocab"], r["scores"]) == key
            and r["kernel"] == kernel
            and r["modes"].startswith(first.format(d=d))
            and r["modes"].endswith(last)
        ]
        if not found:
            return None
        total += found[0]
    return total


def predictions(measured: list[Row] | None, reports: list[dict] | None = None) -> str:
    """Predicted milliseconds per op on an H200, and the best measured ones where a run is given.

    reports: what `_offline --json` wrote, for the instructions.
    """
    lines, itemsize = [], DTYPES[DTYPE].itemsize
    for case in LOGITS.values():
        for phase in case.phases:
            floor = work_of(case, SHAPE, itemsize, phase).bytes
            asked = sum(traffic(case, SHAPE, itemsize, phase, cached=False))
            line = [case.name, phase, f"{floor / 1e9:.2f}", f"{asked / 1e9:.2f}"]
            line += [f"{1e3 * n / H200_COPY:.2f}" for n in (floor, asked)]
            count = instructions(reports or [], case.name, case.kernels[phase])
            line += ["-", "-"]
            if count is not None:
                line[-2:] = f"{count:.1f}", f"{1e3 * count * SHAPE.T * SHAPE.V / ISSUE:.2f}"
            if measured is not None:
                took = _measured(measured, case.name, phase)
                share = f"{took * H200_COPY / 1e3 / floor:.2f}x" if took else "-"
                line += [f"{took:.2f}" if took else "-", share]
            lines.append(line)
    header = ["op", "phase", "floor GB", "asked GB", "floor ms", "asked ms"]
    header += ["instr./column", "issue ms"]
    header += ["measured ms", "of floor"] if measured is not None else []
    title = (
        f"[predicted: {SHAPE} {DTYPE} on an H200 at {H200_COPY / 1e12:.1f} TB/s read + written; "
        "CUDA C++: the floor, Triton: up to what it asks for]"
    )
    return f"{title}\n{report.table(header, lines)}"


def counted() -> str:
    """Bytes the kernels loaded and stored in the interpreter, beside the declared ones."""
    found = interpreted.count()
    shape = Shape(interpreted.T, interpreted.V)
    title = f"[bytes moved in Triton's interpreter, {shape} fp32, in passes over one tensor]"
    if isinstance(found, str):
        return f"{title}\nnot counted: {found}"
    matrix, lines = shape.T * shape.V * 4, []
    for part in found:
        case = LOGITS[part["op"]]
        read, written = traffic(case, shape, 4, part["phase"], cached=False)
        shown = [part["read"] / matrix, read / matrix, part["written"] / matrix, written / matrix]
        # A pass more than declared is a finding; what is per row or per tile of a row is not.
        same = abs(shown[0] - shown[1]) < 0.05 and abs(shown[2] - shown[3]) < 0.05
        state = "as declared" if same else "NOT AS DECLARED"
        lines.append([part["op"], part["phase"], *(f"{x:.3f}" for x in shown), state])
    header = ["op", "phase", "read", "declared", "written", "declared", ""]
    return f"{title}\n{report.table(header, lines)}"


def _measured(rows: list[Row], op: str, phase: str) -> float | None:
    here = [
        r.ms
        for r in rows
        if (r.op, r.phase, r.shape, r.dtype) == (op, phase, SHAPE, DTYPE)
        and r.group == "ours"
        and r.ms
    ]
    return min(here, default=None)


def compile_report(*args: str) -> tuple[str, list[dict]]:
    """(text, rows): registers, spills, shared memory, vector width, occupancy and instructions of
    every kernel, compiled without a GPU.
    """
    title = "[Triton kernels, compiled without a GPU]"
    if importlib.util.find_spec("triton") is None:
        return f"{title}\ntriton is not installed", []
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "reports.json"
        command = [sys.executable, "-m", COMPILER, *args, "--json", str(file)]
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800
        )
        reports = json.loads(file.read_text()) if file.exists() else []
    ended = f"\nended with status {done.returncode}: {done.stderr.strip()[-300:]}"
    return f"{title}\n{done.stdout.strip()}{ended if done.returncode else ''}", reports


def main(measured: str | None, archs: list[str]) -> int:
    """Print all parts; `archs` as _offline knows them, none: all that it knows."""
    text, reports = compile_report(*(part for arch in archs for part in ("--arch", arch)))
    print(text, "\n")
    print(cuda_cpp.table(SHAPE.V, archs or None), "\n")
    print(counted(), "\n")
    itemsize = DTYPES[DTYPE].itemsize
    print(cuda_cpp.one_launch(SHAPE.T, SHAPE.V, itemsize, H200_COPY), "\n")
    print(predictions(report.load(measured)[2] if measured else None, reports), "\n")
    print(linear_model.table())
    return 0


def command(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks offline", description=__doc__)
    p.add_argument("--measured", metavar="FILE", help="result file of a GPU run, to stand beside")
    p.add_argument("--arch", action="append", default=[], help="sm_90, gfx942, ...; default all")
    args = p.parse_args(argv)
    return main(args.measured, args.arch)
