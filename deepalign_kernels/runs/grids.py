"""Success over a whole grid of decoding settings; which rates of a run the paper has too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deepalign_kernels.runs import paper
from deepalign_kernels.runs.record import Record, canonical
from deepalign_kernels.runs.table import Cell, Outcomes, picked, union

SWEPT = ("temperature", "top_k", "top_p")
OVER = "over"  # the setting of a cell that stands for a whole grid


def kind_of(manifest: Mapping[str, Any], name: str) -> str:
    """What attack the records of `name` are of: their name is the user's.

    "decoding", or "gcg+decoding" of two in a row. A run that does not say has the name alone.
    """
    return str((manifest.get("attacks") or {}).get(name, {}).get("attack", name))


def is_grid(manifest: Mapping[str, Any], name: str) -> bool:
    """Whether the last of an attack's parts is the decoding grid."""
    about = (manifest.get("attacks") or {}).get(name, {})
    while "then" in about:
        about = about["then"]
    return about.get("attack", name) == "decoding"


def over_grids(
    table: Sequence[Cell],
    samples: Sequence[Record],
    verdicts: Sequence[Record],
    manifest: Mapping[str, Any],
) -> list[Cell]:
    """Cells for whole grids of decoding settings, one outcome a prompt.

    "any of N settings": some sample succeeded. "worst of N settings by S": what the judge says of
    the one reply that judge S gives the highest score, as in the paper; a cell for every S that
    gives scores, among them the judge itself. `unparsable` counts prompts there whose worst reply
    the judge could not read, `failed` those of whose replies none has a score.

    Args:
        table: `cells` of the run.
        samples: of the run.
        verdicts: of the run.
        manifest: of the run; it says which attack each name is.
    """
    grids: dict[tuple[str, str, str], list[Cell]] = defaultdict(list)
    for c in table:
        if is_grid(manifest, c.attack) and any(k in c.setting for k in SWEPT):
            grids[c.attack, _others(c.setting), c.judge].append(c)
    grids = {key: group for key, group in grids.items() if len(group) > 1}
    names = {name for name, _, _ in grids}
    rows: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for r in samples:
        if r.name in names:
            rows[r.name, _others(r.cell)].append(r)
    scorers = list(dict.fromkeys(v.name for v in verdicts if v.data.get("score") is not None))
    out = []
    for (name, others, judge), group in grids.items():
        kept = {k: v for k, v in group[0].setting.items() if k not in SWEPT}
        whole = Cell(
            attack=name,
            setting={**kept, OVER: f"any of {len(group)} settings"},
            judge=judge,
            outcomes=union(group),
            unparsable=sum(c.unparsable for c in group),
            failed=sum(c.failed for c in group),
        )
        out.append(whole)
        asked = {r.item for r in rows[name, others]}
        for scorer in scorers:
            worst: Outcomes = picked(rows[name, others], verdicts, scorer, judge)
            setting = {**kept, OVER: f"worst of {len(group)} settings by {scorer}"}
            unread, failed = sum(not v for v in worst.values()), len(asked - worst.keys())
            out.append(
                replace(whole, setting=setting, outcomes=worst, unparsable=unread, failed=failed)
            )
    return out


def _others(setting: Mapping[str, Any]) -> str:
    return canonical({k: v for k, v in setting.items() if k not in SWEPT})


def label(cell: Cell) -> str:
    """ "prefill, k=5", "decoding, any of 49 settings"."""
    setting = (str(v) if k == OVER else f"{k}={v}" for k, v in cell.setting.items())
    return ", ".join([cell.attack, *setting])


@dataclass(frozen=True)
class Beside:
    """A rate measured here that the paper has too.

    Attributes:
        label: see `label`.
        cell: what was measured.
        published: the paper's rate in percent by model, see `paper.MODELS`; None where it has none.
    """

    label: str
    cell: Cell
    published: dict[str, float | None]


def beside_paper(
    table: Sequence[Cell], grids: Sequence[Cell], manifest: Mapping[str, Any], judge: str
) -> list[Beside]:
    """The rates by one judge that can stand beside the paper's.

    Of a decoding grid that is the judge's verdict on the reply that a scorer picks, best another
    judge's; without scores, success in any setting, which bounds it from above.

    Args:
        table: `cells` of the run.
        grids: `over_grids` of it.
        manifest: of the run.
        judge: name.
    """
    out = []
    for cell in [*(c for c in table if c.judge == judge), *_grid_rows(grids, judge)]:
        kind = kind_of(manifest, cell.attack)
        known = {m: paper.published(kind, cell.setting, m) for m in paper.MODELS}
        if any(v is not None for v in known.values()) and cell.rate is not None:
            out.append(Beside(label(cell), cell, known))
    return out


def _grid_rows(grids: Sequence[Cell], judge: str) -> list[Cell]:
    """One for each grid."""
    groups: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for c in grids:
        if c.judge == judge:
            others = {k: v for k, v in c.setting.items() if k != OVER}
            groups[c.attack, canonical(others)].append(c)
    out = []
    for any_of, *worst in groups.values():
        other = [c for c in worst if not str(c.setting[OVER]).endswith(f" by {judge}")]
        out.append([*other, *worst, any_of][0])
    return out
