"""Time and memory of forward + backward against T and against V, as tables, JSON and two figures.

Doubling T or V should double both. The exponent printed is the slope in log-log over the larger
half of the points; where it is not 1 within TOLERANCE the line says why it can differ.
"""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Callable, Sequence

from benchmarks.cases.logits import LOGITS, Shape, select
from benchmarks.harness import machine, report
from benchmarks.harness.ceilings import Ceilings
from benchmarks.harness.cells import GIB, Row, RunPlan, run

TOLERANCE = 0.12
AXES = {  # device -> axis -> (values, the other size)
    "cpu": {
        "T": ([128 << i for i in range(9)], 4096),
        "V": ([1024 << i for i in range(9)], 256),
    },
    "cuda": {
        "T": ([128 << i for i in range(9)], 32768),
        "V": ([1024 << i for i in range(9)], 4096),
    },
}
QUICK = {"T": ([32, 64, 128], 1024), "V": ([512, 1024, 2048], 32)}


def main(
    ops: str, wanted: str, device: str, out: str | None, quick: bool, say: Callable[[str], None]
) -> int:
    """Run both axes, print a table of each, and write growth.json and figures to `out`."""
    dtype = "bf16" if device == "cuda" else "fp32"
    axes, rulers, everything = QUICK if quick else AXES[device], Ceilings(), []
    for axis, (values, other) in axes.items():
        shapes = [Shape(v, other) if axis == "T" else Shape(other, v) for v in values]
        plan = RunPlan(
            select(LOGITS, ops),
            shapes,
            [dtype],
            phases=("fwd_bwd",),
            wanted=wanted,
            device=device,
            seconds=0.02 if quick else 0.2,
            most_bytes=2 * GIB,
        )
        rows, _ = run(plan, rulers, say)
        everything += rows
        fixed = "V" if axis == "T" else "T"
        print(f"[forward + backward against {axis}, {fixed} = {other}, {dtype}]")
        print(text(rows, axis), "\n")
        if out:
            figure(rows, axis, f"{fixed} = {other}, {dtype}, {device}", out, say)
    if out:
        where = machine.describe(device)
        report.save(str(pathlib.Path(out) / "growth.json"), where, rulers, everything)
    return 0


def series(rows: Sequence[Row], axis: str) -> dict[tuple[str, str], list[Row]]:
    """(op, provider) -> rows with a number, by increasing size."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda r: getattr(r, axis)):
        if row.ms:
            found.setdefault((row.op, row.provider), []).append(row)
    return found


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Least-squares slope of log(values) over log(sizes), over the larger half of the points."""
    half = len(sizes) // 2
    pairs = zip(sizes[half:], values[half:], strict=True)
    points = [(math.log(s), math.log(v)) for s, v in pairs if v > 0]
    if len(points) < 2:
        return None
    mx, my = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    return sum((x - mx) * (y - my) for x, y in points) / sum((x - mx) ** 2 for x, _ in points)


def reason(time: float | None, memory: float | None) -> str:
    """Linear or not, and where not, the usual cause."""
    said = []
    if time is None:
        return "too few points"
    if time < 1 - TOLERANCE:
        said.append("time grows slower: the fixed cost of a call still shows")
    if time > 1 + TOLERANCE:
        said.append("time grows faster: small sizes stay in a cache, large ones do not")
    if memory is not None and memory < 1 - TOLERANCE:
        said.append("memory grows slower: what does not depend on the size still shows")
    if memory is not None and memory > 1 + TOLERANCE:
        said.append("memory grows faster than its inputs: look into it")
    return "; ".join(said) or "linear"


def text(rows: Sequence[Row], axis: str) -> str:
    lines = []
    for (op, provider), points in series(rows, axis).items():
        sizes = [float(getattr(r, axis)) for r in points]
        time = exponent(sizes, [r.ms or 0.0 for r in points])
        memory = exponent(sizes, [float(r.extra_bytes or 0) for r in points])
        ends = f"{points[0].ms:.3g} .. {points[-1].ms:.3g}"
        space = f"{report.mib(points[0].extra_bytes)} .. {report.mib(points[-1].extra_bytes)}"
        span = f"{sizes[0]:.0f} .. {sizes[-1]:.0f}"
        shown = [f"{x:.2f}" if x is not None else "-" for x in (time, memory)]
        lines.append([op, provider, span, ends, shown[0], space, shown[1], reason(time, memory)])
    header = ["op", "provider", axis, "ms", f"ms ~ {axis}^", "extra MiB", f"MiB ~ {axis}^", ""]
    return report.table(header, lines)


def exponents(rows: Sequence[Row]) -> str:
    """How time and memory grow, one line per sweep, in markdown."""
    lines = []
    for axis, other in (
        ("T", "V"),
        ("V", "T"),
    ):  # the sweep over one has a single size of the other
        fixed = max(
            {getattr(r, other) for r in rows},
            key=lambda n: len({getattr(r, axis) for r in rows if getattr(r, other) == n}),
        )
        swept = [r for r in rows if getattr(r, other) == fixed]
        for (op, provider), points in series(swept, axis).items():
            sizes = [float(getattr(r, axis)) for r in points]
            powers = (
                exponent(sizes, [r.ms or 0.0 for r in points]),
                exponent(sizes, [float(r.extra_bytes or 0) for r in points]),
            )
            told = f"{axis} = {sizes[0]:.0f} to {sizes[-1]:.0f}, {other} = {fixed}"
            shown = (f"{axis}^{x:.2f}" if x is not None else "-" for x in powers)
            lines.append([f"`{op}`", provider, told, *shown])
    return report.table(
        ("op", "backend", "sizes", "time grows as", "memory grows as"), lines, markdown=True
    )


def figure(rows: Sequence[Row], axis: str, told: str, out: str, say: Callable[[str], None]) -> None:
    """growth_<axis>.png: time on the left, memory beyond the inputs on the right, both axes
    logarithmic.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        say("no figures: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    ops = list(dict.fromkeys(r.op for r in rows))
    styles = {"eager": ":", "compile": "--", "reference": "-."}
    for (op, provider), points in series(rows, axis).items():
        sizes = [getattr(r, axis) for r in points]
        look = {
            "color": f"C{ops.index(op)}",
            "linestyle": styles.get(provider, "-"),
            "marker": ".",
            "label": f"{op}, {provider}",
        }
        panels[0].plot(sizes, [r.ms for r in points], **look)
        panels[1].plot(sizes, [(r.extra_bytes or 0) / 2**20 for r in points], **look)
    for panel, what in zip(panels, ("ms", "MiB beyond the inputs"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=what)
        panel.grid(alpha=0.3, which="both")
    panels[0].legend(fontsize=7)
    fig.suptitle(f"forward + backward against {axis} ({told})", fontsize=10)
    path = pathlib.Path(out)
    path.mkdir(parents=True, exist_ok=True)
    fig.savefig(path / f"growth_{axis}.png", dpi=130)
    plt.close(fig)


def command(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks growth", description=__doc__)
    p.add_argument("--out", metavar="DIR", help="figures and growth.json go here")
    p.add_argument("--quick", action="store_true", help="few small points")
    p.add_argument("--providers", default="ours,eager")
    p.add_argument("--ops", default="token_kl/policy_ref,token_logp,constrained_loss/ref_logits")
    p.add_argument("--device", choices=("cpu", "cuda"), default=machine.default_device())
    args = p.parse_args(argv)
    return main(args.ops, args.providers, args.device, args.out, args.quick, report.say)
