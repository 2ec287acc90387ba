"""`python -m benchmarks page`: writes the benchmark pages, the README's figures and its picture.

Every number comes out of benchmarks/results/*.json: it was measured, and the page says on which
machine, with which versions and at which commit. `--check` compares instead of writing.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.harness import report
from benchmarks.harness.cells import Row
from benchmarks.studies import analysis, depth, growth, picture, robustness, step, toy

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
HEADLINE = re.compile(r"(<!-- headline -->\n).*?(<!-- end of headline -->)", re.S)
WARNING = (
    "<!-- Written by `python -m benchmarks page` from benchmarks/results/. Do not edit. -->\n\n"
)

LOGITS, AVX2 = "cpu-2core-2026-11-29.json", "cpu-2core-avx2-2026-11-29.json"
OLD_AVX2 = "cpu-2core-avx2-2026-11-24.json"  # a processor with AVX2 alone
LINEAR, LINEAR_LAPS = (
    "cpu-2core-linear-2026-11-29.json",
    "cpu-2core-linear-more-laps-2026-11-29.json",
)
WIDE = {d: f"cpu-2core-linear-wide-{d}-2026-11-24.json" for d in ("fp32", "bf16")}
KEPT_HEAP = "cpu-2core-linear-wide-kept-heap-2026-11-24.json"
PEERS = "cpu-2core-linear-peers-2026-11-29.json"
GROWTH = "growth-cpu-2core-2026-11-23/growth.json"
PIECES, GCG = "pieces-cpu-2core-2026-11-24.json", "gcg-cpu-2core-2026-11-24.json"
HOST, ROBUSTNESS = "host-cpu-2core-2026-11-29.json", "robustness-cpu-2core-2026-11-29.json"
STEP, STEP_LONGER = (f"step{name}-cpu-2core-2026-11-29.json" for name in ("", "-longer"))
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
        return source(f"python -m benchmarks {command}", self.name, self.machine)


def source(command: str, name: str, machine: dict[str, Any]) -> str:
    told = report.machine_text({"packages": {}, **machine})
    return f"`{command}`, `benchmarks/results/{name}`.\nMeasured on {told}."


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
            "per-token KL(policy &#124;&#124; ref), forward",
            f"{span(f.all_times([KL], 'fwd', 'plain'), '{:.0f}')} times faster than plain torch,"
            f" {span(f.all_times([KL], 'fwd', 'compile'), '{:.1f}')} than torch.compile",
            f"[AVX-512]({logits})",
        ),
        (
            "per-token KL(policy &#124;&#124; ref), forward + backward",
            f"{span(f.all_times([KL], 'fwd_bwd', 'plain'), '{:.0f}')} times faster than plain"
            f" torch ({span(old.all_times([KL], 'fwd_bwd', 'plain'), '{:.0f}')} with AVX2 only)",
            f"[AVX-512, AVX2]({logits})",
        ),
        (
            "constrained loss, forward + backward",
            f"{span(f.all_times(LOSSES, 'fwd_bwd', 'plain'), '{:.1f}')} times faster than plain"
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
            f"{head.times(masked, 'fwd_bwd', fp32, 'plain'):.1f} times faster than plain torch in"
            f" {head.mib(masked, 'fwd_bwd', fp32, 'native'):.0f} instead of"
            f" {head.mib(masked, 'fwd_bwd', fp32, 'plain'):.0f} MiB; without prompt tokens"
            f" {head.times(whole, 'fwd_bwd', fp32, 'plain'):.2f} times in"
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
    names = {"plain": "plain torch", "compile": "torch.compile", "native": "this library"}
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


# Pages: benchmarks/pages/NAME.md with its $names filled in


def logits_page() -> dict[str, str]:
    f, avx2, old = load(LOGITS), load(AVX2), load(OLD_AVX2)
    shown, phases = (KL, LOGP, *LOSSES), {"fwd": "fwd", "fwd_bwd": "fwd+bwd"}

    def line(op: str, phase: str) -> list[str]:
        times = (avx2.times(op, phase, f"1024x32000 {d}", "plain") for d in ("fp32", "bf16"))
        return [f"`{op}`", phases[phase], *(f"{x:.1f}x" for x in times)]

    def share(place: str) -> str:
        rows = [f.rows[op, "fwd", place, "native"] for op in shown]
        of = [r.ideal_bytes / (r.ms or 0) * 1e3 / (r.ruler_rate or 0) for r in rows]
        return span([100 * x for x in of], "{:.0f}") + " %"

    return {
        "file": f.name,
        "tables": report.readme(str(RESULTS / f.name)),
        "share_short": share("2048x32000 fp32"),
        "share_long": share("1024x128256 fp32"),
        "old_file": old.name,
        "old_commit": old.machine["commit"],
        "old_logp": span(old.all_times([LOGP], "fwd_bwd", "plain", "fp32"), "{:.1f}"),
        "old_loss": span(old.all_times(LOSSES, "fwd_bwd", "plain", "fp32"), "{:.1f}"),
        "avx2_source": avx2.source("run"),
        "avx2_table": table(
            ("op", "phase", "fp32", "bf16"), [line(op, p) for op in shown for p in phases]
        ),
        "avx2_compile": span(
            [x for p in phases for x in avx2.all_times(shown, p, "compile")], "{:.1f}"
        ),
        "trl_forward": span(f.all_times([LOGP], "fwd", "trl")),
        "trl_both": span(f.all_times([LOGP], "fwd_bwd", "trl")),
        "trl_loss": span(f.all_times(LOSSES, "fwd_bwd", "trl")),
    }


def linear_page() -> dict[str, str]:
    f, laps, heap, peers = load(LINEAR), load(LINEAR_LAPS), load(KEPT_HEAP), load(PEERS)
    wide = {dtype: load(name) for dtype, name in WIDE.items()}
    place, masked = "2048x2048x32000 fp32", HEAD_CASES[2]

    def gemms(file: File, op: str, at: str, provider: str = "native") -> str:
        return f"{file.times(op, 'fwd_bwd', at, provider, 'gemms'):.2f}x"

    def wide_line(op: str, dtype: str) -> list[str]:
        file, at, both = wide[dtype], f"1024x2048x128256 {dtype}", ("native", "compile")
        beyond = (f"{file.mib(op, 'fwd_bwd', at, p):.0f}" for p in both)
        return [f"`{op}` {dtype}", *(gemms(file, op, at, p) for p in both), *beyond]

    kept = heap.rows[masked, "fwd_bwd", "1024x2048x128256 fp32", "native"]
    ruler = heap.ms(masked, "fwd_bwd", "1024x2048x128256 fp32", "gemms")
    asked = "linear --ops linear_token_logp,linear_token_kl/policy_ref --phase fwd_bwd"
    return {
        "tables": report.readme(str(RESULTS / f.name)),
        "laps": str(laps.rows[HEAD, "fwd_bwd", place, "native"].laps),
        "laps_commit": laps.machine["commit"],
        "laps_file": laps.name,
        "laps_native": ", ".join(gemms(laps, op, place) for op in HEAD_CASES),
        "laps_compile": ", ".join(gemms(laps, op, place, "compile") for op in HEAD_CASES),
        "wide_fp32": wide["fp32"].name,
        "wide_commit": wide["fp32"].machine["commit"],
        "wide_table": table(
            ("case", "native", "compile", "extra MiB, native", "extra MiB, compile"),
            [wide_line(op, dtype) for dtype in WIDE for op in HEAD_CASES],
        ),
        "wide_frozen": " and ".join(
            gemms(file, HEAD_CASES[1], f"1024x2048x128256 {dtype}") for dtype, file in wide.items()
        ),
        "heap_file": heap.name,
        "heap_laps": str(kept.laps),
        "heap_low": f"{(kept.p10_ms or 0) / ruler:.2f}x",
        "heap_high": f"{(kept.p90_ms or 0) / ruler:.2f}x",
        "peers_source": peers.source(f"{asked} --shapes 512x1024x32000"),
        "peers_table": _peers(peers, "512x1024x32000"),
    }


def _peers(f: File, shape: str) -> str:
    ways = {
        "native": "native",
        "plain": "plain torch",
        "compile": "compile",
        "trl-chunked": "TRL chunked",
        "trl-divergence": "TRL divergence",
        "torch-chunked": "torch `linear_cross_entropy`",
        "liger-chunked": "Liger chunked",
    }

    def line(op: str, at: str) -> list[str]:
        times = [
            f"{f.times(op, 'fwd_bwd', at, p, 'gemms'):.2f}x"
            if (op, "fwd_bwd", at, p) in f.rows
            else "-"
            for p in ways
        ]
        beyond = [f"{f.mib(op, 'fwd_bwd', at, p):.0f}" for p in ("native", "plain", "compile")]
        return [f"`{op}` {at.split()[1]}", *times, ", ".join(beyond)]

    ops = ("linear_token_logp", "linear_token_logp/frozen_head", "linear_token_kl/policy_ref")
    header = ["case", *ways.values(), "extra MiB: native, plain torch, compile"]
    return table(header, [line(op, f"{shape} {d}") for op in ops for d in ("fp32", "bf16")])


def other_page() -> dict[str, str]:
    pieces, gcg, demo, host = (_json(name) for name in (PIECES, GCG, DEMO, HOST))
    grown, a = load(GROWTH), gcg["arguments"]
    hidden, layers, vocab = a["sizes"]
    return {
        "growth_source": grown.source("growth"),
        "growth_table": growth.exponents(list(grown.rows.values())),
        "host_source": source("python -m benchmarks host", HOST, host["machine"]),
        "host_table": table(
            list(host["rows"][0]), [[str(x) for x in row.values()] for row in host["rows"]]
        ),
        "pieces_source": source("python -m benchmarks pieces", PIECES, pieces["machine"]),
        "pieces_table": table(
            ("part", "case", "variant", "threads", "median", "unit"),
            [
                (x["piece"], x["case"], x["variant"], str(x["threads"]), f"{x['value']:.3g}", unit)
                for x in pieces["lines"]
                for unit in [x["unit"]]
            ],
        ),
        "gcg_source": source("python -m benchmarks gcg", GCG, gcg["machine"]),
        "gcg_hidden": str(hidden),
        "gcg_layers": str(layers),
        "gcg_vocab": str(vocab),
        "gcg_dtype": a["dtype"],
        "gcg_candidates": str(a["candidates"]),
        "gcg_tokens": f"{a['prompt']} + {a['suffix']} + {a['target']}",
        "gcg_table": _gcg(gcg["rows"]),
        "demo_table": table(demo["header"], [[str(x) for x in line] for line in demo["lines"]]),
        "demo_minutes": str(demo["minutes_per_seed"]),
        **{f"demo_{name}": demo[name] for name in ("command", "machine", "commit", "note")},
    }


def _gcg(rows: list[dict[str, Any]]) -> str:
    parts = {
        "gradient": "token gradient",
        "score": "candidate losses",
        "score cached": "candidate losses, shared prefix cached",
    }
    ways = {"logits": "whole logits", "logits_to_keep": "`logits_to_keep`", "dak": "this library"}
    shown = {
        (r["part"], r["way"]): f"{r['ms']:.3g} ms, {r['extra_bytes'] / 2**20:.0f} MiB" for r in rows
    }
    lines = [[title, *(shown[part, way] for way in ways)] for part, title in parts.items()]
    return table(("part", *ways.values()), lines)


def training_page() -> dict[str, str]:
    timed, longer = _json(STEP), _json(STEP_LONGER)
    told = source("python -m benchmarks step", STEP, timed["machine"])
    more = source(
        "python -m benchmarks step --length 1024 --rounds 0", STEP_LONGER, longer["machine"]
    )
    return {"source": told, "longer_source": more, **step.values(timed, longer)}


def robustness_page() -> dict[str, str]:
    found = _json(ROBUSTNESS)
    told = source("python -m benchmarks robustness --work DIR", ROBUSTNESS, found["machine"])
    return {"source": told, **robustness.values(found)}


PAGES = {
    "logits": logits_page,
    "linear": linear_page,
    "other": other_page,
    "training": training_page,
    "toy": lambda: toy.values(_json(depth.TOY)),
    "depth": depth.values,
    "analysis": analysis.values,
    "robustness": robustness_page,
}


def pages() -> dict[pathlib.Path, str]:
    """File -> what it must hold."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    assert HEADLINE.search(text), "README.md: no <!-- headline --> ... <!-- end of headline -->"
    filled = {
        ROOT / "docs" / "benchmarks" / f"{name}.md": WARNING + _template(name).substitute(values())
        for name, values in PAGES.items()
    }
    picture_file = ROOT / "docs" / "assets" / "head-step.svg"
    readme_text = HEADLINE.sub(lambda m: m[1] + headline() + m[2], text)
    return {**filled, picture_file: head_picture(), readme: readme_text}


def _template(name: str) -> string.Template:
    return string.Template((ROOT / "benchmarks" / "pages" / f"{name}.md").read_text())


def _json(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


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


def command(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks page", description=__doc__)
    p.add_argument("--check", action="store_true", help="exit with 1 if a page is stale")
    return main(p.parse_args(argv).check)
