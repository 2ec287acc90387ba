"""`python -m benchmarks COMMAND`: run (the default), linear, growth, offline, instructions,
compare, readme, page, harvest.

Exit status 0, unless one of this library's own kernels was refused by the correctness gate (run,
linear) or something got worse (compare, instructions).
"""

from __future__ import annotations

import argparse
import math
import sys
import time

import torch

from benchmarks import ceilings, compare, harness, machine, report, verdict
from benchmarks.cases import DTYPES, LOGITS, PHASES, Shape, select
from benchmarks.linear_cases import LINEAR
from deepalign_kernels import backends

CPU_SHAPES = "2048x32000,1024x128256"
GPU_SHAPES = "8192x128256,2048x32000,8192x32768"
LINEAR_SHAPES = {"cpu": "2048x2048x32000", "cuda": "8192x4096x128256,2048x4096x128256"}
ONCE = frozenset({"token_kl/ref_policy", "token_kl/js", "token_stats"})  # CPU: first shape alone
QUICK_SHAPES = {False: "48x4096", True: "48x64x4096"}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    for name, told in (("run", "logits ops"), ("linear", "linear ops")):
        p = commands.add_parser(name, help=f"time the {told} beside eager, torch.compile and peers")
        _run_options(p)
    p = commands.add_parser("growth", help="time and memory against T and V")
    p.add_argument("--out", metavar="DIR", help="figures and growth.json go here")
    p.add_argument("--quick", action="store_true", help="few small points")
    p.add_argument("--providers", default="ours,eager")
    p.add_argument("--ops", default="token_kl/policy_ref,token_logp,constrained_loss/ref_logits")
    p.add_argument("--device", choices=("cpu", "cuda"), default=machine.default_device())
    p = commands.add_parser("offline", help="compile report and predicted times, without a GPU")
    p.add_argument("--measured", metavar="FILE", help="result file of a GPU run, to stand beside")
    p.add_argument("--arch", action="append", default=[], help="sm_90, gfx942, ...; default all")
    p = commands.add_parser("instructions", help="callgrind counts of the native CPU kernels")
    p.add_argument("--record", action="store_true", help="keep them as what later ones must be")
    p = commands.add_parser("compare", help="flag regressions from A to B")
    p.add_argument("a", metavar="A.json")
    p.add_argument("b", metavar="B.json")
    p.add_argument("--threshold", type=float, default=compare.THRESHOLD, help="default 0.1 = 10 %%")
    p = commands.add_parser("readme", help="markdown tables from a result file")
    p.add_argument("file", metavar="FILE.json")
    p = commands.add_parser("page", help="write the benchmark pages of docs/ and README's figures")
    p.add_argument("--check", action="store_true", help="exit with 1 if one is stale")
    p = commands.add_parser("harvest", help="what follows from the files of gpu.sh")
    p.add_argument("dirs", nargs="+", metavar="DIR")
    return top


def _run_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--ops", help="comma-separated; token_kl means all its directions")
    p.add_argument("--dtypes", default="fp32,bf16", help="default %(default)s (GPU: bf16)")
    p.add_argument("--shapes", help="comma-separated TxV (linear: TxHxV)")
    p.add_argument(
        "--providers",
        help="names, or ours, baselines, peers, all; default all that"
        " import, without the specification (reference) where there is a faster backend",
    )
    p.add_argument("--phase", choices=PHASES, help="default both")
    p.add_argument("--trained", type=float, default=1.0, help="fraction of targets not ignored")
    p.add_argument("--seconds", type=float, help="clock time per provider and cell")
    p.add_argument("--rounds", type=int, default=3, help="laps of even the slowest, default 3")
    p.add_argument("--limit", type=float, default=math.inf, help="begin no cell after this, s")
    p.add_argument("--threads", type=int, help="torch threads")
    p.add_argument("--device", choices=("cpu", "cuda"), default=machine.default_device())
    p.add_argument("--quick", action="store_true", help="one tiny shape, this library and eager")
    p.add_argument("--json", metavar="FILE", help="write all results there")


def plan_of(args: argparse.Namespace) -> harness.Plan:
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
    return harness.Plan(
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
        most_bytes=(16 if gpu else 3) * harness.GIB,
    )


def default_providers(args: argparse.Namespace) -> str | None:
    """All that can run, but the slow specification only where this library has nothing else."""
    if args.quick:
        return "ours,eager"
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
        say(warning)
    rulers = ceilings.Ceilings()

    def keep(rows: list[harness.Row], absent: list[dict]) -> None:
        """Also after every cell: a run that is cut off leaves what it has."""
        if args.json:
            header, lines = verdict.judge(rows, rulers, args.device, gpu)
            judged = {"header": header, "lines": lines}
            asked = {k: v for k, v in vars(args).items() if k != "json"}
            parts = {"absent": absent, "asked": asked, "verdict": judged}
            report.save(args.json, where, rulers, rows, **parts)

    rows, absent = harness.run(plan, rulers, say, keep)
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
    from benchmarks import cuda_cpp, instructions, offline

    compiled, reports = offline.compile_report("--quick", "--arch", "sm_90")
    parts = (compiled, cuda_cpp.table(offline.SHAPE.V, ["sm_90"]), offline.counted())
    print("\n\n".join([*parts, offline.predictions(None, reports)]), "\n")
    instructions.main(False, say)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    commands = tuple("run linear growth offline instructions compare readme page harvest".split())
    if not argv or (argv[0] not in commands and argv[0] not in ("-h", "--help")):
        argv = ["run", *argv]
    args = parser().parse_args(argv)
    try:
        return _dispatch(args)
    except ValueError as error:
        say(str(error))
        return 2


def _dispatch(args: argparse.Namespace) -> int:
    if args.command in ("run", "linear"):
        return run(args)
    if args.command == "compare":
        return compare.main(args.a, args.b, args.threshold)
    if args.command == "readme":
        print(report.readme(args.file))
        return 0
    if args.command == "growth":
        from benchmarks import growth

        return growth.main(args.ops, args.providers, args.device, args.out, args.quick, say)
    if args.command == "harvest":
        from benchmarks import harvest

        return harvest.main(args.dirs)
    if args.command == "page":
        from benchmarks import page

        return page.main(args.check)
    if args.command == "instructions":
        from benchmarks import instructions

        return instructions.main(args.record, say)
    from benchmarks import offline

    return offline.main(args.measured, args.arch)


if __name__ == "__main__":
    sys.exit(main())
