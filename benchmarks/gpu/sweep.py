"""What to choose on the GPU at hand: `python -m benchmarks sweep plans|chunks --json FILE`.

plans   every internal op on CUDA C++ and on Triton, there with the plan of the launch table and
        with its neighbours (half and twice the warps, half and twice the bytes a thread loads), in
        one process. The answer: entries for `triton_kernels/_launch.py`, ops for
        `backends.CUDA_CPP_VERIFIED`.
chunks  linear_constrained_loss, forward + backward, in workspaces of several sizes.

The file is written again after every line of the result. Candidates take turns on the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import deepalign_kernels as dak
from benchmarks.cases import logits as cases
from benchmarks.cases.linear import LINEAR
from benchmarks.cases.logits import DTYPES, Shape
from benchmarks.gpu import each_op
from benchmarks.harness import machine, measure, report
from benchmarks.harness.ceilings import Ceilings
from benchmarks.harness.plain import Inputs
from deepalign_kernels import backends

PLANS = "DEEPALIGN_TRITON_PLAN"
MIB = 1 << 20
COMPILERS = 8  # processes that fill Triton's cache before the clock


@contextlib.contextmanager
def planned(kernel: str, plan: Any) -> Iterator[None]:
    """Launch `kernel` with `plan` inside the block; None: with the table's."""
    from deepalign_kernels.triton_kernels import _launch

    if plan is not None:
        os.environ[PLANS] = f"{kernel}={','.join(map(str, plan))}"
    _launch._overrides.cache_clear()
    try:
        yield
    finally:
        os.environ.pop(PLANS, None)
        _launch._overrides.cache_clear()


def candidates(plan: Any) -> list[Any]:
    """The plan of the table first, then its neighbours that a multiprocessor can hold."""
    found = [plan]
    for warps, size in itertools.product((1, 2, 0.5), repeat=2):
        new = plan._replace(warps=int(plan.warps * warps), size=int(plan.size * size))
        if 1 <= new.warps <= 32 and new.size >= 16 and new not in found:
            # 65536 registers serve one program at least: a cap above that cannot be compiled
            fits = new.warps * 32 * new.registers <= 65536
            found.append(new if fits else new._replace(registers=0))
    return found


def kernel_of(call: each_op.Call, device: str) -> str | None:
    """The one Triton kernel that `call` launches; None where there are several, or no Triton."""
    if backends.unavailable("triton", call.op, device):
        return None
    from deepalign_kernels.triton_kernels import _launch

    with _launch.recording(_launch._arch(call.logits.device)) as launches:
        call.on("triton")()
    names = {launch.name for launch in launches}
    return names.pop() if len(names) == 1 else None


def contestants(call: each_op.Call, device: str) -> list[tuple[str, str, Any]]:
    """(backend, kernel, plan) of everybody who can run `call`; plan None: none to choose."""
    found: list[tuple[str, str, Any]] = []
    if backends.unavailable("native", call.op, device) is None:
        found.append(("native", "", None))
    if kernel := kernel_of(call, device):
        from deepalign_kernels.triton_kernels import _launch

        table = _launch.TABLE[_launch._arch(call.logits.device)]
        found += [("triton", kernel, plan) for plan in candidates(table[kernel])]
    elif backends.unavailable("triton", call.op, device) is None:
        found.append(("triton", "", None))
    return found


def plans(args: argparse.Namespace, out: Result) -> None:
    dtype = DTYPES[args.dtype]
    for shape in map(Shape.parse, args.shapes.split(",")):
        for call in each_op.select(each_op.calls(shape, dtype, args.device), args.ops):
            if time.monotonic() > args.stop:
                out.skipped.append(f"{call.name} {shape}")
                continue
            _one_call(call, shape, args, out)


def _one_call(call: each_op.Call, shape: Shape, args: argparse.Namespace, out: Result) -> None:
    lines, turns, gold = [], [], None
    for backend, kernel, plan in contestants(call, args.device):
        line: dict[str, Any] = {"call": call.name, "op": call.op, "kernel": kernel}
        line |= {"backend": backend, "plan": plan and list(plan), "table": False}
        line |= {"T": shape.T, "V": shape.V, "dtype": args.dtype, "ms": None, "failed": None}
        line["bytes"] = call.bytes(shape, DTYPES[args.dtype].itemsize)
        line["table"] = backend == "triton" and not any(x["backend"] == "triton" for x in lines)
        lines.append(line)

        def scope(kernel: str = kernel, plan: Any = plan) -> Any:
            return planned(kernel, plan) if kernel else contextlib.nullcontext()

        try:
            run = call.on(backend)
            with scope():
                made = [x.float() for x in run()]
        except Exception as error:  # a candidate may not compile, and the others must still run
            line["failed"] = f"{type(error).__name__}: {(str(error) or '?').splitlines()[0][:150]}"
            continue
        if call.op != "scale_grad":  # which works in place, so that every run has another input
            gold = gold or made
            line["failed"] = _differs(made, gold)
        del made
        if line["failed"] is None:
            runner = measure.Runner(lambda k, run=run: run(), scope)
            turns.append((line, runner))
    del gold
    if turns and not args.compile_only:
        runners = [runner for _, runner in turns]
        measure.interleave(runners, args.device, seconds=args.seconds, rounds=3)
    for line, runner in turns:
        if runner.laps:
            s = runner.summary()
            line |= {"ms": 1e3 * s.median, "p10_ms": 1e3 * s.p10, "p90_ms": 1e3 * s.p90}
    out.add(lines)


