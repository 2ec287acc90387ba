"""`python -m benchmarks harvest DIR ...`: what follows from the files that benchmarks/gpu.sh left.

Ops for backends.CUDA_CPP_VERIFIED, entries for the launch table, chunks, what ncu counted,
predictions that were wrong, training under a limit, and the README's tables. Files that are not
there leave their part out and are named.
"""

from __future__ import annotations

import csv
import json
import math
import pathlib
from collections import defaultdict
from typing import Any

from benchmarks.gpu import plan as gpu_plan
from benchmarks.harness import report
from benchmarks.harness.cells import Row
from benchmarks.harness.verdict import NOISE
from benchmarks.offline import compiled
from benchmarks.studies import capped
from deepalign_kernels import backends

Lines = list[dict[str, Any]]
GAIN = 0.97  # of the table's time: another plan is worth an entry below that
APART = (0.9, 1.25)  # measured over predicted: beyond these the prediction was wrong
SANITIZERS = ("memcheck native", "racecheck native", "synccheck native")


class Found:
    """The result files in some folders, by name; a later folder wins."""

    def __init__(self, dirs: list[str]) -> None:
        files = [f for d in dirs for f in sorted(pathlib.Path(d).rglob("*")) if f.is_file()]
        self.files = {f.name: f for f in files}
        if not any(name.startswith("call-") for name in self.files):
            raise ValueError(
                f"DIR: expected the results of benchmarks/gpu.sh, found none in {dirs}"
            )
        self.calls = [self.json(f"call-{c.number}.json") for c in gpu_plan.CALLS]
        self.steps = {s["step"]: s for call in self.calls for s in call.get("steps", ())}
        self.rehearsal = any(call.get("rehearsal") for call in self.calls)
        self.device = "cpu" if self.rehearsal else "cuda"

    def json(self, name: str) -> dict[str, Any]:
        return json.loads(self.files[name].read_text()) if name in self.files else {}

    def tests(self) -> Lines:
        texts = [f.read_text() for n, f in self.files.items() if n.startswith("tests-")]
        return [json.loads(line) for text in texts for line in text.splitlines()]

    def rows(self, *names: str) -> list[Row]:
        there = [self.files[n] for n in names if n in self.files]
        return [row for f in there for row in report.load(str(f))[2]]


def command(dirs: list[str]) -> int:
    found = Found(dirs)
    plans: Lines = found.json("plans.json").get("lines", [])
    if found.rehearsal:
        print("A REHEARSAL ON A CPU: nothing below is a result.\n")
    parts = [_steps(found), _verified(found, plans), _table(found, plans), _chunks(found)]
    parts += [_counters(found), _predictions(found), _training(found), _readme(found)]
    print("\n\n".join(parts))
    return 0


def _titled(title: str, *body: str) -> str:
    return "\n".join([f"## {title}", *(body or ("not measured",))])


def _steps(found: Found) -> str:
    lines, missing = [], []
    for planned in gpu_plan.CALLS:
        for step in planned.steps:
            s = found.steps.get(step.name)
            state, took = (s["state"], s["seconds"]) if s else ("not begun", None)
            lines.append([str(planned.number), step.name, str(step.seconds), str(took), state])
            if state not in ("ok", "not played"):
                missing.append(step.name)
    for name in (*gpu_plan.LOGITS_FILES, *gpu_plan.LINEAR_FILES):
        for a in found.json(name).get("absent", ()):
            missing.append(f"{name}: {a['provider']} ({a['why']})")
    skipped = [t["id"] for t in found.tests() if t["outcome"] == "skipped"]
    missing += [f"{len(skipped)} tests skipped, {skipped[0]} first"] if skipped else []
    header = ["call", "step", "predicted s", "took s", "state"]
    return _titled("What ran", report.table(header, lines), "not there:", *(missing or ["nothing"]))


# --- CUDA_CPP_VERIFIED ----------------------------------------------------------------------------


