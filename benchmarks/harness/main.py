"""Time the ops beside plain torch, torch.compile and peers, after the correctness gate.

Exit status 1: one of this library's own kernels was refused by the gate.
"""

from __future__ import annotations

import argparse
import math
import time

import torch

from benchmarks.cases.linear import LINEAR
from benchmarks.cases.logits import DTYPES, LOGITS, PHASES, Shape, select
from benchmarks.harness import ceilings, cells, machine, report, verdict
from deepalign_kernels import backends

CPU_SHAPES = "2048x32000,1024x128256"
GPU_SHAPES = "8192x128256,2048x32000,8192x32768"
LINEAR_SHAPES = {"cpu": "2048x2048x32000", "cuda": "8192x4096x128256,2048x4096x128256"}
ONCE = frozenset({"token_kl/ref_policy", "token_kl/js", "token_stats"})  # CPU: first shape alone
QUICK_SHAPES = {False: "48x4096", True: "48x64x4096"}


def parser(kind: str) -> argparse.ArgumentParser:
    """The options of `python -m benchmarks KIND`, "run" or "linear"."""
    p = argparse.ArgumentParser(prog=f"python -m benchmarks {kind}", description=__doc__)
    p.set_defaults(command=kind)
    p.add_argument("--ops", help="comma-separated; token_kl means all its directions")
    p.add_argument("--dtypes", default="fp32,bf16", help="default %(default)s (GPU: bf16)")
    p.add_argument("--shapes", help="comma-separated TxV (linear: TxHxV)")
    p.add_argument(
        "--providers",
        help="names, or ours, baselines, peers, all; default all that"
        " import, without the specification (eager) where there is a faster backend",
    )
    p.add_argument("--phase", choices=PHASES, help="default both")
    p.add_argument("--trained", type=float, default=1.0, help="fraction of targets not ignored")
    p.add_argument("--seconds", type=float, help="clock time per provider and cell")
    p.add_argument("--rounds", type=int, default=3, help="laps of even the slowest, default 3")
    p.add_argument("--limit", type=float, default=math.inf, help="begin no cell after this, s")
    p.add_argument("--threads", type=int, help="torch threads")
    p.add_argument("--device", choices=("cpu", "cuda"), default=machine.default_device())
    p.add_argument("--quick", action="store_true", help="one tiny shape, ours and plain torch")
    p.add_argument("--json", metavar="FILE", help="write all results there")
    return p


def plan_of(args: argparse.Namespace) -> cells.RunPlan:
    linear = args.command == "linear"
    table = select(LINEAR if linear else LOGITS, args.ops)
    if args.quick:
        shapes = args.shapes or QUICK_SHAPES[linear]
    elif linear:
        shapes = args.shapes or LINEAR_SHAPES[args.device]
    else:
        shapes = args.shapes or (CPU_SHAPES if args.device == "cpu" else GPU_SHAPES)
    dtypes = args.dtypes.split(",")
    if args.device == "cuda" and args.dtypes == "fp32,bf16":
        dtypes = ["bf16"]
    if unknown := [name for name in dtypes if name not in DTYPES]:
        raise ValueError(f"dtypes: expected some of {', '.join(DTYPES)}, got {unknown[0]!r}")
    sizes = [Shape.parse(text) for text in shapes.split(",")]
    if wrong := [s for s in sizes if bool(s.H) != linear]:
        raise ValueError(f"shapes: expected {'TxHxV' if linear else 'TxV'}, got {wrong[0]}")
    gpu = args.device == "cuda"
    return cells.RunPlan(
        table=table,
        shapes=sizes,
        dtypes=dtypes,
        phases=(args.phase,) if args.phase else PHASES,
        wanted=args.providers or default_providers(args),
        device=args.device,
        seconds=args.seconds or (0.02 if args.quick else 0.3 if gpu else 0.6),
        rounds=args.rounds,
        limit=args.limit,
        once=ONCE if not (gpu or linear or args.ops or args.shapes) else frozenset(),
        trained=args.trained,
        most_bytes=(16 if gpu else 3) * cells.GIB,
    )


def default_providers(args: argparse.Namespace) -> str | None:
    """All that can run, but the slow specification only where this library has nothing else."""
    if args.quick:
        return "ours,plain"
    if args.device == "cpu" and backends.native_library("cpu"):
        return None
    return "native,triton,baselines,peers"


def run(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    plan, started = plan_of(args), time.perf_counter()
    where, warning = machine.describe(args.device), machine.load_warning()
    gpu = where.get("gpu", {}).get("name", "")
    if warning:
        report.say(warning)
    rulers = ceilings.Ceilings()

    def keep(rows: list[cells.Row], absent: list[dict]) -> None:
        """Also after every cell: a run that is cut off leaves what it has."""
        if args.json:
            header, lines = verdict.judge(rows, rulers, args.device, gpu)
            judged = {"header": header, "lines": lines}
            asked = {k: v for k, v in vars(args).items() if k != "json"}
            parts = {"absent": absent, "asked": asked, "verdict": judged}
            report.save(args.json, where, rulers, rows, **parts)

    rows, absent = cells.run(plan, rulers, report.say, keep)
    print(report.machine_text(where))
    print(report.ceilings_text(rulers))
    print(report.tables(rows, rulers), "\n")
    if absent:
        print(report.absent_text(absent), "\n")
    if args.command == "run" and args.device == "cpu" and not args.quick and not args.ops:
        print_offline()
    print(report.table(*verdict.judge(rows, rulers, args.device, gpu)), "\n")
    if args.quick:
        print("note: --quick tries the harness; the targets are about full-size shapes")
    over = {r.provider for r in rows if (part := report.achieved(r, rulers)) and part[1] > 1.02}
    if over:
        print(f"note: {', '.join(sorted(over))} beat a ceiling: it was measured in a worse moment")
    if warning:
        print(f"note: {warning}; times and verdicts are as good as that")
    print(f"{len(rows)} measurements in {time.perf_counter() - started:.0f} s")
    return 1 if any(r.failed and r.group == "ours" for r in rows) else 0


def print_offline() -> None:
    """What needs no clock: the short form of `offline`, and `instructions`."""
    from benchmarks.offline import compiled, cuda_cpp, instructions

    text, reports = compiled.compile_report("--quick", "--arch", "sm_90")
    parts = (text, cuda_cpp.table(compiled.SHAPE.V, ["sm_90"]), compiled.counted())
    print("\n\n".join([*parts, compiled.predictions(None, reports)]), "\n")
    instructions.main(False, report.say)


def main(kind: str, argv: list[str]) -> int:
    try:
        return run(parser(kind).parse_args(argv))
    except ValueError as error:
        report.say(str(error))
        return 2
