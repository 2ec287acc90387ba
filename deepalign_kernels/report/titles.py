"""Which runs are of one model, and what each is called: no two curves of a figure alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepalign_kernels.report.read import Source


def name_all(sources: Sequence[Source]) -> None:
    """Give every source the `model` it is of and a title that tells it apart.

    Of one model are runs with equal weights; where a run does not say its weights (a server), those
    of equal title, unless that title is of several models. Models of one title are told apart by
    the folder of their first run, several runs of one model that can stand in one figure by theirs.
    """
    titles = _grouped(sources, lambda s: s.title)
    for title, group in titles.items():
        known = {s.weights for s in group if s.weights}
        for s in group:
            only = next(iter(known)) if len(known) == 1 else f"title {title}"
            s.model = s.weights or only
    for group in titles.values():
        models = _grouped(group, lambda s: s.model).values()
        if len(models) > 1:
            for same, end in zip(models, _ends(m[0] for m in models), strict=True):
                for s in same:
                    s.title = f"{s.title} ({end})"
    for group in _grouped(sources, lambda s: (s.title, s.model)).values():
        drawn = [_drawn(s) for s in group]
        alike = [
            s
            for i, s in enumerate(group)
            if any(drawn[i] & d for j, d in enumerate(drawn) if j != i)
        ]
        for s, end in zip(alike, _ends(alike), strict=True):
            s.title = f"{s.title} ({end})"


def _drawn(s: Source) -> set[str]:
    """What of a run gives curves or rows under its title."""
    attacks = {c.attack for c in s.cells} | {r.name for r in s.searches}
    kinds = {"values": s.values, "dynamics": s.dynamics, "log": s.log}
    return attacks | {f"its {kind}" for kind, found in kinds.items() if found}


def _grouped(
    sources: Iterable[Source], key: Callable[[Source], Hashable]
) -> dict[Hashable, list[Source]]:
    out: dict[Hashable, list[Source]] = defaultdict(list)
    for s in sources:
        out[key(s)].append(s)
    return dict(out)


def _ends(sources: Iterable[Source]) -> list[str]:
    """Of their folders, the shortest ends that are all different."""
    parts = [Path(s.folder).resolve().parts for s in sources]
    for n in range(1, max(map(len, parts), default=1) + 1):
        ends = ["/".join(p[-n:]) for p in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [f"{'/'.join(p)}, {i + 1}" for i, p in enumerate(parts)]  # one folder, given twice
