"""`python -m benchmarks page`: writes the benchmark pages, the README's figures and its picture.

Every number comes out of benchmarks/results/*.json: it was measured, and the page says on which
machine, with which versions and at which commit. `--check` compares instead of writing.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks import growth, picture, report
from benchmarks.harness import Row

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HEADLINE = re.compile(r"(<!-- headline -->\n).*?(<!-- end of headline -->)", re.S)
WARNING = "<!-- Written by `python -m benchmarks page` from benchmarks/results/. Do not edit. -->\n"

LOGITS, AVX2 = "cpu-2core-2026-11-24.json", "cpu-2core-avx2-2026-11-24.json"
MORE_LAPS = "cpu-2core-more-laps-2026-11-24.json"
LINEAR, LINEAR_LAPS = (
    "cpu-2core-linear-2026-11-24.json",
    "cpu-2core-linear-more-laps-2026-11-24.json",
)
WIDE = {d: f"cpu-2core-linear-wide-{d}-2026-11-24.json" for d in ("fp32", "bf16")}
KEPT_HEAP = "cpu-2core-linear-wide-kept-heap-2026-11-24.json"
PEERS = "cpu-2core-linear-peers-2026-11-24.json"
GROWTH = "growth-cpu-2core-2026-11-23/growth.json"
PIECES, GCG = "pieces-cpu-2core-2026-11-24.json", "gcg-cpu-2core-2026-11-24.json"
DEMO = "demo-cpu-2core-2026-11-23.json"

HEAD = "linear_constrained_loss"
HEAD_CASES = (HEAD, f"{HEAD}/frozen_head", f"{HEAD}/70% masked")
KL, LOGP = "token_kl/policy_ref", "token_logp"
LOSSES = ("constrained_loss/ref_logits", "constrained_loss/ref_logp")


class File(NamedTuple):
    """A result file; `rows` by (op, phase, "SHAPE DTYPE", provider)."""

    name: str
    machine: dict[str, Any]
    rows: dict[tuple[str, str, str, str], Row]

    def ms(self, op: str, phase: str, place: str, provider: str) -> float:
        found = self.rows[op, phase, place, provider].ms
        assert found, (self.name, op, phase, place, provider)
        return found

    def times(self, op: str, phase: str, place: str, over: str, of: str = "native") -> float:
        """How many times as long `over` takes as `of`."""
        return self.ms(op, phase, place, over) / self.ms(op, phase, place, of)

    def mib(self, op: str, phase: str, place: str, provider: str) -> float:
        """MiB beyond the inputs and the gradients that were asked for."""
        beyond = self.rows[op, phase, place, provider].beyond_gradient
        assert beyond is not None, (self.name, op, phase, place, provider)
        return beyond / 2**20

    def all_times(self, ops: Sequence[str], phase: str, over: str, dtype: str = "") -> list[float]:
        """`times` of these ops on every shape and dtype that was measured."""
        places = {p for o, f, p, v in self.rows if o in ops and f == phase and v == over}
        return [
            self.times(op, phase, place, over)
            for op in ops
            for place in sorted(places)
            if place.endswith(dtype) and (op, phase, place, over) in self.rows
        ]

    def source(self, command: str) -> str:
        return (
            f"`python -m benchmarks {command}`, `benchmarks/results/{self.name}`.\n"
            f"Measured on {report.machine_text(self.machine)}."
        )


def load(name: str) -> File:
    machine, _, rows, _ = report.load(str(RESULTS / name))
    by = {(r.op, r.phase, f"{r.shape} {r.dtype}", r.provider): r for r in rows}
    return File(name, machine, by)


def span(values: Sequence[float], form: str = "{:.3g}") -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return report.table(header, lines, markdown=True)


# The README's five lines


def headline() -> str:
    f, old, head = load(LOGITS), load(AVX2), load(LINEAR)
    masked, whole, fp32 = f"{HEAD}/70% masked", HEAD, "2048x2048x32000 fp32"
    beyond = max((r.beyond_gradient or 0) / r.T for r in f.rows.values() if r.provider == "native")
    logits, linear = "docs/benchmarks/logits.md", "docs/benchmarks/linear.md"
    lines = [
        (
            "per-token KL, forward",
            f"{span(f.all_times([KL], 'fwd', 'eager'), '{:.0f}')} times faster than plain torch,"
            f" {span(f.all_times([KL], 'fwd', 'compile'), '{:.1f}')} than torch.compile",
            f"[AVX-512]({logits})",
        ),
        (
            "per-token KL, forward + backward",
            f"{span(f.all_times([KL], 'fwd_bwd', 'eager'), '{:.0f}')} times faster than plain"
            f" torch ({span(old.all_times([KL], 'fwd_bwd', 'eager'), '{:.0f}')} with AVX2 only)",
            f"[AVX-512, AVX2]({logits})",
        ),
        (
            "constrained loss, forward + backward",
            f"{span(f.all_times(LOSSES, 'fwd_bwd', 'eager'), '{:.1f}')} times faster than plain"
            f" torch, {span(f.all_times(LOSSES, 'fwd_bwd', 'compile'), '{:.1f}')} than"
            " torch.compile",
            f"[AVX-512]({logits})",
        ),
        (
            "memory beyond the gradient",
            f"at most {beyond:.0f} bytes per token, whatever the vocabulary",
            f"[AVX-512]({logits})",
        ),
        (
            "output head and loss, 70 % prompt tokens, fp32",
            f"{head.times(masked, 'fwd_bwd', fp32, 'eager'):.1f} times faster than plain torch in"
            f" {head.mib(masked, 'fwd_bwd', fp32, 'native'):.0f} instead of"
            f" {head.mib(masked, 'fwd_bwd', fp32, 'eager'):.0f} MiB; without prompt tokens"
            f" {head.times(whole, 'fwd_bwd', fp32, 'eager'):.2f} times in"
            f" {head.mib(whole, 'fwd_bwd', fp32, 'native'):.0f} MiB",
            f"[AVX-512]({linear})",
        ),
    ]
    lines = [("what", "measured on 2 CPU cores", "where"), ("---", "---", "---"), *lines]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    m = f.machine
    return (
        f"{body}\n\n{m['cpu']}, torch {m['torch']}, {m['time'][:10]}, commits {m['commit']},"
        f" {head.machine['commit']} (linear) and {old.machine['commit']} (AVX2).\n"
    )


def head_picture() -> str:
    f, place = load(LINEAR), "2048x2048x32000 fp32"
    names = {"eager": "plain torch", "compile": "torch.compile", "native": "this library"}
    cases = {"all tokens trained": HEAD, "70 % are prompt": f"{HEAD}/70% masked"}
    m = f.machine
    return picture.bars(
        "Output head + constrained loss, forward + backward",
        [
            (title, [(shown, get(op, p)) for p, shown in names.items()], unit, case)
            for case, op in cases.items()
            for title, unit, get in (
                ("time", "s", lambda op, p: f.ms(op, "fwd_bwd", place, p) / 1e3),
                ("memory", "MiB", lambda op, p: f.mib(op, "fwd_bwd", place, p)),
            )
        ],
        [
            "2048 tokens, hidden size 2048, vocabulary 32000, fp32. Memory: beyond inputs and"
            " returned gradients.",
            f"{m['cpu']} ({m['cpu_capability']}), {m['threads']} threads on {m['cores']} cores;"
            f" torch {m['torch']}; commit {m['commit']}; {m['time'][:10]}.",
        ],
    )


# Pages


def logits_page() -> str:
    f, old, laps = load(LOGITS), load(AVX2), load(MORE_LAPS)
    both = [LOGP, *LOSSES]
    fp32 = "2048x32000 fp32"
    trl = f.all_times([LOGP], "fwd", "trl")
    trl_both = f.all_times([LOGP], "fwd_bwd", "trl")
    trl_loss = f.all_times(LOSSES, "fwd_bwd", "trl")
    few, many = f.rows[LOGP, "fwd_bwd", fp32, "native"], laps.rows[LOGP, "fwd_bwd", fp32, "native"]
    return f"""{WARNING}
