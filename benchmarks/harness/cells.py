"""Runs cells: a cell is one case, shape, dtype and phase, with all its providers taking turns.

In a cell each provider first runs once under the memory meter, its result goes through the gate,
and only those that pass meet on the clock. A provider that fails keeps a row that says why and has
no number.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.cases import logits as cases
from benchmarks.cases.logits import Case, Shape, Work
from benchmarks.harness import gate, machine, measure, memory, providers
from benchmarks.harness.ceilings import Ceilings, Ruler, bandwidth, gemm
from benchmarks.harness.plain import Inputs
from benchmarks.harness.providers import FLOOR, Provider

GIB = 1 << 30


@dataclass
class Row:
    """One line of the results. Times in ms, bytes in bytes; None where there is no number.

    extra_bytes: peak beyond the inputs; gradient_bytes of it are the gradients that were asked for.
    error: largest relative error against fp64. failed: why there is no number. ruler_rate: bytes
    per second of plain reading (with a gradient: copying) that took turns with the row.
    cached_rate: the same call's on so few rows that they stay in the cache: what arithmetic allows.
    """

    op: str
    phase: str
    T: int
    V: int
    H: int
    dtype: str
    provider: str
    group: str
    ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    laps: int = 0
    extra_bytes: int | None = None
    resident_bytes: int | None = None
    gradient_bytes: int = 0
    ideal_bytes: int = 0
    ideal_flops: int = 0
    error: float | None = None
    failed: str | None = None
    first_call_s: float | None = None
    note: str = ""
    ruler_rate: float | None = None
    cached_rate: float | None = None

    @property
    def shape(self) -> Shape:
        return Shape(self.T, self.V, self.H)

    @property
    def beyond_gradient(self) -> int | None:
        return None if self.extra_bytes is None else max(0, self.extra_bytes - self.gradient_bytes)


@dataclass(frozen=True)
class RunPlan:
    """What to run.

    seconds: clock time per provider and cell; rounds: laps of even the slowest. limit: no cell
    begins after so many seconds. once: cases that run on the first shape alone. most_bytes: for the
    rotated input sets.
    """

    table: list[Case]
    shapes: list[Shape]
    dtypes: list[str]
    phases: tuple[str, ...] = cases.PHASES
    wanted: str | None = None
    device: str = "cpu"
    seconds: float = 1.0
    rounds: int = 3
    limit: float = math.inf
    once: frozenset[str] = frozenset()
    trained: float = 1.0
    most_bytes: int = 3 * GIB


Keep = Callable[[list[Row], list[dict]], None]


def run(
    plan: RunPlan, ceilings: Ceilings, say: Callable[[str], None], keep: Keep | None = None
) -> tuple[list[Row], list[dict]]:
    """All cells of the plan; (rows, who was absent and why). `keep` gets both after every cell."""
    rows: list[Row] = []
    absent: dict[tuple[str, str], list[str]] = {}

    def missed() -> list[dict]:
        return [{"provider": n, "why": w, "ops": sorted({*ops})} for (n, w), ops in absent.items()]

    stop = time.monotonic() + plan.limit
    for shape, dtype in itertools.product(plan.shapes, plan.dtypes):
        table = [c for c in plan.table if shape == plan.shapes[0] or c.name not in plan.once]
        sets = _input_sets(plan, shape, dtype)
        rulers = _rulers(ceilings, plan, sets[0], dtype)
        for case, phase in ((c, p) for c in table for p in c.phases if p in plan.phases):
            started = time.monotonic()
            if started > stop:
                absent.setdefault((f"{shape} {dtype}", "out of time"), []).append(case.name)
                continue
            found, missing = providers.available(
                case, plan.device, cases.DTYPES[dtype], phase, plan.wanted
            )
            for who in missing:
                absent.setdefault((who.name, who.why), []).append(case.name)
            ruler = None if case.linear else rulers["copy" if phase == "fwd_bwd" else "read"]
            rows += _cell(plan, case, shape, dtype, phase, found, sets, ruler)
            if keep:
                keep(rows, missed())
            spent = time.monotonic() - started
            say(f"{case.name} {phase} {shape} {dtype}: {len(found)} providers, {spent:.1f} s")
        del rulers
        _rulers(ceilings, plan, sets[0], dtype)
        del sets
    if keep:
        keep(rows, missed())
    return rows, missed()


def _input_sets(plan: RunPlan, shape: Shape, dtype: str) -> list[Inputs]:
    first = cases.make_inputs(shape, cases.DTYPES[dtype], plan.device, trained=plan.trained)
    # A case may use one of the matrices alone: that one must be out of the cache by its next turn.
    size = max(x.nbytes for x in first.values())
    total = sum(x.nbytes for x in first.values())
    cache = machine.last_level_cache(plan.device)
    n = measure.input_sets(size, cache, plan.most_bytes * size // total)
    return [first, *(cases.rotated(first, by) for by in range(1, n))]


def _rulers(ceilings: Ceilings, plan: RunPlan, x: Inputs, dtype: str) -> dict[str, Ruler]:
    """Measure the ceilings again, before and after each group of cells: machines drift."""
    largest = max(v.nbytes for v in x.values())
    smallest = 4 * machine.last_level_cache(plan.device)
    size = min(max(largest, smallest), GIB) // 16384 * 16384
    rulers = bandwidth(ceilings, plan.device, size)
    if any(case.linear for case in plan.table):
        gemm(ceilings, plan.device, {dtype: cases.DTYPES[dtype]})
    return rulers


def _cell(
    plan: RunPlan,
    case: Case,
    shape: Shape,
    dtype: str,
    phase: str,
    found: list[Provider],
    sets: list[Inputs],
    ruler: Ruler | None,
) -> Iterator[Row]:
    if any(p.compiles for p in found):
        torch._dynamo.reset()  # else its limit of recompilations leaves later cells uncompiled
    mine = [cases.for_case(case, x) for x in sets]
    gold = gate.Gold(case, mine[0], phase)
    itemsize = cases.DTYPES[dtype].itemsize
    work = cases.work_of(case, shape, itemsize, phase, plan.trained)
    rows: list[Row] = []
    runners: dict[int, measure.Runner] = {}
    for provider in found:
        row = _blank(case, shape, dtype, phase, provider, work, mine[0])
        rows.append(row)
        caller = Caller(provider, case, phase, mine)
        if _admit(row, provider, caller, gold, plan.device):
            runners[id(row)] = measure.Runner(
                caller.call, provider.scope, caller.prepare if provider.consumes else None
            )
    if runners:
        _timed(rows, runners, plan, ruler)
        if plan.device == "cpu" and phase == "fwd" and not case.linear:
            for row, provider in zip(rows, found, strict=True):
                if row.group == "ours" and row.ms:
                    row.cached_rate = _cached_rate(case, provider, row, mine[0])
    yield from rows


def _cached_rate(case: Case, provider: Provider, row: Row, x: Inputs) -> float:
    cache = machine.last_level_cache("cpu")
    per_token = max(1, row.ideal_bytes // row.T)
    few = max(1, min(row.T, cache // 4 // per_token))
    caller = Caller(provider, case, "fwd", [cases.first_rows(x, few)])
    runner = measure.Runner(caller.call, provider.scope)
    runner.run("cpu", 20 if row.ms and row.ms < 1e3 else 1)
    return few * per_token / runner.summary().median


def _timed(
    rows: list[Row], runners: dict[int, measure.Runner], plan: RunPlan, ruler: Ruler | None
) -> None:
    turns = list(runners.values())
    if ruler:
        turns.append(measure.Runner(lambda k: ruler.call(), contextlib.nullcontext))
    measure.interleave(turns, plan.device, seconds=plan.seconds, rounds=plan.rounds)
    for row in rows:
        if ruler:
            row.ruler_rate = ruler.size / turns[-1].summary().median
        if runner := runners.get(id(row)):
            s = runner.summary()
            row.ms, row.p10_ms, row.p90_ms = (1e3 * t for t in (s.median, s.p10, s.p90))
            row.laps = s.laps


def _blank(
    case: Case, shape: Shape, dtype: str, phase: str, p: Provider, work: Work, x: Inputs
) -> Row:
    row = Row(case.name, phase, shape.T, shape.V, shape.H, dtype, p.name, p.group, note=p.note)
    row.ideal_bytes, row.ideal_flops = work.bytes, work.flops
    if phase == "fwd_bwd":
        row.gradient_bytes = sum(x[name].nbytes for name in case.leaves)
    return row


class Caller:
    """One provider's call on a case: input set k -> (value, gradients of the leaves)."""

    def __init__(self, provider: Provider, case: Case, phase: str, sets: list[Inputs]) -> None:
        self.fn = provider.fn
        self.backward = phase == "fwd_bwd" and provider.name != FLOOR  # it multiplies by itself
        # Some libraries make the gradient in the forward of whatever requires one, no_grad or not.
        self.sets = sets if self.backward else [{n: v.detach() for n, v in x.items()} for x in sets]
        self.leaves = case.leaves
        self.scalar = provider.reduction == "mean"
        self.copy: Inputs | None = None

    def prepare(self, k: int) -> None:
        """Give the next call a copy of its leaves, which it may overwrite."""
        x = self.sets[k % len(self.sets)]
        if self.copy is None:
            fresh = {n: torch.empty_like(x[n].detach()) for n in self.leaves}
        else:
            fresh = {n: self.copy[n].detach() for n in self.leaves}
        for name, leaf in fresh.items():
            leaf.copy_(x[name].detach()).requires_grad_(self.backward)
        self.copy = {**x, **fresh}

    def call(self, k: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = self.copy if self.copy is not None else self.sets[k % len(self.sets)]
        if not self.backward:
            with torch.no_grad():
                return self.fn(x), ()
        value = self.fn(x)
        upstream = None if self.scalar else x["upstream"].to(value.dtype)
        return value, torch.autograd.grad(value, [x[n] for n in self.leaves], upstream)


def _admit(row: Row, p: Provider, caller: Caller, gold: gate.Gold, device: str) -> bool:
    """Warm up, measure memory, hold against fp64; False, with the reason in the row, if it
    fails.
    """
    try:
        with p.scope():
            if p.consumes:
                caller.prepare(0)
            start = time.perf_counter()
            if p.compiles or device == "cuda":  # nothing of compilation in the memory
                caller.call(0)
                if p.consumes:
                    caller.prepare(0)
            (value, grads), peak = memory.measured(lambda: caller.call(0), device)
            row.first_call_s = round(time.perf_counter() - start, 3)
        row.extra_bytes, row.resident_bytes = peak.extra, peak.resident
        if p.name != FLOOR:
            row.error = gate.check(
                gold, value, grads, ours=p.group == "ours", scalar=p.reduction == "mean"
            )
    except gate.Refused as error:
        row.failed = f"refused: {error}"
    except Exception as error:  # a provider may fail in any way, and the others must still run
        first = (str(error).strip() or "no message").splitlines()[0]
        row.failed = f"{type(error).__name__}: {first[:200]}"
        row.extra_bytes = row.resident_bytes = None
        if device == "cuda":
            torch.cuda.empty_cache()
    return row.failed is None


def as_json(row: Row) -> dict:
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(row).items()}
