"""An analysis as a run: records of one schema in a folder, gone on with after an interruption.

    metric   weights           hash of each model
    profile  profile           by example: every array of `Profile`, "values" by name
    profile  first_token       by example: the favourite first token and its margins
    profile  gradients         by example: norms by position, and by layer
    profile  vocabulary        by position: the tokens that carry the divergence
    metric   outside           probability on tokens that only one model knows

Hidden states and sampled answers lie in `work/` until all records are there.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from deepalign_kernels import check
from deepalign_kernels.analyze.first_token import first_tokens
from deepalign_kernels.analyze.gradients import exact_norms, probed_norms
from deepalign_kernels.analyze.pairs import Pair, sample_answers
from deepalign_kernels.analyze.profile import profile_of
from deepalign_kernels.analyze.states import Model, States, collect
from deepalign_kernels.analyze.vocabulary import largest_terms
from deepalign_kernels.fingerprint import model_hash
from deepalign_kernels.runs import Record, Run, read_records
from deepalign_kernels.runs.record import digest
from deepalign_kernels.runs.store import write_private

Answers = Literal["given", "model", "base"]
Gradients = Literal["head", "last", "all", "probes"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is computed; all of it stands in the manifest.

    Attributes:
        title: of the model in figures.
        base_title: of what it is compared with.
        positions: of each answer, at most.
        answers: "given", or sampled from the "model" or from its "base".
        temperature: of sampling, > 0.
        top_p: of sampling, in (0, 1].
        seed: of sampling and probes.
        gradients: "head" has the head's norms in closed form; "last" adds exact ones of the last
            layers, "all" of every layer, "probes" an estimate of the whole model.
        last_layers: for "last"; the paper's are 3.
        gradient_examples: so many of each group, evenly spread, for all but "head".
        probes: directions for "probes".
        top: tokens shown by position.
        top_positions: positions they are shown at.
    """

    title: str = "model"
    base_title: str = "base"
    positions: int = 20
    answers: Answers = "given"
    temperature: float = 0.9
    top_p: float = 0.6
    seed: int = 0
    gradients: Gradients = "head"
    last_layers: int = 3
    gradient_examples: int = 16
    probes: int = 32
    top: int = 10
    top_positions: int = 5

    def __post_init__(self) -> None:
        check.one_of("answers", self.answers, get_args(Answers))
        check.one_of("gradients", self.gradients, get_args(Gradients))
        names = ("positions", "last_layers", "gradient_examples", "probes", "top", "top_positions")
        for name in names:
            check.count(name, getattr(self, name), 1)


def analyse(
    folder: str | Path,
    model: Model,
    base: Model,
    tokenizer: Any,
    pairs: Sequence[Pair],
    settings: Settings | None = None,
    *,
    max_tokens: int = 8192,
    say: Say | None = None,
) -> Path:
    """Compare two models and write the records; what is there already is not computed again.

    Args:
        folder: of the run; a run with other settings or data in it is refused.
        model: a Hugging Face causal LM, or a function that loads one. Of functions only one is
            called at a time, and what it loaded is let go before the other.
        base: likewise.
        tokenizer: for sampled answers and to show tokens.
        pairs: see `pairs_of`.
        settings: see `Settings`.
        max_tokens: with padding, in a batch.
        say: gets a line of progress with the time that is left, at most every two seconds.

    Returns:
        `folder`.

    Raises:
        ValueError: a run with other settings, data or weights in the folder.
    """
    o = settings or Settings()
    data = digest([[list(p.context), list(p.answer), p.group] for p in pairs])
    about = {"about": "analysis", **asdict(o), "examples": len(pairs), "data": data}
    with Run(folder, about) as run:
        _Analysis(run, tokenizer, list(pairs), o, max_tokens, say).all(model, base)
    return Path(folder)