# Logits ops on a CPU

`python -m benchmarks run` (`make bench`); the tables: `python -m benchmarks readme
benchmarks/results/{f.name}`.

{report.readme(str(RESULTS / f.name))}

## Targets that are not met

- Rows of bf16 hold twice as many columns per byte, so there arithmetic limits the speed and not
  memory, as the column "in cache" shows.
- Forward + backward of `token_logp` in fp32 waits for the memory pages of its fresh gradient. Its
  {few.laps} laps in the table have a median of {few.ms:.1f} ms and a tenth above {few.p90_ms:.0f}
  ms; the same cell with {many.laps} laps
  (`--seconds 4`, `benchmarks/results/{laps.name}`) takes {many.ms:.1f} ms,
  {laps.times(LOGP, "fwd_bwd", fp32, "eager"):.2f} times faster than eager.

Fresh gradients and workspaces are asked for in pages of 2 MiB (Linux, `madvise`). In a virtual
machine that reports free pages to its host the first such gradient after some idle seconds is
slow; the tables are the steady state.

## With AVX2 only

{old.source("run")}

Times faster than eager:

{
        table(
            ("op", "phase", "fp32", "bf16"),
            [
                (
                    f"`{op}`",
                    phase.replace("fwd_bwd", "fwd+bwd"),
                    *(
                        f"{old.times(op, phase, f'1024x32000 {d}', 'eager'):.1f}x"
                        for d in ("fp32", "bf16")
                    ),
                )
                for op in (KL, *both)
                for phase in ("fwd", "fwd_bwd")
            ],
        )
    }

