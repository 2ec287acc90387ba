"""`python -m benchmarks pieces`: parts of the native CPU kernels by themselves, in turns with what
they stand beside.

gemm     the bf16 GEMM with an fp32 result of the linear ops, beside torch's bf16 and fp32 ones, at
         the three products of a step with T tokens, H hidden units and V columns
pages    the first write to fresh memory, the next one, and giving it back, in pages of 4 KiB and of
         2 MiB (alike where the system makes all pages large: see "transparent_hugepages")
columns  nanoseconds per 16 columns of rows that stay in the cache, on one thread and on all

Every call is compared with torch in fp64 before its clock starts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.logits import DTYPES, Shape
from benchmarks.harness import machine, report
from benchmarks.harness.measure import Runner, Summary, interleave
from deepalign_kernels import backends
from deepalign_kernels.testing import assert_in_budget

FORMAT = 1
SAMPLE = 64  # rows of a product that are compared with fp64
VOCAB, TURNS, ROWS = 4096, 15, 16  # columns: gradients of TURNS * ROWS rows share memory for ROWS
HEADER = ("piece", "case", "variant", "threads", "median", "p10-p90", "unit", "x first")


@dataclass(frozen=True)
class Line:
    """One measurement: `value`, `p10` and `p90` of `laps` calls, in `unit`."""

    piece: str
    case: str
    variant: str
    threads: int
    value: float
    p10: float
    p90: float
    unit: str
    laps: int


@dataclass(frozen=True)
class Entry:
    """One call to measure, and what turns its seconds into `unit`."""

    variant: str
    runner: Runner
    value: Callable[[float], float]
    unit: str
    threads: int = 0  # 0: all


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """n threads inside the block; 0: as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measured(piece: str, case: str, entries: Sequence[Entry], seconds: float) -> list[Line]:
    """The entries in turns."""
    interleave([e.runner for e in entries], "cpu", seconds=seconds, rounds=3, most=400)
    return [_line(piece, case, e, e.runner.summary()) for e in entries]


def _line(piece: str, case: str, e: Entry, s: Summary) -> Line:
    low, high = sorted((e.value(s.p10), e.value(s.p90)))
    count = e.threads or torch.get_num_threads()
    return Line(piece, case, e.variant, count, e.value(s.median), low, high, e.unit, s.laps)


# gemm


