"""What could not be done, counted by reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from deepalign_kernels.runs.record import Record

AGAIN = "the same command tries these again"


def failures(records: Iterable[Record], verdicts: Iterable[Record] = ()) -> list[str]:
    """A line per reason, the most frequent first. Numbers in reasons count as equal, but for a
    server's status.

    Args:
        records: of a run.
        verdicts: of its judges.
    """
    rows = [(r.name, r.error, r.unsettled) for r in records if r.error is not None]
    lines = _counted("failed", rows)
    said = [v for v in verdicts if v.data["success"] is None]
    rows = [(v.name, v.data.get("error") or "no reason given", v.unsettled) for v in said]
    return lines + _counted("not judged", rows)


def _counted(what: str, rows: Sequence[tuple[str, str, bool]]) -> list[str]:
    counts = Counter((name, _reason(error), again) for name, error, again in rows)
    return [
        f"{what}, {n} of {name}: {reason}" + (f" ({AGAIN})" if again else "")
        for (name, reason, again), n in counts.most_common()
    ]


def _reason(error: str) -> str:
    return re.sub(r"(?<!status )\b\d+(\.\d+)?", "N", error)