Against torch.compile: {
        span(
            [
                x
                for phase in ("fwd", "fwd_bwd")
                for x in old.all_times([KL, *both], phase, "compile")
            ],
            "{:.1f}",
        )
    } times faster.

## Beside other libraries

TRL's `selective_log_softmax` in the run of the first tables, over both shapes and dtypes:
`token_logp` forward takes {span(trl)} times as long there, forward + backward {span(trl_both)}
times; the constrained loss built on it, forward + backward, {span(trl_loss)} times. The other
libraries of `benchmarks/peers.py` for logits run on GPUs only.
"""


def linear_page() -> str:
    f, laps, heap = load(LINEAR), load(LINEAR_LAPS), load(KEPT_HEAP)
    place, wide = "2048x2048x32000 fp32", "1024x2048x128256"

    def gemms(file: File, op: str, where: str, of: str = "native") -> str:
        return f"{file.times(op, 'fwd_bwd', where, of, 'gemms'):.2f}x"

    def wide_line(op: str, dtype: str) -> list[str]:
        file, at = load(WIDE[dtype]), f"{wide} {dtype}"
        beyond = (f"{file.mib(op, 'fwd_bwd', at, p):.0f}" for p in ("native", "compile"))
        return [
            f"`{op}` {dtype}",
            *(gemms(file, op, at, p) for p in ("native", "compile")),
            *beyond,
        ]

    masked = heap.rows[HEAD_CASES[2], "fwd_bwd", f"{wide} fp32", "native"]
    ruler = heap.ms(HEAD_CASES[2], "fwd_bwd", f"{wide} fp32", "gemms")
    logits_mib = {d: 2048 * 32000 * s / 2**20 for d, s in (("fp32", 4), ("bf16", 2))}
    return f"""{WARNING}
# Linear ops on a CPU

`python -m benchmarks linear --ops {HEAD} --phase fwd_bwd --shapes 2048x2048x32000 --rounds 2`.
Shapes are tokens x hidden size x vocabulary; "gemms" are the matrix products of the case alone, as
torch runs them in the dtype of the inputs.

{report.readme(str(RESULTS / f.name))}

## Targets that are not met

Two laps scatter by 5 %. {len(HEAD_CASES)} cases with {
        laps.rows[HEAD, "fwd_bwd", place, "native"].laps
    } laps in fp32 (commit {laps.machine["commit"]},
`benchmarks/results/{laps.name}`) took {
        ", ".join(gemms(laps, op, place) for op in HEAD_CASES)
    } of their GEMMs, and torch.compile of the plain formula {
        ", ".join(gemms(laps, op, place, "compile") for op in HEAD_CASES)
    }; in bf16 it
stays within the scatter on either side. torch.compile

