"""`compare A.json B.json`: what got slower, larger or broken from A to B.

A time counts as a regression when B's median is above A's by more than `threshold` and at least
nine tenths of B's laps are slower than A's median: a busy machine widens the spread before it moves
both. Memory counts when it grew by more than `threshold` and 1 MiB. A provider that had a number in
A and has none in B counts always.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness import report
from benchmarks.harness.cells import Row

THRESHOLD = 0.1


@dataclass(frozen=True)
class Change:
    where: str
    what: str
    before: float | None
    after: float | None
    regression: bool

    def line(self) -> list[str]:
        shown = [f"{x:.4g}" if x is not None else "-" for x in (self.before, self.after)]
        ratio = f"{self.after / self.before:.2f}x" if self.before and self.after else "-"
        return [self.where, self.what, *shown, ratio, "REGRESSION" if self.regression else "better"]


def _key(r: Row) -> tuple:
    return r.op, r.phase, r.T, r.H, r.V, r.dtype, r.provider


def changes(a: Sequence[Row], b: Sequence[Row], threshold: float = THRESHOLD) -> list[Change]:
    """Changes beyond the threshold and the spread, regressions first."""
    before, found = {_key(r): r for r in a}, []
    for new in b:
        old = before.get(_key(new))
        if old is None:
            continue
        where = f"{new.op} {new.phase} {new.shape} {new.dtype} {new.provider}"
        if old.ms and not new.ms:
            found.append(Change(where, f"no number: {new.failed}", old.ms, None, True))
        if old.ms and new.ms and old.p10_ms and new.p10_ms:
            slower = new.ms > old.ms * (1 + threshold) and new.p10_ms > old.ms
            faster = new.ms < old.ms / (1 + threshold) and old.p10_ms > new.ms
            if slower or faster:
                found.append(Change(where, "ms", old.ms, new.ms, slower))
        if old.extra_bytes is not None and new.extra_bytes is not None:
            low, high = sorted((old.extra_bytes, new.extra_bytes))
            if high > low * (1 + threshold) and high - low > 1 << 20:
                grew = new.extra_bytes > old.extra_bytes
                mib = (old.extra_bytes / 2**20, new.extra_bytes / 2**20)
                found.append(Change(where, "extra MiB", *mib, grew))
    return sorted(found, key=lambda c: not c.regression)


def main(a: str, b: str, threshold: float = THRESHOLD) -> int:
    """Print the comparison; exit status 1 if something got worse."""
    machine_a, _, rows_a, _ = report.load(a)
    machine_b, _, rows_b, _ = report.load(b)
    for key in ("device", "cpu", "gpu", "threads", "torch"):
        if machine_a.get(key) != machine_b.get(key):
            print(f"{key} differs: {machine_a.get(key)} and {machine_b.get(key)}")
    both = {_key(r) for r in rows_a} & {_key(r) for r in rows_b}
    found = changes(rows_a, rows_b, threshold)
    if found:
        header = ["where", "what", "before", "after", "ratio", ""]
        print(report.table(header, [c.line() for c in found]))
    worse = sum(c.regression for c in found)
    print(f"{len(both)} measurements in both, {worse} regressions, {len(found) - worse} better")
    return 1 if worse else 0


def command(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    p.add_argument("a", metavar="A.json")
    p.add_argument("b", metavar="B.json")
    p.add_argument("--threshold", type=float, default=THRESHOLD, help="default 0.1 = 10 %%")
    args = p.parse_args(argv)
    return main(args.a, args.b, args.threshold)
