"""`python -m benchmarks gcg`: what the output head costs in one step of robustness evaluation by
greedy coordinate gradient (GCG, arXiv 2307.15043), on a random Llama and random token ids.

Nothing is attacked or searched: no text, no tokenizer, no step is taken. Two parts of a step depend
on how the target's negative log-likelihood (NLL) is computed:

  gradient  one sequence: gradient of the NLL by the one-hot rows of the suffix, [suffix, V];
  score     B sequences with other suffixes: mean NLL of the target's tokens, [B] in nats, no grad,
            in sub-batches; "score cached": with keys and values of the shared prompt cached (filled
            before the clock, and no layer's copy of them outlives the layer).

Three ways, all through the model's own forward:

  logits          logits of all positions, float32 cross-entropy of the target's;
  logits_to_keep  the model makes logits of the target's positions only, else the same;
  dak             this library: `hf.attach`, `hf.TokenLogp`, all other positions ignored.

The body's GEMMs are alike, and `logits_to_keep` runs as few head rows as `dak`; what `dak` saves
over it is passes over [rows, V], and their memory. The gradient has some 20 rows, so it gains
memory alone, and in bf16 not even that: scores are fp32. The README has figures of a CPU; there are
none of a GPU yet.

Before any clock each result is held against log-probs computed in fp64 from hidden states of the
same sub-batches. On CUDA the sub-batch is one that all ways can run under --cap-gib, and where a
way fits a larger one, that as well. Exit status 1 if this library's own result is refused, 2 for
bad arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import pathlib
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NoReturn

import torch
import transformers
from torch import Tensor

import deepalign_kernels as dak
from benchmarks.cases.logits import DTYPES
from benchmarks.harness import gate, machine, measure, memory, report
from benchmarks.harness.cells import GIB
from benchmarks.studies.gcg_job import WAYS, Job, by_fp64, by_logits_to_keep, make_job
from deepalign_kernels import backends
from deepalign_kernels.testing import budget

USUAL = ("model", "dtype", "candidates", "seconds")
DEFAULTS = {
    "cpu": ("256x2x32000", "fp32", 64, 1.0),
    "cuda": ("2048x16x128256", "bf16", 512, 2.0),
    "quick": ("64x1x997", "fp32", 8, 0.02),
}
CPU_BATCH = 32
LOSS_BOUND = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 5e-3}  # of the ways that are not ours


def held(got: Tensor, truth: Tensor, eager: Tensor, bound: float | None) -> float:
    """Largest error of `got` relative to the largest true value.

    Raises:
        gate.Refused: over `bound`; or, where that is None, over this library's own budget: twice
            the error of `eager`, the same from logits of the model, and roundings.
    """
    if got.shape != truth.shape:
        raise gate.Refused(f"shape {tuple(got.shape)}, expected {tuple(truth.shape)}")
    error, allowed = budget(*(x.double() / truth.abs().max() for x in (got, eager, truth)))
    allowed = allowed + torch.finfo(got.dtype).eps if bound is None else bound
    if not error <= allowed:
        raise gate.Refused(f"relative error {error:.2e}, allowed {allowed:.2e}")
    return error


@dataclass
class Row:
    """One line of the results. batch: sequences per forward. fits: the largest batch that fits the
    cap (CUDA). ms per call: one gradient, or all candidates scored. extra_bytes: peak beyond model
    and inputs. error: see `held`. failed: why there is no number.
    """

    part: str
    way: str
    batch: int = 1
    fits: int | None = None
    ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    candidates_per_s: float | None = None
    extra_bytes: int | None = None
    error: float | None = None
    failed: str | None = None


def largest(score: Callable[[int], object], most: int) -> int:
    """The first of most, most / 2, ... for which score(batch) finds memory; 0 if none does."""
    while most:
        with contextlib.suppress(torch.OutOfMemoryError):
            score(most)
            return most
        gc.collect()
        torch.cuda.empty_cache()
        most //= 2
    return 0


def rows_to_score(part: str, job: Job, args: argparse.Namespace) -> list[Row]:
    """Every way at one common batch and, where it fits more, at its largest."""
    if args.device != "cuda":
        return [Row(part, name, min(CPU_BATCH, args.candidates)) for name in WAYS]
    cap = args.cap_gib * GIB / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap))
    fits = {
        name: largest(lambda n, way=way: job.score(way, n, "cached" in part), args.candidates)
        for name, way in WAYS.items()
    }
    torch.cuda.set_per_process_memory_fraction(1.0)  # on the clock nobody has to free caches
    common = min((n for n in fits.values() if n), default=0)
    rows = [Row(part, name, common, n) for name, n in fits.items()]
    rows += [Row(part, name, n, n) for name, n in fits.items() if n > common]
    for row in rows:
        row.failed = None if row.fits else "one sequence does not fit"
    return rows


def run_part(part: str, job: Job, args: argparse.Namespace) -> list[Row]:
    """Gate, memory and clock of one part; the ways take turns on the clock."""
    if part == "gradient":
        call, rows = lambda way, _: job.gradient(way), [Row(part, name) for name in WAYS]
        bound = gate.PEER_BOUND[True, DTYPES[args.dtype]]
    else:
        call = functools.partial(job.score, cached="cached" in part)
        rows, bound = rows_to_score(part, job, args), LOSS_BOUND[args.dtype]
    truths = {
        n: (call(by_fp64, n), call(by_logits_to_keep, n))
        for n in {row.batch for row in rows if not row.failed}
    }
    runners: list[tuple[Row, measure.Runner]] = []
    for row in rows:
        if row.failed:
            continue
        once = functools.partial(call, WAYS[row.way], row.batch)
        once()  # compiles, and allocates what stays
        got, peak = memory.measured(once, args.device)
        try:
            row.error = held(got, *truths[row.batch], None if row.way == "dak" else bound)
        except gate.Refused as refusal:
            row.failed = f"refused: {refusal}"
            continue
        row.extra_bytes = peak.extra
        runners.append((row, measure.Runner(lambda _, once=once: once(), contextlib.nullcontext)))
    measure.interleave([r for _, r in runners], args.device, seconds=args.seconds, rounds=3)
    for row, runner in runners:
        s = runner.summary()
        row.ms, row.p10_ms, row.p90_ms = s.median * 1e3, s.p10 * 1e3, s.p90 * 1e3
        row.candidates_per_s = None if part == "gradient" else args.candidates / s.median
    return rows


def table(rows: list[Row]) -> str:
    """ "x logits": how many times as fast as the fastest `logits` of the part."""
    header = "part,way,batch,ms,p10-p90,cand/s,x logits,extra MiB,error,fits".split(",")
    lines = []
    for r in rows:
        lines.append([r.part, r.way, str(r.batch), r.failed or ""])
        if r.ms and not r.failed:
            plain = [p.ms for p in rows if p.ms and (p.part, p.way) == (r.part, "logits")]
            times = [f"{r.ms:.4g}", f"{r.p10_ms:.4g}-{r.p90_ms:.4g}"]
            rate = f"{r.candidates_per_s:.0f}" if r.candidates_per_s else "-"
            ratio = f"{min(plain) / r.ms:.2f}" if plain else "-"
            tail = [report.mib(r.extra_bytes), f"{r.error:.1e}", str(r.fits or "-")]
            lines[-1][3:] = [*times, rate, ratio, *tail]
    return report.table(header, lines)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Options, defaults filled in; `sizes` is (H, layers, V). ValueError: names the argument."""
    p = Parser(prog="python -m benchmarks gcg", description=(__doc__ or "").split("\n\n")[0])
    p.add_argument("--model", metavar="HxLxV", help="hidden x layers x vocabulary")
    p.add_argument("--candidates", type=int, help="default 512 (CPU: 64)")
    p.add_argument("--prompt", type=int, default=64, help="tokens before the suffix")
    p.add_argument("--suffix", type=int, default=20, help="tokens that differ")
    p.add_argument("--target", type=int, default=20, help="tokens whose NLL is wanted")
    p.add_argument("--device", choices=("cpu", "cuda"), default=machine.default_device())
    p.add_argument("--dtype", choices=tuple(DTYPES), help="default bf16 (CPU: fp32)")
    p.add_argument("--seconds", type=float, help="clock time per part and way")
    p.add_argument("--cap-gib", type=float, default=16.0, help="for `fits`, weights included; CUDA")
    p.add_argument("--quick", action="store_true", help="a tiny model, to try the benchmark")
    p.add_argument("--json", metavar="FILE")
    args = p.parse_args(argv)
    usual = DEFAULTS["quick" if args.quick else args.device]
    for name, value in zip(USUAL, usual, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("candidates", "prompt", "suffix", "target", "seconds", "cap_gib"):
        if not getattr(args, name) > 0:
            raise ValueError(f"{name}: expected more than 0, got {getattr(args, name)}")
    sizes = args.model.lower().split("x")
    if len(sizes) != 3 or not all(n.isdecimal() and int(n) for n in sizes) or int(sizes[0]) % 64:
        told = "expected HxLxV, H a multiple of 64, such as 256x2x32000"
        raise ValueError(f"model: {told}, got {args.model!r}")
    args.sizes = tuple(int(n) for n in sizes)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: torch sees no CUDA device")
    return args


def command(argv: list[str] | None = None) -> int:
    try:
        args = arguments(argv)
        job = make_job(args)
        if args.device == "cuda" and torch.cuda.memory_allocated() > args.cap_gib * GIB:
            raise ValueError(f"cap_gib: the model alone takes more than {args.cap_gib:g} GiB")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    where, warning = machine.describe(args.device), machine.load_warning()
    rows = [r for part in ("gradient", "score", "score cached") for r in run_part(part, job, args)]
    backend = backends.selected("token_logp_fwd", args.device)
    if args.json:
        versions = {m.__name__: m.__version__ for m in (dak, torch, transformers)}
        asked = {k: v for k, v in vars(args).items() if k != "json"}
        found = {"machine": where, "versions": versions, "arguments": asked, "backend": backend}
        file = pathlib.Path(args.json)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**found, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    print(f"{report.machine_text(where)}, transformers {transformers.__version__}")
    if warning:
        print(f"note: {warning}")
    lengths = f"{args.prompt} + {args.suffix} + {args.target} tokens"
    print(f"[{args.model} {args.dtype}, {args.candidates} candidates of {lengths}; dak: {backend}]")
    print(table(rows))
    return 1 if any(r.way == "dak" and "refused" in (r.failed or "") for r in rows) else 0
