"""`benchmarks/gpu.sh [--dry-run | --rehearse | --wheels] [--seconds S] [OUT [CALL ...]]`: what
there is to measure on one GPU, as calls of under ten minutes, the most important first.

Without CALL, those run that S seconds (900) are predicted to hold, the start of the machine
included; the others when they are named, or with a larger S.

--dry-run   what each call does, its predicted seconds, what must travel with it, what is missing
--wheels    fetch the peers' wheels into wheels/ (where there is a network; the GPU needs none)
--rehearse  every step at tiny shapes on a CPU: peers that cannot run there are played by plain
            torch, the sanitizers by the script alone, ncu by nothing

OUT gets, written as each part ends so that an interrupted call leaves what it has: call-N.json,
log-N.txt, tests-N.jsonl, logits.json, linear.json, plans.json, chunks.json, ncu-*.csv,
logits-peers.json, linear-peers.json and training.json. `python -m benchmarks harvest OUT` says what
follows from them. Exit status 1 where a step failed.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.gpu import plan as gpu_plan
from benchmarks.gpu.plan import CALLS, Call, Step
from benchmarks.harness import machine, report
from benchmarks.harness.ceilings import Ceilings
from benchmarks.harness.providers import REHEARSAL

ROOT = machine.ROOT
WHEELS = ROOT / "wheels"  # large ones in part-0, part-1, ...
SMALL = WHEELS / "small"
LIBRARIES = [
    ROOT / "deepalign_kernels" / name
    for name in ("_native_cpu.so", "_native_cuda.so", "_native_build.txt")
]
SITE = pathlib.Path(os.environ.get("DEEPALIGN_PEERS", tempfile.gettempdir())) / "deepalign-peers"
INTERRUPT, KILL = 10, 5  # seconds that a stopped step gets to write what it has; and to end
STARTED: list[subprocess.Popen[Any]] = []


# --- what travels ---------------------------------------------------------------------------------


def carried(call: Call) -> list[pathlib.Path]:
    """Files beyond the tracked ones that `call` needs, there or not."""
    files = [*LIBRARIES, *(WHEELS / f"part-{n}" for n in call.parts)]
    return [*files, SMALL] if call.wheels else files


def size_of(file: pathlib.Path) -> int:
    inside = file.rglob("*") if file.is_dir() else [file]
    return sum(f.stat().st_size for f in inside if f.is_file())


def tree_bytes() -> int:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    files = (ROOT / name for name in done.stdout.split("\0") if name)
    return sum(f.stat().st_size for f in files if f.is_file())


def dry_run(seconds: float = gpu_plan.TOTAL_SECONDS) -> int:
    """Print the plan for a GPU that is there for `seconds`; 1 where something is missing or a limit
    does not hold."""
    where, tree, wrong = machine.describe("cpu"), tree_bytes(), []
    commit = where["commit"] + "+" * where["dirty"]
    within = gpu_plan.affordable(seconds)
    start, between = gpu_plan.START_SECONDS, gpu_plan.BETWEEN_SECONDS
    total = start + sum(call.seconds + between for call in within)
    print(f"one GPU for {seconds:g} s: {_numbers(within)}, {total} s predicted. {start} s of them")
    print(f"are for its start, {between} s around each call. The tree has {report.mib(tree)} MiB.")
    if not within:
        wrong.append(f"no call ends within {seconds:g} s")
    for call in CALLS:
        files = carried(call)
        size = tree + sum(map(size_of, files))
        when = "" if call in within else "; runs if named, or with more --seconds"
        took = f"{call.seconds} s predicted, {call.limit} s at most"
        print(f"\ncall {call.number}, {call.name}: {took}{when}")
        print(f"  {machine.COMMIT}={commit} benchmarks/gpu.sh OUT {call.number}")
        for step in call.steps:
            print(f"  {step.seconds:4d} s  {step.name}: {' '.join(_shown(step))}")
        print(
            f"  carry {report.mib(size)} MiB: {' '.join(str(f.relative_to(ROOT)) for f in files)}"
        )
        gone = [f"{f.relative_to(ROOT)} is not there" for f in files if not size_of(f)]
        wrong += [f"call {call.number}: {what}" for what in gone]
        if size > gpu_plan.CARRY_BYTES:
            wrong.append(f"call {call.number}: carries {report.mib(size)} MiB")
        if call.limit > gpu_plan.COMMAND_SECONDS:
            wrong.append(f"call {call.number}: may take {call.limit} s")
    print("\nOnly a GPU can say (the number is a call's):")
    for question, where in gpu_plan.ONLY_A_GPU:
        print(f"  {question:86s} {where}")
    print("\nmissing:", *(wrong or ["nothing"]), sep="\n  ")
    print("(libraries: `make build`, all architectures; wheels: `benchmarks/gpu.sh --wheels`)")
    return 1 if wrong else 0


def _numbers(calls: tuple[Call, ...]) -> str:
    return "calls " + (", ".join(str(call.number) for call in calls) or "none")


def _shown(step: Step) -> list[str]:
    start = step.tool or "python3"
    return [start, *(pathlib.Path(a).name if a == sys.executable else a for a in step.command)]


def fetch_wheels() -> int:
    """Wheels into SMALL, but one above PART_BYTES as WHEELS/part-0, part-1, ..."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    SMALL.mkdir(parents=True)
    tags = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)] + ["manylinux2014_x86_64"]
    where = [part for tag in tags for part in ("--platform", tag)]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", *where, "-d", str(SMALL)]
    subprocess.run([*command, *gpu_plan.WHEELS], check=True)
    large = [f for f in SMALL.glob("*.whl") if f.stat().st_size > gpu_plan.PART_BYTES]
    if len(large) > 1:
        raise ValueError(f"wheels: expected one above {gpu_plan.PART_BYTES} bytes, got {large}")
    for file in large:
        data, step = file.read_bytes(), gpu_plan.PART_BYTES
        for number, at in enumerate(range(0, len(data), step)):
            (WHEELS / f"part-{number}").write_bytes(data[at : at + step])
        (SMALL / "large.txt").write_text(file.name)
        file.unlink()
    print(*sorted(str(f.relative_to(ROOT)) for f in WHEELS.rglob("*")), sep="\n")
    return 0