- holds the whole logits, {logits_mib["fp32"]:.0f} MiB here in fp32 and {
        logits_mib["bf16"]:.0f} MiB in bf16, which grow with the tokens while
  this library's workspace does not (in bf16 {
        2048 * 32000 * 4 / 2**20:.0f} MiB of it are the fp32 sum of the head's gradient);
- cannot leave prompt tokens out;
- rounds the scores of bf16 heads to bf16.

## A vocabulary of 128256

`benchmarks/results/{WIDE["fp32"]}` and `-bf16-`, same machine, commit {
        load(WIDE["fp32"]).machine["commit"]
    }. Forward + backward over
the time of the GEMMs of all tokens, {wide}; the aim is 1.15x, and 0.4x with 70 % of the tokens
masked.

{
        table(
            ("case", "native", "compile", "extra MiB, native", "extra MiB, compile"),
            [wide_line(op, d) for d in WIDE for op in HEAD_CASES],
        )
    }

Not met in fp32 and, by little, in bf16. The limit here is the head's gradient, {
        128256 * 2048 * 4 / 2**30:.2f} GiB (bf16: {128256 * 2048 * 2 / 2**30:.2f}) of
fresh memory a step, where the GEMMs alone write to memory that stays: with a frozen head the
ratios are {gemms(load(WIDE["fp32"]), HEAD_CASES[1], f"{wide} fp32")} and {
        gemms(load(WIDE["bf16"]), HEAD_CASES[1], f"{wide} bf16")
    }. Where the process keeps its
heap (`MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000`,
`benchmarks/results/{heap.name}`) {masked.laps} laps of the masked fp32 step took {
        (masked.p10_ms or 0) / ruler:.2f}x
to {(masked.p90_ms or 0) / ruler:.2f}x.

## Per-token results, beside other libraries

{_peers()}
"""


def _peers() -> str:
    f, shape = load(PEERS), "512x1024x32000"
    ways = {
        "native": "native",
        "eager": "eager",
        "compile": "compile",
        "trl-chunked": "TRL chunked",
        "trl-divergence": "TRL divergence",
        "torch-chunked": "torch `linear_cross_entropy`",
        "liger-chunked": "Liger chunked",
    }
    ops = ("linear_token_logp", "linear_token_logp/frozen_head", "linear_token_kl/policy_ref")
    lines = []
    for op in ops:
        for dtype in ("fp32", "bf16"):
            at = f"{shape} {dtype}"
            has = [p for p in ways if (op, "fwd_bwd", at, p) in f.rows]
            times = [
                f"{f.times(op, 'fwd_bwd', at, p, 'gemms'):.2f}x" if p in has else "-" for p in ways
            ]
            beyond = [f"{f.mib(op, 'fwd_bwd', at, p):.0f}" for p in ("native", "eager", "compile")]
            lines.append([f"`{op}` {dtype}", *times, ", ".join(beyond)])
    header = ["case", *ways.values(), "extra MiB: native, eager, compile"]
    return f"""Per-token results, which any loss can follow, keep the gradient of the logits where all
tokens are one chunk (up to 2047 tokens, or what `max_workspace_bytes` allows): no GEMM more than
the whole logits need. Longer batches make the logits again, 4 GEMMs for 3 (KL: 6 for 4).

{f.source(f"linear --ops linear_token_logp,{ops[2]} --phase fwd_bwd --shapes {shape}")} (The edit
under way then was in the rulers of bandwidth, which these cells do not use.) Forward + backward
over the time of the GEMMs, {shape}:

{table(header, lines)}

Liger's chunked divergence gives the mean only. cut-cross-entropy and Liger's Triton kernels need a
GPU.
"""


def other_page() -> str:
    pieces = json.loads((RESULTS / PIECES).read_text())
    demo = json.loads((RESULTS / DEMO).read_text())
    return f"""{WARNING}
# Other measurements on a CPU

## Growth with tokens and vocabulary

{_growth()}

## The parts of a step

`python -m benchmarks.pieces`, `benchmarks/results/{PIECES}`.
Measured on {report.machine_text({"packages": {}, **pieces["machine"]})}.

{
        table(
            ("part", "case", "variant", "threads", "median", "unit"),
            [
                (
                    x["piece"],
                    x["case"],
                    x["variant"],
                    str(x["threads"]),
                    f"{x['value']:.3g}",
                    x["unit"],
                )
                for x in pieces["lines"]
            ],
        )
    }