class _Analysis:
    def __init__(
        self, run: Run, tokenizer: Any, pairs: list[Pair], o: Settings, max_tokens: int, say: Any
    ) -> None:
        self.run, self.tokenizer, self.pairs, self.o = run, tokenizer, pairs, o
        self.max_tokens, self.work = max_tokens, run.folder / "work"
        self.chosen = [] if o.gradients == "head" else _spread(pairs, o.gradient_examples)
        each = {"head": 0, "last": 3, "all": o.positions, "probes": 3 * o.probes}[o.gradients]
        self.progress = _Progress(2 * len(pairs) + each * len(self.chosen), say)
        self.each = each

    def all(self, model: Model, base: Model) -> None:
        if "profile" in self.run.records.units:
            return
        self.work.mkdir(exist_ok=True, mode=0o700)
        if self.o.answers == "base":
            self._sampled(base)
        first = self._of("model", model)
        second = self._of("base", base)
        found = profile_of(first, second, self.pairs)
        groups = dict.fromkeys(found.groups)
        terms = [record for group in groups for record in self._terms(first, second, group)]
        outside = {"value": found.outside, "vocab": found.vocab}
        records = [*terms, *self._firsts(first), Record("metric", "outside", data=outside)]
        for i, pair in enumerate(self.pairs):
            n = len(pair.answer)
            values = {name: plain(getattr(found, name)[i, :n]) for name in found.metrics}
            records.append(
                Record("profile", "profile", {"group": pair.group}, f"{i}", data={"values": values})
            )
        self.run.records.commit("profile", records)
        shutil.rmtree(self.work)

    def _sampled(self, model: Model | nn.Module) -> nn.Module | None:
        """Answers in place of those given, drawn once; the model, if it had to be loaded."""
        path, o = self.work / "answers.json", self.o
        loaded = None
        if not path.is_file():
            loaded = _loaded(model)
            options = {"temperature": o.temperature, "top_p": o.top_p, "seed": o.seed}
            drawn = sample_answers(
                loaded,
                self.tokenizer,
                self.pairs,
                positions=o.positions,
                max_tokens=self.max_tokens,
                **options,
            )
            write_private(path, json.dumps([list(p.answer) for p in drawn]))
        answers = json.loads(path.read_text())
        self.pairs = [replace(p, answer=tuple(a)) for p, a in zip(self.pairs, answers, strict=True)]
        return loaded

    def _of(self, name: str, model: Model) -> States:
        """All that needs this one model."""
        loaded = _loaded(model)
        self._same_weights(name, loaded)
        if name == "model" and self.o.answers == "model":
            self._sampled(loaded)

        def cached(number: str, make: Callable[[], Tensor]) -> Tensor:
            path = self.work / f"{name}-{number}.pt"
            if not path.is_file():
                part = path.with_name(f".{path.name}")
                torch.save(make(), part)
                os.replace(part, path)
            return torch.load(path)

        states = collect(
            loaded,
            self.pairs,
            max_tokens=self.max_tokens,
            step=lambda n: self.progress.add(n, name),
            cached=cached,
        )
        if name == "model":
            self._gradients(loaded)
        return states

    def _same_weights(self, name: str, model: nn.Module) -> None:
        unit, found = f"weights/{name}", model_hash(model)
        if unit not in self.run.records.units:
            record = Record("metric", "weights", {"model": name}, data={"value": found})
            self.run.records.commit(unit, [record])
            return
        then = {r.cell["model"]: r.data["value"] for r in read_records(self.run.folder, "metric")
                if r.name == "weights"}  # fmt: skip
        if then[name] != found:
            raise ValueError(
                f"{name}: its weights are not those this run began with; choose another folder"
            )

    def _gradients(self, model: nn.Module) -> None:
        o = self.o
        if o.gradients == "probes" and "gradients" not in self.run.records.units:
            pairs = [self.pairs[i] for i in self.chosen]
            found = probed_norms(
                model,
                pairs,
                probes=o.probes,
                seed=o.seed,
                max_tokens=self.max_tokens,
                step=lambda n: self.progress.add(3 * n, "gradients"),
            )
            about = {"kind": "probes", "relative_error": found.relative_error}
            records = [
                self._gradient(i, about, {"whole": plain(row[: len(self.pairs[i].answer)])})
                for i, row in zip(self.chosen, found.whole, strict=True)
            ]
            self.run.records.commit("gradients", records)
        elif o.gradients in ("last", "all"):
            last = o.last_layers if o.gradients == "last" else None
            for i in self.chosen:
                unit = f"gradients/{i}"
                if unit not in self.run.records.units:
                    one = exact_norms(model, [self.pairs[i]], last_layers=last)
                    names = ("layers", "head", "last", *(() if last else ("embedding", "whole")))
                    values = {name: plain(getattr(one, name)[0]) for name in names}
                    about = {"kind": "exact", "last_layers": last, "left_out": one.left_out}
                    self.run.records.commit(unit, [self._gradient(i, about, values)])
                self.progress.add(self.each, "gradients")

    def _gradient(self, i: int, about: dict[str, Any], values: dict[str, Any]) -> Record:
        cell = {"group": self.pairs[i].group}
        return Record("profile", "gradients", cell, f"{i}", data={**about, "values": values})

    def _firsts(self, model: States) -> list[Record]:
        found = first_tokens(model, self.pairs)
        odds, margin = plain(found.odds), plain(found.margin)
        return [
            Record(
                "profile",
                "first_token",
                {"group": pair.group},
                f"{i}",
                data={
                    "values": {"odds": odds[i], "margin": margin[i]},
                    "favourite": self.tokenizer.decode([int(found.favourite[i])]),
                },
            )
            for i, pair in enumerate(self.pairs)
        ]

    def _terms(self, first: States, second: States, group: str) -> list[Record]:
        o = self.o
        found = largest_terms(
            first, second, self.pairs, positions=o.top_positions, top=o.top, group=group
        )
        records = []
        for terms in found:
            cell = {"group": group, "position": terms.position}
            values = asdict(terms) | {"text": [self.tokenizer.decode([t]) for t in terms.tokens]}
            records.append(Record("profile", "vocabulary", cell, data={"values": values}))
        return records


def _loaded(model: Model) -> nn.Module:
    return model if isinstance(model, nn.Module) else model()


def _spread(pairs: Sequence[Pair], count: int) -> list[int]:
    """Evenly spread indices, `count` at most in each group."""
    groups: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(pair.group, []).append(i)
    chosen = []
    for members in groups.values():
        n = min(count, len(members))
        chosen += [members[i * len(members) // n] for i in range(n)]
    return chosen


def plain(values: np.ndarray) -> list[Any]:
    """Nested lists of numbers of 6 digits; None for what is no finite number."""
    if values.ndim > 1:
        return [plain(row) for row in values]
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values.tolist()]


class _Progress:
    def __init__(self, total: int, say: Say | None) -> None:
        self.total, self.done, self.say = total, 0, say
        self.begun = self.told = time.monotonic()

    def add(self, number: int, what: str) -> None:
        self.done += number
        now = time.monotonic()
        if self.say is not None and (now - self.told > 2 or self.done >= self.total):
            self.told = now
            left = (now - self.begun) * (self.total - self.done) / max(1, self.done)
            self.say(f"{what}: {100 * self.done // max(1, self.total)} %, {left:.0f} s left")
