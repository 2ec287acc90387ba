"""Folders of runs as plain contents: analyses, curves during training, attacks, training logs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deepalign_kernels.report.titles import name_all
from deepalign_kernels.runs import Cell, Record, cells, read_manifest, read_records, read_verdicts
from deepalign_kernels.runs.grids import over_grids
from deepalign_kernels.runs.names import title_of
from deepalign_kernels.runs.store import MANIFEST, read_times

TRAIN_LOG = "train_log.jsonl"


@dataclass
class Source:
    """One folder.

    Attributes:
        title: of its model, for legends; see `titles`.
        model: names its model: equal for runs of the same one.
        weights: their hash; "" where the run does not say.
        manifest: what it was asked to compute; the first line of a training log.
        values: name -> group -> [N, K] by example and position, NaN behind the end of an answer.
        norms: of an analysis, the same for gradient norms; "layers" is [N, K, L].
        norms_kind: "exact" or "probes", with what is stated about them.
        firsts: name -> group -> [N] of first tokens, "odds" and "margin" in nats.
        favourites: group -> the tokens that the model would begin with, by example.
        terms: (group, position) -> the tokens that carry the divergence there.
        dynamics: name -> step -> means by position.
        cells: rates by attack, setting and judge.
        grids: those of whole grids of decoding settings.
        verdicts: judge -> sample -> success, None where it was unparsable.
        searches: one a prompt, of attacks that optimise.
        seconds: that searches took, by key of their record.
        training: points of fine-tunings, by curve.
        log: lines of a training log that are about a step.
    """

    folder: Path
    title: str
    model: str = ""
    weights: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)
    values: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    norms: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    norms_kind: dict[str, Any] = field(default_factory=dict)
    firsts: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    favourites: dict[str, list[str]] = field(default_factory=dict)
    terms: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    dynamics: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    grids: list[Cell] = field(default_factory=list)
    verdicts: dict[str, dict[str, bool | None]] = field(default_factory=dict)
    searches: list[Record] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    training: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def base(self) -> str:
        """What an analysis compares with."""
        return str(self.manifest.get("base_title", "base"))


def read(folders: Sequence[str | Path]) -> list[Source]:
    """The contents of every folder, and of every run directly inside one that is none itself.

    Raises:
        ValueError: no folder; one that is not there or holds no run; a broken file.
    """
    if not folders:
        raise ValueError("runs: expected at least one folder, got none")
    found = []
    for name in folders:
        folder = Path(name)
        inside = [folder, *sorted(p for p in folder.iterdir() if p.is_dir())] \
            if folder.is_dir() else []  # fmt: skip
        runs = [p for p in inside if (p / MANIFEST).is_file() or (p / TRAIN_LOG).is_file()]
        if not runs:
            raise ValueError(
                f"{folder}: no run here: neither {MANIFEST} (analyses, attacks) nor {TRAIN_LOG}"
            )
        found += [_source(p) for p in (runs[:1] if runs[0] == folder else runs)]
    name_all(found)
    return found


def _source(folder: Path) -> Source:
    source = Source(folder, folder.name)
    if (folder / TRAIN_LOG).is_file():
        _read_log(source)
    if (folder / MANIFEST).is_file():
        source.manifest = source.manifest | read_manifest(folder)
        engine = source.manifest.get("engine") or {}
        model = engine.get("model")
        source.title = str(
            source.manifest.get("title") or (title_of(str(model)) if model else source.title)
        )
        source.weights = str(source.manifest.get("weights") or "")
        _read_records(source)
    return source


def _read_log(source: Source) -> None:
    for number, line in enumerate((source.folder / TRAIN_LOG).read_text().splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{source.folder / TRAIN_LOG}:{number}: broken JSON: {error}"
            ) from error
        if record.get("event") == "start":
            source.manifest = record
        elif "nll" in record:
            source.log.append(record)


def _read_records(source: Source) -> None:
    rows: dict[str, dict[str, dict[str, list[Any]]]] = {
        "profile": defaultdict(lambda: defaultdict(list)),
        "gradients": defaultdict(lambda: defaultdict(list)),
    }
    samples = []
    for record in read_records(source.folder):
        values: Any = record.data.get("values")
        if record.kind == "sample":
            samples.append(record)
        elif record.kind == "metric" and record.name == "weights":
            if record.cell["model"] == "model":
                source.weights = str(record.data["value"])
        elif record.kind == "search":
            source.searches.append(record)
        elif record.kind == "training":
            source.training.setdefault(record.name, []).append({**record.cell, **record.data})
        elif record.kind == "profile" and record.name in rows:
            if record.name == "gradients":
                source.norms_kind = {k: v for k, v in record.data.items() if k != "values"}
            for name, column in values.items():
                rows[record.name][name][str(record.cell["group"])].append(column)
        elif record.kind == "profile" and record.name == "first_token":
            group = str(record.cell["group"])
            source.favourites.setdefault(group, []).append(str(record.data["favourite"]))
            for name, value in values.items():
                source.firsts.setdefault(name, {}).setdefault(group, []).append(value)
        elif record.kind == "profile" and record.name == "vocabulary":
            source.terms[str(record.cell["group"]), int(record.cell["position"])] = values
        elif record.kind == "profile" and record.name == "dynamics":
            for name, column in values.items():
                source.dynamics.setdefault(name, {})[int(record.cell["step"])] = column
    for kind, into in (("profile", source.values), ("gradients", source.norms)):
        for name, groups in rows[kind].items():
            into[name] = {group: _padded(columns) for group, columns in groups.items()}
    verdicts = list(read_verdicts(source.folder))
    source.cells = cells(samples, verdicts)
    source.seconds = read_times(source.folder)
    source.grids = over_grids(source.cells, samples, verdicts, source.manifest)
    for verdict in verdicts:
        said = source.verdicts.setdefault(verdict.name, {})
        said[str(verdict.data["of"])] = verdict.data["success"]


def _padded(columns: list[list[Any]]) -> np.ndarray:
    """[N, K] or [N, K, L], NaN for None and behind the end."""
    arrays = [np.array(column, dtype=float) for column in columns]
    width = max(len(a) for a in arrays)
    out = np.full((len(arrays), width, *arrays[0].shape[1:]), np.nan)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return out
