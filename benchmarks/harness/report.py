"""Results as text, markdown and JSON. Every number in the README comes out of `readme` here."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from benchmarks.harness.ceilings import Ceilings
from benchmarks.harness.cells import Row, as_json

FORMAT = 2
NAMES_BEFORE = {"eager": "plain", "reference": "eager"}  # of providers in format 1


def save(path: str, where: dict, ceilings: Ceilings, rows: Iterable[Row], **more: Any) -> None:
    """Write a result file; `more` are further JSON-able parts (absent, verdict, plan). Whoever is
    stopped meanwhile leaves the old file or the new one, whole.
    """
    file = pathlib.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    parts = {"format": FORMAT, "machine": where, "ceilings": asdict(ceilings), **more}
    text = json.dumps({**parts, "rows": [as_json(r) for r in rows]}, indent=1) + "\n"
    new = file.with_name(file.name + ".new")
    new.write_text(text)
    new.replace(file)


def load(path: str) -> tuple[dict, Ceilings, list[Row], dict]:
    """(machine, ceilings, rows, everything) of a result file."""
    data = json.loads(pathlib.Path(path).read_text())
    if data.get("format") not in (FORMAT, FORMAT - 1):
        raise ValueError(f"{path}: expected format <= {FORMAT}, got {data.get('format')!r}")
    names = {} if data["format"] == FORMAT else NAMES_BEFORE
    known = {f.name for f in fields(Row)}
    rows = [Row(**{k: v for k, v in row.items() if k in known}) for row in data["rows"]]
    rows = [replace(row, provider=names.get(row.provider, row.provider)) for row in rows]
    return data["machine"], Ceilings(**data["ceilings"]), rows, data


def cells(rows: Iterable[Row]) -> dict[tuple, dict[str, Row]]:
    """(op, phase, T, H, V, dtype) -> provider -> row."""
    found: dict[tuple, dict[str, Row]] = {}
    for r in rows:
        found.setdefault((r.op, r.phase, r.T, r.H, r.V, r.dtype), {})[r.provider] = r
    return found


def ratio(a: Row | None, b: Row | None) -> float | None:
    """How many times as long `a` takes as `b`; None where one has no number."""
    return a.ms / b.ms if a and b and a.ms and b.ms else None


def bandwidth_of(row: Row, ceilings: Ceilings) -> float:
    """Bytes per second that the row is held against: those of its own cell, else the run's best."""
    return row.ruler_rate or ceilings.of_phase(bool(row.gradient_bytes))


def achieved(row: Row, ceilings: Ceilings) -> tuple[str, float] | None:
    """(what the row is held against, the fraction of it reached): read, copy, or gemm where that
    binds.
    """
    if not row.ms:
        return None
    seconds, fractions = row.ms * 1e-3, {}
    kind = "copy" if row.gradient_bytes else "read"
    if bandwidth := bandwidth_of(row, ceilings):
        fractions[kind] = row.ideal_bytes / seconds / bandwidth
    if rate := row.ideal_flops and ceilings.gemm.get(row.dtype):
        fractions["gemm"] = row.ideal_flops / seconds / rate
    if not fractions:
        return None
    best = max(fractions, key=lambda k: fractions[k])
    return best, fractions[best]


def mib(n: int | None) -> str:
    if n is None:
        return "-"
    return f"{n / 2**20:.1f}" if n >= 1 << 20 else f"{n / 2**20:.3f}"


def _number(x: float | None, digits: int = 3) -> str:
    if x is None:
        return "-"
    return f"{x:.{digits}g}" if x < 1000 else f"{x:.0f}"


HEADER = ("op", "phase", "provider", "ms", "p10-p90", "GB/s", "in cache", "of", "x plain",
          "extra MiB", "beyond grad", "error")  # fmt: skip


def line(row: Row, cell: dict[str, Row], ceilings: Ceilings) -> list[str]:
    if row.failed:
        return [row.op, row.phase, row.provider, f"no number: {row.failed}"]
    part, floor = achieved(row, ceilings), ratio(row, cell.get("gemms"))
    of = f"{floor:.2f}x gemms" if floor else "-"
    if part and not floor:
        rate = "" if part[0] == "gemm" else f" {bandwidth_of(row, ceilings) / 1e9:.0f}"
        of = f"{100 * part[1]:.0f}% {part[0]}{rate}"
    gbs = row.ideal_bytes / row.ms / 1e6 if row.ms else None
    tflops = row.ideal_flops / row.ms / 1e9 if row.ms and row.ideal_flops else None
    return [
        row.op,
        row.phase,
        row.provider,
        _number(row.ms, 4),
        f"{_number(row.p10_ms)}-{_number(row.p90_ms)}",
        f"{_number(tflops)} TF" if tflops else _number(gbs),
        _number(row.cached_rate / 1e9) if row.cached_rate else "-",
        of,
        _number(ratio(cell.get("plain"), row)),
        mib(row.extra_bytes),
        mib(row.beyond_gradient),
        "-" if row.error is None else f"{row.error:.1e}",
    ]