def native_mm(a: Tensor, b: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
    """out = a b by this library: bf16 operands, fp32 result."""
    done = torch.ops.deepalign_native.mm.default(a, b, out, scratch, False)
    assert done, "too little scratch memory"
    return out


def products(shape: Shape) -> dict[str, tuple[Tensor, Tensor]]:
    """The three products of a step, as `gemm.py` lays their operands."""
    rows, head, dz = (
        torch.randn(*size).bfloat16()
        for size in ((shape.T, shape.H), (shape.V, shape.H), (shape.T, shape.V))
    )
    return {"scores": (rows, head.t()), "dhidden": (dz, head), "dhead": (dz.t(), rows)}


def _hold_product(name: str, got: Tensor, a: Tensor, b: Tensor) -> None:
    """Some rows against fp64: the bound of a sum in fp32, and one rounding of the result.

    Raises:
        AssertionError: beyond it.
    """
    some = torch.linspace(0, len(a) - 1, min(SAMPLE, len(a))).long()
    x, y, got = a[some].double(), b.double(), got[some]
    error = (got.double() - x @ y).abs()
    rounding = torch.finfo(got.dtype).eps if got.dtype != torch.float32 else 0.0
    bound = (x.abs() @ y.abs() + 1) * a.shape[1] ** 0.5 * 2e-7 + rounding * (x @ y).abs()
    wrong = int((~(error <= bound)).sum())
    assert not wrong, f"{name}: {wrong} of {error.numel()} numbers are wrong"


def gemm(shape: Shape, seconds: float) -> list[Line]:
    lines = []
    for name, (a, b) in products(shape).items():
        m, inner, n = *a.shape, b.shape[1]
        flops = 2 * m * inner * n
        out, half = torch.empty(m, n), torch.empty(m, n, dtype=torch.bfloat16)
        # Panels for the whole depth, or as much of it as the kernel takes at a time.
        memory = 4 * (min(m, n) + 32) * min(1024, -(-inner // 2)) + 64
        scratch = torch.empty(memory, dtype=torch.uint8)
        wide = a.float(), b.float()
        calls: dict[str, Callable[[], Tensor]] = {}
        if backends.native_gemm("cpu"):
            calls["native bf16 -> fp32"] = lambda a=a, b=b, o=out, s=scratch: native_mm(a, b, o, s)
        calls["torch bf16 -> bf16"] = lambda a=a, b=b, o=half: torch.mm(a, b, out=o)
        calls["torch fp32"] = lambda w=wide, o=out: torch.mm(*w, out=o)
        entries = []
        for variant, call in calls.items():
            _hold_product(f"{name} {variant}", call(), a, b)
            runner = Runner(lambda k, call=call: call(), contextlib.nullcontext)
            entries.append(Entry(variant, runner, lambda s, f=flops: f / s / 1e9, "GFLOP/s"))
        lines += measured("gemm", f"{name} {m}x{inner}x{n}", entries, seconds)
    return lines


# pages


def fresh(size: int, large: bool) -> Tensor:
    """`size` bytes nobody has written to, in large pages if asked for and if they can be had."""
    x = torch.empty(size // 4)
    return backends.fresh_pages(x) if large else x


def _hold_written(x: Tensor, value: float) -> None:
    """Raises AssertionError where a number is not `value`."""
    assert bool((x == value).all()), f"fresh memory: expected {value} everywhere"


def _page_calls(size: int, large: bool) -> dict[str, Runner]:
    made: list[Tensor] = []

    def ready(k: int) -> None:
        made[:] = [fresh(size, large).fill_(1.0)]

    def give_back(k: int) -> None:
        made.clear()

    return {
        "first write": Runner(lambda k: fresh(size, large).fill_(1.0), contextlib.nullcontext),
        "next write": Runner(lambda k: made[0].fill_(2.0), contextlib.nullcontext, ready),
        "giving back": Runner(give_back, contextlib.nullcontext, ready),
    }


def pages(size: int, seconds: float) -> list[Line]:
    kinds = {"4 KiB": False}
    if not backends.native_library("cpu"):
        kinds["2 MiB"] = True
    for large in kinds.values():
        _hold_written(fresh(size, large).fill_(1.0), 1.0)
    calls = {kind: _page_calls(size, large) for kind, large in kinds.items()}
    lines = []
    for name in calls["4 KiB"]:
        entries = [Entry(k, calls[k][name], lambda s: s * 1e3, "ms") for k in kinds]
        lines += measured("pages", f"{name} {size >> 20} MiB", entries, seconds)
    return lines


# columns


Call = Callable[[bool], Tensor]  # (with the gradient)
Plain = Callable[[torch.dtype, bool], Tensor]


def row_calls(op: str, dtype: torch.dtype) -> tuple[Call, Plain]:
    """(the chosen backend's op on TURNS * ROWS equal rows, the same of one row in plain torch)."""
    n, target = TURNS * ROWS, 7
    x, y = (4 * torch.randn(1, 1, VOCAB).to(dtype) for _ in range(2))
    many = [t.expand(TURNS, ROWS, VOCAB) for t in (x, y)]
    targets, grad, tail = torch.full((n,), target), torch.full((n,), 0.5), (1.0, 0.0)
    out = torch.empty(1, ROWS, VOCAB, dtype=dtype).expand(TURNS, ROWS, VOCAB)
    run: dict[str, Any] = {
        name: backends.choose(name, "cpu", dtype) for name in (f"{op}_fwd", f"{op}_bwd")
    }
    if op == "token_logp":
        forward = (many[0], targets, -100, *tail)
        _, norm = run["token_logp_fwd"](*forward)
        backward = (grad, many[0], targets, norm, -100, *tail, out)
    else:
        forward = (*many, None, 0, 0.5, *tail)
        _, *saved = run["token_kl_fwd"](*forward)
        backward = (grad, *many, None, *saved, 0, 0.5, *tail, out)

    def plain(dtype: torch.dtype, gradient: bool) -> Tensor:
        leaf = x[0, 0].to(dtype).requires_grad_()
        q, p = leaf.log_softmax(0), y[0, 0].to(dtype).log_softmax(0)
        value = q[target] if op == "token_logp" else (q.exp() * (q - p)).sum()
        return torch.autograd.grad(0.5 * value, leaf)[0] if gradient else value.detach()

    def call(gradient: bool) -> Tensor:
        if not gradient:
            return run[f"{op}_fwd"](*forward)[0]
        run[f"{op}_bwd"](*backward)
        return out

    return call, plain


def columns(seconds: float) -> list[Line]:
    lines, counts = [], sorted({1, torch.get_num_threads()})
    backend = backends.selected("token_kl_fwd", "cpu")

    def per_16(seconds: float) -> float:
        return seconds * 1e9 * 16 / (TURNS * ROWS * VOCAB)

    for op in ("token_logp", "token_kl"):
        for name in ("fp32", "bf16"):
            call, plain = row_calls(op, DTYPES[name])
            for gradient, phase in ((False, "fwd"), (True, "bwd")):
                base, gold = (plain(d, gradient) for d in (torch.float32, torch.float64))
                got = call(gradient)
                shape = got.shape[: got.dim() - gold.dim()]
                base, gold = (t.expand(*shape, *t.shape) for t in (base, gold))
                assert_in_budget(f"{op} {phase} {name}", got, base, gold)
                entries = []
                for n in counts:
                    again = Runner(lambda k, c=call, g=gradient: c(g), lambda n=n: threads(n))
                    entries.append(Entry(backend, again, per_16, "ns", n))
                lines += measured("columns", f"{op} {phase} {name}", entries, seconds)
    return lines


def text(lines: Sequence[Line]) -> str:
    """The table; "x first": how many times as fast as the first line of its case."""
    first: dict[tuple[str, str], Line] = {}
    cells = []
    for e in lines:
        base = first.setdefault((e.piece, e.case), e)
        speed = e.value / base.value if e.unit == "GFLOP/s" else base.value / e.value
        spread = f"{e.p10:.3g}-{e.p90:.3g}"
        cells.append(
            [e.piece, e.case, e.variant, str(e.threads), f"{e.value:.3g}", spread, e.unit,
             f"{speed:.2f}"]
        )  # fmt: skip
    return report.table(HEADER, cells)


def command(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks pieces", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--only", default="gemm,pages,columns", help="of gemm,pages,columns")
    parser.add_argument("--shape", default="1024x1024x8192", help="TxHxV of the step of gemm")
    parser.add_argument("--mib", type=int, default=256, help="fresh memory of pages")
    parser.add_argument("--seconds", type=float, default=0.5, help="per line")
    parser.add_argument("--quick", action="store_true", help="small, for tests: no numbers to keep")
    parser.add_argument("--json", metavar="FILE", help="also write the lines there")
    args = parser.parse_args(argv)
    shape, mib, seconds = Shape.parse(args.shape), args.mib, args.seconds
    if not shape.H:
        parser.error(f"--shape: expected TxHxV, got {args.shape}")
    if args.quick:
        shape, mib, seconds = Shape(48, 640, 64), 8, 0.002
    if warning := machine.load_warning():
        print(warning, file=sys.stderr)
    where = machine.describe("cpu")
    torch.manual_seed(0)
    run = {
        "gemm": lambda: gemm(shape, seconds),
        "pages": lambda: pages(mib << 20, seconds),
        "columns": lambda: columns(seconds),
    }
    wanted = args.only.split(",")
    if unknown := set(wanted) - set(run):
        parser.error(f"--only: expected some of {', '.join(run)}, got {', '.join(unknown)}")
    with backends.use_backend("native" if not backends.native_library("cpu") else "eager"):
        lines = [line for piece in run if piece in wanted for line in run[piece]()]
    print(report.machine_text(where))
    print(text(lines))
    if args.json:
        parts = {"format": FORMAT, "machine": where, "lines": [asdict(e) for e in lines]}
        pathlib.Path(args.json).write_text(json.dumps(parts, indent=1) + "\n")
    return 0
