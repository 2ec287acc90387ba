"""Attacks on prompts into a run, then judges over its replies: in units, so that both go on."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from deepalign_kernels.attack.attack import Attack
from deepalign_kernels.data.prompts import Prompt
from deepalign_kernels.judge import Exchange, Judge
from deepalign_kernels.runs.record import Record, digest
from deepalign_kernels.runs.store import Run, Unit, fill, loaded, read_records

Say = Callable[[str], None]
STATE = "state"  # folder in a run: what attacks have finished of the unit that is under way


def evaluate(
    run: Run,
    engine: Any,
    attacks: Mapping[str, Attack],
    prompts: Sequence[Prompt],
    *,
    chunk: int = 8,
    say: Say | None = None,
) -> int:
    """Every attack on every prompt that the run does not have yet; returns the units made.

    Args:
        run: open for writing.
        engine: of the model under test.
        attacks: by name; the name goes into the records.
        prompts: all of them, in the order of the data.
        chunk: prompts of a unit: computed in common batches, and lost together when killed. The
            same for all calls of a run: it belongs into its manifest.
        say: gets lines of progress.

    Raises:
        ValueError: from an attack. What was written before stays.
    """
    state = run.folder / STATE
    made = units(engine, attacks, prompts, chunk)
    clear = [unit._replace(after=lambda: shutil.rmtree(state, ignore_errors=True)) for unit in made]
    return fill(run.records, clear, say)


def units(
    engine: Any, attacks: Mapping[str, Attack], prompts: Sequence[Prompt], chunk: int
) -> list[Unit]:
    """All units in order; a unit's name has its attack, config and prompts in it."""
    out = []
    for name, attack in attacks.items():
        size, about = len(prompts) if attack.together else chunk, plain(attack)
        for at in range(0, len(prompts), size):
            piece = list(prompts[at : at + size])
            mark = digest(about, [vars(p) for p in piece])
            make = _maker(name, attack, engine, piece)
            out.append(Unit(f"{name}/{at}-{at + len(piece)}/{mark}", make, len(piece)))
    return out


def same_chunk(
    run: Run, attacks: Mapping[str, Attack], prompts: Sequence[Prompt], chunk: int
) -> None:
    """Refuse to go on in a run that was begun with another chunk, whose manifest, an earlier
    version's, does not say which: its replies would be made twice.

    Raises:
        ValueError: naming the chunk to go on with, if the run shows it.
    """
    spans = {unit.name.rpartition("/")[0] for unit in units(None, attacks, prompts, chunk)}
    for name, attack in attacks.items():
        for unit in sorted(run.records.units):
            span = unit.rpartition("/")[0]
            if span.rpartition("/")[0] != name or span in spans:
                continue
            first, _, last = span.rpartition("/")[2].partition("-")
            known = first == "0" and not attack.together
            told = f"--chunk {last}" if known else f"the chunk of its units, such as {span}"
            raise ValueError(f"chunk: {run.folder}: was begun with another; go on with {told}")


def plain(attack: Any) -> dict[str, Any]:
    """The config as plain values, with the attack's name; not where its state lies."""
    about = getattr(attack, "about", None)
    found = about() if about else {"attack": attack.name, **asdict(attack)}
    return {k: v for k, v in found.items() if k != "state"}


def _maker(
    name: str, attack: Attack, engine: Any, prompts: list[Prompt]
) -> Callable[[], Iterator[Record]]:
    def make() -> Iterator[Record]:
        for record in attack(engine, prompts):
            yield record if record.name == name else replace(record, name=name)

    return make


def judge_run(
    run: Run,
    judges: Sequence[Judge],
    *,
    records: Sequence[Record] | None = None,
    chunk: int = 64,
    say: Say | None = None,
) -> int:
    """A verdict of every judge on every reply that it has not judged yet; returns the units made.

    Verdicts lie beside the replies, so a judge that is added later needs no model to reply again.
    Replies that another run of a failed request has changed are judged anew. `records` are the
    run's, if they are read already.
    """
    records = loaded(read_records(run.folder)) if records is None else records
    samples = [r for r in records if r.kind == "sample"]
    pieces = []
    for at in range(0, len(samples), chunk):
        piece = samples[at : at + chunk]
        name = f"{at}-{at + len(piece)}/{digest([r.key for r in piece])}"
        mark = hashlib.sha256("".join(r.line for r in piece).encode()).hexdigest()[:16]
        pieces.append((name, mark, [r for r in piece if r.error is None]))
    todo = [
        Unit(f"{judge.name}/{name}", _verdicts(judge, good), len(good), mark)
        for judge in judges
        for name, mark, good in pieces
    ]
    return fill(run.verdicts, todo, say)


def _verdicts(judge: Judge, samples: Sequence[Record]) -> Callable[[], Iterator[Record]]:
    def make() -> Iterator[Record]:
        seen = [
            Exchange(r.text["prompt"], r.text["reply"], r.text["prefix"], r.item) for r in samples
        ]
        for record, verdict in zip(samples, judge(seen), strict=True):
            data = {
                "of": record.key,
                "success": verdict.success,
                "score": verdict.score,
                "error": verdict.error,
            }
            if verdict.again:
                data["again"] = True
            text = {"raw": verdict.raw} if verdict.raw else {}
            yield Record("verdict", judge.name, {"of": record.key}, record.item, 0, data, text)

    return make


def verify(
    run: Run,
    engine: Any,
    attacks: Mapping[str, Attack],
    prompts: Sequence[Prompt],
    n: int,
    *,
    chunk: int = 8,
    seed: int = 0,
) -> tuple[int, list[str]]:
    """Replay random units until n rows are compared; (how many were, what differs in words).

    In mode "exact" nothing may differ; in mode "fast" nothing on the same machine and versions.
    """
    kept = {r.key: r for r in read_records(run.folder)}
    done = [u for u in units(engine, attacks, prompts, chunk) if u.name in run.records.units]
    random.Random(seed).shuffle(done)
    wrong: list[str] = []
    compared = 0
    for unit in done:
        for record in unit.make():
            compared += 1
            if record.key not in kept:
                wrong.append(f"{unit.name}: {record.item} is not in the run")
            elif kept[record.key].line != record.line:
                wrong.append(f"{unit.name}: {record.item} {dict(record.cell)} differs")
        if compared >= n:
            break
    return compared, wrong