def table(header: Sequence[str], lines: Iterable[Sequence[str]], *, markdown: bool = False) -> str:
    """Columns padded to their widest cell; a line shorter than the header ends in free text."""
    lines = [list(x) for x in lines]
    whole = [x for x in [list(header), *lines] if len(x) == len(header)]
    widths = [max(len(x[i]) for x in whole) for i in range(len(header))]
    if markdown:
        body = [f"| {' | '.join(x + [''] * (len(header) - len(x)))} |" for x in lines]
        rule = "|" + "|".join("---" if i < 1 else "--:" for i in range(len(header))) + "|"
        return "\n".join([f"| {' | '.join(header)} |", rule, *body])

    def padded(x: Sequence[str]) -> str:
        cut = len(x) - (len(x) < len(header))
        head = [(str.ljust if i < 3 else str.rjust)(x[i], widths[i]) for i in range(cut)]
        return "  ".join([*head, *x[cut:]]).rstrip()

    return "\n".join([padded(list(header)), *(padded(x) for x in lines)])


def tables(rows: Sequence[Row], ceilings: Ceilings) -> str:
    """One table per shape and dtype."""
    grouped: dict[str, list[list[str]]] = {}
    by_cell = cells(rows)
    for r in rows:
        cell = by_cell[r.op, r.phase, r.T, r.H, r.V, r.dtype]
        grouped.setdefault(f"{r.shape} {r.dtype}", []).append(line(r, cell, ceilings))
    return "\n\n".join(f"[{title}]\n{table(HEADER, lines)}" for title, lines in grouped.items())


def ceilings_text(c: Ceilings) -> str:
    parts = [f"read {c.read / 1e9:.1f} GB/s", f"copy {c.copy / 1e9:.1f} GB/s (read + written)"]
    parts += [f"gemm {name} {rate / 1e12:.3g} TFLOP/s" for name, rate in c.gemm.items()]
    ways = [f"  {name}: {_number(rate / 1e9)}" for name, rate in sorted(c.ways.items())]
    return "ceilings of this run: " + ", ".join(parts) + "\n" + "\n".join([*ways, ""])


def machine_text(m: dict) -> str:
    gpu = f", {m['gpu']['name']}" if "gpu" in m else ""
    state = "dirty" if m.get("dirty") else "clean"
    return (
        f"{m['cpu']} ({m['cpu_capability']}){gpu}, {m['threads']} threads on {m['cores']} cores,"
        f" load {m['load_average']}, torch {m['torch']}, triton {m['packages'].get('triton', '-')},"
        f" commit {m['commit'] or '?'} ({state}), {m['time']}"
    )


def absent_text(absent: Sequence[dict]) -> str:
    lines = [f"  {a['provider']}: {a['why']} ({', '.join(a['ops'])})" for a in absent]
    return "\n".join(["not run:", *lines]) if lines else ""


def best_of_ours(cell: dict[str, Row]) -> Row | None:
    """The fastest of this library's backends in a cell."""
    ours = [r for r in cell.values() if r.group == "ours" and r.ms]
    return min(ours, key=lambda r: r.ms or 0.0, default=None)


def readme(path: str) -> str:
    """Markdown tables for the README out of a result file."""
    where, ceilings, rows, data = load(path)
    header = [
        "op",
        "backend",
        "ms",
        "GB/s",
        "in cache",
        "of ceiling",
        "vs plain torch",
        "vs compile",
        "extra memory",
    ]
    blocks: dict[str, list[list[str]]] = {}
    for cell in cells(rows).values():
        row = best_of_ours(cell)
        if row is None:
            continue
        ratios = (ratio(cell.get(name), row) for name in ("plain", "compile"))
        shown = [f"{_number(r)}x" if r else "-" for r in ratios]
        full = line(row, cell, ceilings)
        name = f"`{row.op}` {row.phase.replace('fwd_bwd', 'fwd+bwd')}"
        cut = [name, row.provider, full[3], *full[5:8], *shown, f"{mib(row.beyond_gradient)} MiB"]
        blocks.setdefault(f"{row.shape} {row.dtype}", []).append(cut)
    ruler = f"read {ceilings.read / 1e9:.1f} GB/s, copy {ceilings.copy / 1e9:.1f} GB/s"
    parts = [f"Measured on {machine_text(where)}. Ceilings of the same run: {ruler}."]
    parts += [
        "Extra memory is what a call needs beyond its inputs and the gradient it returns."
        " 'Of ceiling': of plain reading (with a gradient: of copying) that took turns with the op,"
        " and its GB/s."
        " 'In cache' is the rate on rows that stay in the cache: what arithmetic allows."
    ]
    for title, lines in blocks.items():
        parts.append(f"**{title}**\n\n{table(header, lines, markdown=True)}")
    if verdict := data.get("verdict"):
        parts.append(table(verdict["header"], verdict["lines"], markdown=True))
    return "\n\n".join(parts)


def say(text: str) -> None:
    """Progress, beside the results."""
    print(text, file=sys.stderr, flush=True)


def command(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks readme", description=readme.__doc__)
    p.add_argument("file", metavar="FILE.json")
    print(readme(p.parse_args(argv).file))
    return 0