def install_peers(call: Call) -> str:
    """Keep the parts that came with this call, and install what is here and not installed yet; the
    large wheel once all its parts came. Returns what was done, for the log."""
    SITE.mkdir(parents=True, exist_ok=True)
    for part in WHEELS.glob("part-*"):
        shutil.copy(part, SITE / part.name)
    if not call.wheels:
        return ""
    site = SITE / "site"
    there = {file.stem for file in site.glob("*.installed")}
    wheels, told, large = sorted(SMALL.glob("*.whl")), "", SMALL / "large.txt"
    if not wheels:
        return "peers: no wheels here"
    wheels = [file for file in wheels if file.name not in there]
    if large.exists() and large.read_text() not in there:
        parts = [SITE / f"part-{n}" for n in sorted(n for c in CALLS for n in c.parts)]
        if all(p.exists() for p in parts):
            whole = SITE / large.read_text()
            whole.write_bytes(b"".join(p.read_bytes() for p in parts))
            wheels.append(whole)
        else:
            told = f"; {large.read_text()} is not whole: its parts come with calls 4 and 5"
    if not wheels:
        return f"peers: {site}{told}"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    command += ["--no-compile", "--no-cache-dir", "--target", str(site), *map(str, wheels)]
    done = subprocess.run(command, capture_output=True, text=True)
    # A wheel's .pth file counts in a site folder alone, which PYTHONPATH does not make one.
    site.mkdir(exist_ok=True)
    for wheel in wheels if done.returncode == 0 else ():
        (site / f"{wheel.name}.installed").touch()
    (site / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({str(site)!r})\n")
    return f"peers: {len(wheels)} wheels{told} {done.stderr[-500:]}"


# --- running --------------------------------------------------------------------------------------


def environment() -> int:
    """Say what is here; 1 where the GPU, the CUDA C++ library or the GEMM of the linear ops is
    missing, each of which would otherwise only be slow or silent."""
    import torch

    from deepalign_kernels import __main__, backends
    from deepalign_kernels.ops.linear import gemm

    if shutil.which("nvidia-smi"):
        asked = "name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu"
        subprocess.run(["nvidia-smi", f"--query-gpu={asked}", "--format=csv"])
    for what, state in __main__.versions():
        print(f"{what:20s} {state}")
    if os.environ.get(REHEARSAL):
        return 0
    wrong = []
    if not torch.cuda.is_available():
        wrong.append("torch sees no GPU")
    if why := backends.native_library("cuda"):
        wrong.append(f"native cuda: {why}")
    if not gemm.has_wide_gemm("cuda", torch.bfloat16):
        wrong.append("torch.mm has no bf16 GEMM with an fp32 result: linear ops run 10x slower")
    print("\n".join(f"WRONG: {line}" for line in wrong) or "nothing is missing")
    return 1 if wrong else 0


def run_call(call: Call, out: pathlib.Path, rehearse: bool) -> bool:
    """All steps of a call; whether all of them ended well."""
    where = machine.describe("cpu" if rehearse else machine.default_device())
    steps: list[dict[str, Any]] = []
    parts = {"call": call.number, "rehearsal": rehearse, "steps": steps}

    def save() -> None:
        report.save(str(out / f"call-{call.number}.json"), where, Ceilings(), [], **parts)

    with (out / f"log-{call.number}.txt").open("a") as log:
        print(f"== call {call.number}: {call.name}", install_peers(call), file=log, flush=True)
        for step in call.steps:
            line: dict[str, Any] = {"step": step.name, "predicted": step.seconds}
            line |= {"limit": step.limit, "state": "interrupted", "seconds": None}
            steps.append(line)
            save()
            began = time.monotonic()
            line["state"] = run_step(step, out, rehearse, log)
            line["seconds"] = round(time.monotonic() - began, 1)
            save()
            print(f"{call.number} {step.name}: {line['state']}, {line['seconds']} s", flush=True)
    return all(line["state"] in ("ok", "not played") for line in steps)


def run_step(step: Step, out: pathlib.Path, rehearse: bool, log: Any) -> str:
    """ "ok", "failed (status)", "stopped after N s", or why it could not be run."""
    argv = step.rehearsal if rehearse else step.command
    if argv is None:
        return "not played"
    tool = "" if rehearse else step.tool
    limit = step.limit * (4 if rehearse else 1)  # a laptop that is busy with other things
    if tool and not shutil.which(tool):
        return f"failed: there is no {tool}"
    command = [tool or sys.executable, *(a.replace("{out}", str(out)) for a in argv)]
    env = os.environ | {k: v.replace("{out}", str(out)) for k, v in step.env.items()}
    if rehearse:
        env |= {REHEARSAL: "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if (site := SITE / "site").exists():
        env["PYTHONPATH"] = f"{env.get('PYTHONPATH', ROOT)}:{site}"
    print(f"-- {step.name}: {' '.join(command)}", file=log, flush=True)
    kw = {"cwd": ROOT, "env": env, "stdout": log, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, start_new_session=True, **kw)
    STARTED.append(process)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        stop(process)
        return f"stopped after {limit} s"
    finally:
        STARTED.remove(process)
    return "ok" if status == 0 else f"failed ({status})"


def stop(process: subprocess.Popen[Any]) -> None:
    """End a step and all it started: by SIGINT, at which pytest still sums up, then by SIGKILL."""
    for number, patience in ((signal.SIGINT, INTERRUPT), (signal.SIGKILL, KILL)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
    try:
        os.killpg(process.pid, signal.SIGKILL)  # children that outlived it
    except ProcessLookupError:
        return


def _interrupted(number: int, frame: object) -> None:
    for process in STARTED:
        stop(process)
    sys.exit(128 + number)


def command(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--dry-run", action="store_true")
    p.add_argument("--rehearse", action="store_true")
    p.add_argument("--wheels", action="store_true")
    p.add_argument("--seconds", type=float, default=gpu_plan.TOTAL_SECONDS, metavar="S")
    p.add_argument("out", nargs="?", metavar="OUT")
    p.add_argument("calls", nargs="*", type=int, metavar="CALL")
    args = p.parse_args(argv)
    if args.dry_run:
        return dry_run(args.seconds)
    if args.wheels:
        return fetch_wheels()
    if not args.out:
        p.error("OUT, a folder for the results, is missing")
    if args.out == "environment":  # a step of call 1
        return environment()
    if unknown := set(args.calls) - {call.number for call in CALLS}:
        p.error(f"CALL: expected some of 1 to {len(CALLS)}, got {min(unknown)}")
    out = pathlib.Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    before = {n: signal.signal(n, _interrupted) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        good = _in_order(args, out)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not good:
        p.error(f"--seconds: expected time for one call at least, got {args.seconds:g}")
    return 0 if all(good) else 1


def _in_order(args: argparse.Namespace, out: pathlib.Path) -> list[bool]:
    """Of each call that ran, whether all of it ended well."""
    good, began = [], time.monotonic()
    for call in CALLS:
        overhead = gpu_plan.START_SECONDS + gpu_plan.BETWEEN_SECONDS * len(good)
        spent = overhead + time.monotonic() - began
        affordable = args.rehearse or gpu_plan.fits(call, args.seconds, spent)
        if call.number in args.calls if args.calls else affordable:
            good.append(run_call(call, out, args.rehearse))
        elif not args.calls:
            rest = f"{call.seconds} s predicted, {args.seconds - spent:.0f} s left"
            print(f"{call.number} {call.name}: not begun, {rest}", flush=True)
            break
    return good