def verified(tests: Lines, plans: Lines, clean: bool, device: str = "cuda") -> dict[str, str]:
    """op -> "" where its CUDA C++ was tested, is clean and won; else what is missing.

    A failed native test counts against the ops that it names, else those of a stem in its name,
    else all. Won: never slower than the fastest Triton plan, and faster somewhere.
    """
    mine = [t for t in tests if (t.get("backend"), t.get("device")) == ("native", device)]
    passed = {op for t in mine if t["outcome"] == "passed" for op in t.get("ops", ())}
    failed: dict[str, str] = {}
    for t in mine:
        if t["outcome"] == "failed":
            for op in _blamed(t):
                failed.setdefault(op, t["id"])
    times: dict[str, dict[tuple, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for x in plans:
        if x["ms"]:
            best = times[x["op"]][x["call"], x["T"], x["V"], x["dtype"]]
            best[x["backend"]] = min(x["ms"], best.get(x["backend"], math.inf))
    told = {}
    for op in backends.OPS:
        ratios = [t["native"] / t["triton"] for t in times[op].values() if len(t) == 2]
        if op in failed:
            told[op] = f"failed {failed[op]}"
        elif op not in passed:
            told[op] = "no test of its own passed"
        elif not clean:
            told[op] = "the sanitizers did not end clean"
        elif not ratios:
            told[op] = "not timed on both backends"
        elif max(ratios) > NOISE or min(ratios) * NOISE > 1:
            told[op] = f"did not win: {min(ratios):.2f} to {max(ratios):.2f} of Triton's time"
        else:
            told[op] = ""
    return told


def _blamed(test: dict[str, Any]) -> list[str]:
    stems = [op for op, stem in backends.STEMS.items() if op in test["id"] or stem in test["id"]]
    return list(test.get("ops") or stems or backends.OPS)


def _verified(found: Found, plans: Lines) -> str:
    clean = all(found.steps.get(s, {}).get("state") == "ok" for s in SANITIZERS)
    told = verified(found.tests(), plans, clean, found.device)
    names = "".join(f'    "{op}",\n' for op, why in told.items() if not why)
    entry = f"frozenset(\n    {{\n{names}    }}\n)" if names else "frozenset()"
    rest = [f"  {op}: {why}" for op, why in told.items() if why]
    return _titled("backends.CUDA_CPP_VERIFIED", f"{entry}", "left out:", *(rest or ["  none"]))


# --- launch tables, chunks ------------------------------------------------------------------------


def entries(plans: Lines) -> dict[str, tuple[list[int], float]]:
    """kernel -> (plan, its share of the table's time) where another plan is better: the geometric
    mean over all calls, shapes and dtypes, for plans that ran in every one."""
    times: dict[str, dict[tuple, dict[tuple, float]]] = defaultdict(lambda: defaultdict(dict))
    tables: dict[str, tuple] = {}
    for x in plans:
        if x["plan"]:
            where = x["call"], x["T"], x["V"], x["dtype"]
            cell = times[x["kernel"]][where]
            if x["table"]:
                tables[x["kernel"]] = tuple(x["plan"])
            if x["ms"]:
                cell[tuple(x["plan"])] = x["ms"]
    better = {}
    for kernel, cells in times.items():
        table, shares = tables.get(kernel), {}
        everywhere = set.intersection(*map(set, cells.values()))
        if table is None or table not in everywhere:
            continue
        for plan in everywhere - {table}:
            logs = [math.log(cell[plan] / cell[table]) for cell in cells.values()]
            shares[plan] = math.exp(sum(logs) / len(logs))
        best = min(shares, key=lambda p: shares[p], default=None)
        if best and shares[best] < GAIN:
            better[kernel] = (list(best), shares[best])
    return better


def _row_of(capability: str) -> str:
    """The row of the launch table for a compute capability, as `_launch._gpu_arch` has it."""
    number = int(capability.removeprefix("sm_") or 0)
    return "sm_80" if number < 90 else "sm_90" if number < 100 else "sm_100"


def _table(found: Found, plans: Lines) -> str:
    gpu = found.json("plans.json").get("machine", {}).get("gpu", {})
    arch = "interpreter" if not gpu else _row_of(gpu.get("capability", ""))
    told = [
        f'    "{k}": LaunchPlan({", ".join(map(str, plan[:2] if not plan[2] else plan))}),'
        f"  # {share:.2f} of the time of the entry before"
        for k, (plan, share) in sorted(entries(plans).items())
    ]
    failed = [
        f"{x['call']} {x['backend']} {x['plan']}: {x['failed']}" for x in plans if x["failed"]
    ]
    body = told or (["no plan beats its entry by 3 %"] if plans else [])
    title = f'triton_kernels/_launch.py, TABLE["{arch}"]'
    return _titled(title, *body, *([f"failed: {f}" for f in failed]))


def _chunks(found: Found) -> str:
    lines = [x for x in found.json("chunks.json").get("lines", ()) if x["ms"]]
    if not lines:
        return _titled("Workspace of linear_constrained_loss")
    default = next((x["ms"] for x in lines if x["workspace_mib"] is None), None)
    best = min(lines, key=lambda x: x["ms"])
    shown = [
        [str(x["workspace_mib"] or "default rule"), f"{x['ms']:.3f}",
         f"{x['flops'] / x['ms'] / 1e9:.0f}", f"{x['ms'] / default:.2f}" if default else "-"]
        for x in lines
    ]  # fmt: skip
    said = "the default rule is as good as any"
    if default and best["ms"] < GAIN * default:
        said = f"{best['workspace_mib']} MiB take {best['ms'] / default:.2f} of the default's time"
    header = ["MiB", "ms", "TFLOP/s", "of the default's"]
    return _titled("Workspace of linear_constrained_loss", report.table(header, shown), said)


# --- counters and predictions ---------------------------------------------------------------------


def counters(text: str) -> list[dict[str, float | str]]:
    """One entry per launch out of ncu's CSV (lines before its header are the program's)."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, dict[str, float | str]] = {}
    for x in csv.DictReader(lines[start:]):
        if x.get("Metric Name"):
            entry = launches.setdefault(x["ID"], {"kernel": x["Kernel Name"]})
            entry[x["Metric Name"]] = float(x["Metric Value"].replace(",", "") or "nan")
    return list(launches.values())


def _counters(found: Found) -> str:
    lines = []
    for name, file in sorted(found.files.items()):
        for c in counters(file.read_text()) if name.startswith("ncu-") else ():
            ns, *moved = (float(c.get(m, math.nan)) for m in gpu_plan.METRICS.split(",")[:3])
            issued = float(c.get("smsp__inst_executed.sum", math.nan))
            rate = sum(moved) / ns if ns else math.nan
            shown = [f"{ns / 1e6:.3f}", *(f"{m / 1e9:.3f}" for m in moved), f"{rate:.0f}"]
            lines.append([str(c["kernel"])[:60], *shown, f"{issued:.3g}"])
    header = ["kernel", "ms", "GB read", "GB written", "GB/s", "warp instructions"]
    return _titled("Counted by ncu", *([report.table(header, lines)] if lines else []))


def wrong(rows: list[Row], read: float, copy: float, gemm: dict[str, float]) -> list[list[str]]:
    """Rows of ours whose time is far from what bytes and operations predict, worst first."""
    found = []
    for r in rows:
        if r.group != "ours" or not r.ms:
            continue
        bandwidth = r.ruler_rate or (copy if r.gradient_bytes else read)
        parts = [r.ideal_bytes / bandwidth if bandwidth else 0.0]
        parts.append(r.ideal_flops / gemm[r.dtype] if gemm.get(r.dtype) else 0.0)
        predicted = 1e3 * max(parts)
        if predicted and not APART[0] <= r.ms / predicted <= APART[1]:
            found.append((r.ms / predicted, r, predicted))
    return [
        [r.op, r.phase, f"{r.shape} {r.dtype}", r.provider, f"{p:.3g}", f"{r.ms:.3g}", f"{x:.2f}"]
        for x, r, p in sorted(found, key=lambda f: -f[0])
    ]


def _predictions(found: Found) -> str:
    body: list[str] = []
    for name in (*gpu_plan.LOGITS_FILES, *gpu_plan.LINEAR_FILES):
        if name not in found.files:
            continue
        _, ceilings, rows, data = report.load(str(found.files[name]))
        lines = wrong(rows, ceilings.read, ceilings.copy, ceilings.gemm)
        header = ["op", "phase", "shape", "backend", "predicted ms", "measured ms", "ratio"]
        body.append(report.table(header, lines) if lines else f"{name}: all within {APART}")
        missed = [v for v in data.get("verdict", {}).get("lines", ()) if v[-1] == "NOT MET"]
        body += [f"target missed: {v[0]}: {' '.join(v[1:-1])}" for v in missed]
        if name == "logits.json" and not found.rehearsal:
            body.append(compiled.predictions(rows))
    return _titled("Predicted from bytes and operations, and measured otherwise", *body)


def _training(found: Found) -> str:
    rows = found.json("training.json").get("rows", [])
    lines = [capped.HEADER, *map(capped.line, rows)] if rows else []
    return _titled("Full fine-tuning under a limit on memory", *lines)


def _readme(found: Found) -> str:
    names = (*gpu_plan.LOGITS_FILES, *gpu_plan.LINEAR_FILES)
    files = [n for n in names if n in found.files]
    return _titled("For the README", *(report.readme(str(found.files[n])) for n in files))