def _differs(made: list[Tensor], gold: list[Tensor]) -> str | None:
    """Why two runs do not agree within their roundings: another order of the same sums may move a
    bf16 gradient by one step. Infinite and equal is equal."""
    for a, b in zip(made, gold, strict=False):
        scale = b.abs().nan_to_num(posinf=0).max().clamp(min=1e-30)
        error = ((a - b).abs() / scale).nan_to_num(0.0).max().item()
        if a.isnan().any() or error > 8e-3:
            return f"differs from the first candidate by {error:.1e} of the largest entry"
    return None


def chunks(args: argparse.Namespace, out: Result) -> None:
    """Rows of scores held at a time follow from the workspace: the engine's own rule decides."""
    budgets = (None, *map(int, args.workspaces.split(",")))
    for shape in map(Shape.parse, args.shapes.split(",")):
        x = cases.make_inputs(shape, DTYPES[args.dtype], args.device)
        for mib in budgets:
            if time.monotonic() > args.stop:
                out.skipped.append(f"{shape} {mib} MiB")
            else:
                out.add([_one_budget(shape, x, mib, args)])


def _one_budget(
    shape: Shape, inputs: Inputs, mib: int | None, args: argparse.Namespace
) -> dict[str, Any]:
    case = LINEAR["linear_constrained_loss"]
    x = cases.for_case(case, inputs)
    kw: dict[str, Any] = {"beta": x["beta"], "ref_logp": x["ref_logp"]}
    kw["max_workspace_bytes"] = None if mib is None else mib * MIB
    line: dict[str, Any] = {"op": case.name, "T": shape.T, "H": shape.H, "V": shape.V}
    line |= {"dtype": args.dtype, "workspace_mib": mib, "ms": None, "failed": None}
    line["flops"] = cases.work_of(case, shape, DTYPES[args.dtype].itemsize, "fwd_bwd").flops

    def step() -> tuple[Tensor, ...]:
        loss = dak.linear_constrained_loss(x["hidden"], x["weight"], x["target"], **kw)
        assert isinstance(loss, Tensor)
        return torch.autograd.grad(loss, [x[name] for name in case.leaves])

    try:
        step()
        laps = measure.laps_of(step, args.device, 6)[1:]
        line["ms"] = 1e3 * measure.summarise(laps).median
    except Exception as error:  # a budget may be too small for a row
        line["failed"] = f"{type(error).__name__}: {str(error)[:150]}"
    return line


class Result:
    """Lines of a result, in a file that holds all of them after every `add`."""

    def __init__(self, file: str | None, device: str) -> None:
        self.file, self.lines, self.skipped = file, [], []
        self.where = machine.describe(device)

    def add(self, lines: list[dict[str, Any]]) -> None:
        self.lines += lines
        for line in lines:
            name = line.get("call", line["op"])
            took = line["failed"] or ("compiled" if line["ms"] is None else f"{line['ms']:.3f} ms")
            what = line.get("plan") or line.get("workspace_mib", "") or ""
            print(f"{name} {line['T']}x{line['V']} {line.get('backend', '')} {what} {took}")
        self.save()

    def save(self) -> None:
        if self.file:
            parts = {"lines": self.lines, "skipped": self.skipped}
            report.save(self.file, self.where, Ceilings(), [], **parts)


def fill_cache(args: argparse.Namespace) -> None:
    """Compile every candidate at T = 1 in processes side by side: T is a run-time argument, so the
    clocked process finds them in Triton's cache on disk."""
    shapes = ",".join(str(Shape(1, s.V)) for s in map(Shape.parse, args.shapes.split(",")))
    shape = Shape.parse(shapes.split(",")[0])
    tiny = each_op.calls(shape, DTYPES[args.dtype], args.device)
    names = [c.name for c in each_op.select(tiny, args.ops) if kernel_of(c, args.device)]
    command = [sys.executable, "-m", "benchmarks", "sweep", "plans", "--compile-only"]
    command += ["--device", args.device, "--dtype", args.dtype, "--shapes", shapes, "--ops"]
    waiting, running = list(names), []
    while waiting or running:
        while waiting and len(running) < min(COMPILERS, os.cpu_count() or 1):
            quiet = subprocess.DEVNULL
            running.append(subprocess.Popen([*command, waiting.pop()], stdout=quiet))
        running.pop(0).wait()


def command(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks sweep", description=__doc__)
    p.add_argument("what", choices=("plans", "chunks"))
    p.add_argument("--device", choices=("cpu", "cuda"), default=machine.default_device())
    p.add_argument("--dtype", choices=DTYPES, default="bf16")
    p.add_argument("--shapes", help="comma-separated TxV (chunks: TxHxV)")
    p.add_argument("--ops", help="plans: comma-separated; default all")
    p.add_argument("--workspaces", default="512,1024,2048,4096,8192", help="chunks: MiB")
    p.add_argument("--seconds", type=float, default=0.1, help="clock time per candidate and call")
    p.add_argument("--limit", type=float, default=1e9, help="begin nothing after this, s")
    p.add_argument("--compile-only", action="store_true", help="plans: run each once, no clock")
    p.add_argument("--json", metavar="FILE")
    args = p.parse_args(argv)
    args.stop = time.monotonic() + args.limit
    args.shapes = args.shapes or {"plans": "8192x128256", "chunks": "8192x4096x128256"}[args.what]
    out = Result(args.json, args.device)
    if args.what == "plans" and not args.compile_only:
        fill_cache(args)
    {"plans": plans, "chunks": chunks}[args.what](args, out)
    out.save()
    return 0