## A step of GCG

{_gcg()}

## Demo

`{demo["command"]}`: {demo["machine"]}, commit {demo["commit"]}, under {
        demo["minutes_per_seed"]
    } minutes a seed.
{demo["note"]} All ten claims that the demo checks hold on each seed. Percent of the
restricted (made-up, benign) requests that are answered, without a prefill; in the last two columns
with the first 7 tokens of an answer prefilled:

{table(demo["header"], [[str(x) for x in line] for line in demo["lines"]])}
"""


def _growth() -> str:
    f = load(GROWTH)
    rows = list(f.rows.values())
    lines = []
    # The sweep over T has one V, and the other way round.
    for axis, other in (("T", "V"), ("V", "T")):
        fixed = max(
            {getattr(r, other) for r in rows},
            key=lambda n: len({getattr(r, axis) for r in rows if getattr(r, other) == n}),
        )
        of_axis = [r for r in rows if getattr(r, other) == fixed]
        for (op, provider), points in growth.series(of_axis, axis).items():
            sizes = [float(getattr(r, axis)) for r in points]
            time = growth.exponent(sizes, [r.ms or 0.0 for r in points])
            space = growth.exponent(sizes, [float(r.extra_bytes or 0) for r in points])
            lines.append(
                [
                    f"`{op}`",
                    provider,
                    f"{axis} = {sizes[0]:.0f} to {sizes[-1]:.0f}, {other} = {fixed}",
                    *(f"{axis}^{x:.2f}" if x is not None else "-" for x in (time, space)),
                ]
            )
    return f"""{f.source("growth")} fp32, forward + backward; figures of time and memory stand beside
the file. The exponent is the slope in log-log over the larger half of the sizes; 1 is linear.

{table(("op", "backend", "sizes", "time grows as", "memory grows as"), lines)}
"""


def _gcg() -> str:
    data = json.loads((RESULTS / GCG).read_text())
    machine, a = data["machine"], data["arguments"]
    parts = {
        "gradient": "token gradient",
        "score": "candidate losses",
        "score cached": "candidate losses, shared prefix cached",
    }
    ways = {"logits": "whole logits", "logits_to_keep": "`logits_to_keep`", "dak": "this library"}
    shown = {
        (r["part"], r["way"]): f"{r['ms']:.3g} ms, {r['extra_bytes'] / 2**20:.0f} MiB"
        for r in data["rows"]
    }
    lines = [[title, *(shown[part, way] for way in ways)] for part, title in parts.items()]
    hidden, layers, vocab = a["sizes"]
    return f"""`python -m benchmarks.gcg`, `benchmarks/results/{GCG}`.
Measured on {report.machine_text({"packages": {}, **machine})}.

The parts of a step of greedy coordinate gradient that end in the output head, on a randomly
initialised Llama with random token ids. Hidden size {hidden}, {layers} layers, V = {vocab},
{a["dtype"]}, {a["candidates"]} candidates of {a["prompt"]} + {a["suffix"]} + {a["target"]} tokens;
MiB beyond the model:

{table(("part", *ways.values()), lines)}
"""


def pages() -> dict[pathlib.Path, str]:
    """File -> what it must hold."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    assert HEADLINE.search(text), "README.md: no <!-- headline --> ... <!-- end of headline -->"
    folder = ROOT / "docs" / "benchmarks"
    return {
        folder / "logits.md": logits_page(),
        folder / "linear.md": linear_page(),
        folder / "other.md": other_page(),
        ROOT / "docs" / "assets" / "head-step.svg": head_picture(),
        readme: HEADLINE.sub(lambda m: m[1] + headline() + m[2], text),
    }


def main(check: bool = False) -> int:
    stale = {file: text for file, text in pages().items() if _read(file) != text}
    for file, text in stale.items():
        print(f"{'stale' if check else 'written'}: {file.relative_to(ROOT)}")
        if not check:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    return int(check and bool(stale))


def _read(file: pathlib.Path) -> str | None:
    return file.read_text() if file.exists() else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks page", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page is stale")
    sys.exit(main(parser.parse_args().check))
