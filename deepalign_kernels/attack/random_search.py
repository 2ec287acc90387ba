"""Random search over a suffix (arXiv 2404.02151): no gradient, one token's log-prob."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from deepalign_kernels import check, progress
from deepalign_kernels.attack.chat import Chat, Ids
from deepalign_kernels.attack.search import Field, Search, loaded, rows, saved
from deepalign_kernels.attack.suffix import distinct
from deepalign_kernels.data.prompts import Prompt
from deepalign_kernels.runs.record import Record

DRAWS = 16  # candidates drawn for each that is tried; the texts of many are other ids


@dataclass(frozen=True, kw_only=True)
class RandomSearch(Search):
    """A contiguous block of tokens is replaced by random ones, and kept if the log-prob of the
    target's first token rises.

    Args:
        change: tokens changed at once while the probability is at most 0.01; half of it up to 0.1,
            then a quarter (the published schedule).
        restarts: searches from the first suffix, the best counts; the later ones have other seeds.
        proposals: candidates per step, of which the best may be kept; 1 is the published.
        stop_at: with sampled replies, end above this probability of the token; the published code
            has 0.1 for models on disk, 0.4 for those behind an API. Greedy replies end the search
            when the token is the most probable, and nothing else does.
        plateau: with sampled replies, end a restart as well when the probability is above
            `plateau_from` and has risen by less than `plateau_gain` in so many steps, as the
            published code does. 0: never. Such an end does not count as solved.
        plateau_from: see `plateau`.
        plateau_gain: see `plateau`.
        transfer: the suffix of the first prompt that was solved begins the search for the others.
    """

    init: str = " ".join("!" * 25)
    steps: int = 10_000
    change: int = 4
    restarts: int = 1
    proposals: int = 1
    stop_at: float = 0.1
    plateau: int = 750
    plateau_from: float = 0.02
    plateau_gain: float = 0.01
    transfer: bool = False

    name: ClassVar[str] = "random_search"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("change", "restarts", "proposals"):
            check.count(name, getattr(self, name), 1)
        check.count("plateau", self.plateau, 0)
        for name in ("stop_at", "plateau_from", "plateau_gain"):
            check.number(name, getattr(self, name), above=0.0, below=1.0)

    @property
    def together(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether all prompts are needed at once."""
        return self.transfer

    def prepare(
        self, engine: Any, prompts: Sequence[Prompt]
    ) -> tuple[list[Record], Any, list[Prompt]]:
        """As `Prepares`."""
        if not self.transfer:
            return super().prepare(engine, prompts)
        records: list[Record] = []
        found: list[Prompt] = []
        known = ""
        for n, prompt in enumerate(prompts):
            begun = prompt if prompt.suffix else replace(prompt, suffix=known)
            with progress.part(n / len(prompts), (n + 1) / len(prompts)):
                more, _, done = super().prepare(engine, [begun])
            records, found = records + more, found + done
            if not known and more[0].data.get("matched"):
                known = done[0].suffix
        return records, engine, found

    def target_ids(self, chat: Chat, prompt: Prompt) -> Ids:
        """The first token of the target."""
        return super().target_ids(chat, prompt)[:1]

    def _searched(self, model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> Record:
        field = Field(self, model, tokenizer, prompts)
        best: dict[str, Any] | None = None
        tried, improved = 0, []
        for restart in range(self.restarts):
            with progress.part(restart / self.restarts, (restart + 1) / self.restarts):
                state = self._restart(field, prompts, restart)
            for step, value in state["improved"]:
                if not improved or value < improved[-1][1]:
                    improved.append([tried + step, value])
            tried += state["step"]
            if best is None or state["loss"] < best["loss"]:
                best = state
            if best["matched"]:
                break
        assert best is not None
        data = {
            "loss": best["loss"],
            "loss_as_text": field.of_text(best["text"], best["loss"], 1),
            "steps": tried,
            "matched": best["matched"],
            "ended": best["ended"],  # "solved", "plateau" or "steps"
            "accepted": best["accepted"],
            "improved": improved,  # [step, best loss so far], 0 before the first
            "flops": field.flops(),
        }
        text = {"suffix": best["text"]}
        item = prompts[0].id
        return Record("search", self.name, {}, item, 0, data, text, seconds=field.seconds)

    def _restart(self, field: Field, prompts: Sequence[Prompt], restart: int) -> dict[str, Any]:
        file = self._state_file(prompts, restart)
        generator = torch.Generator().manual_seed((self._seed(prompts) + restart) % 2**63)
        (loss,), allowed = field.losses[0], field.allowed.nonzero()[:, 0].cpu()
        state = loaded(file)
        if state is None:
            state = {
                "step": 0,
                "current": field.first.cpu(),
                "text": field.init,
                "loss": float(loss.losses(field.first[None])[0]),
                "accepted": 0,
                "improved": [],
            }
            state["improved"].append([0, state["loss"]])
            state["matched"] = self._solved(state, loss)
            state |= field.spent(generator)
        field.restore(state, generator)
        while not (ended := self._ended(state)):
            drawn = self._drawn(state, allowed, generator)
            candidates, texts = field.survivors(distinct(drawn, state["current"]), 1)
            state["step"] += 1
            progress.told(state["step"], self.steps)
            if candidates:
                batch = rows(candidates[: self.proposals], field.first.device)
                values = loss.losses(batch)
                at = int(values.argmin())
                if float(values[at]) < state["loss"]:
                    state |= {"loss": float(values[at]), "current": batch[at].cpu()}
                    state |= {"text": texts[at], "accepted": state["accepted"] + 1}
                    state["improved"].append([state["step"], state["loss"]])
                    state["matched"] = self._solved(state, loss)
            if state["step"] % self.save_every == 0:
                saved(file, state | field.spent(generator))
        saved(file, state | field.spent(generator))
        return state | {"ended": ended}

    def _ended(self, state: dict[str, Any]) -> str:
        """Why a restart is over; "" while it is not."""
        if state["matched"]:
            return "solved"
        if state["step"] >= self.steps:
            return "steps"
        if self.temperature > 0 and 0 < self.plateau <= state["step"]:
            before = state["step"] - self.plateau
            then = next(loss for step, loss in reversed(state["improved"]) if step <= before)
            now = math.exp(-state["loss"])
            if now > self.plateau_from and now - math.exp(-then) < self.plateau_gain:
                return "plateau"
        return ""

    def _solved(self, state: dict[str, Any], loss: Any) -> bool:
        if self.temperature > 0:
            return math.exp(-state["loss"]) > self.stop_at
        return loss.matched(state["current"].to(loss.model.device))

    def _drawn(self, state: dict[str, Any], allowed: Tensor, generator: torch.Generator) -> Tensor:
        """[B, S] candidates: a block of `current` at a random place replaced by random ids."""
        p = math.exp(-state["loss"])
        share = 1 if p <= 0.01 else 2 if p <= 0.1 else 4
        length = min(max(1, self.change // share), len(state["current"]))
        n = DRAWS * self.proposals
        start = torch.randint(len(state["current"]) - length + 1, (n, 1), generator=generator)
        chosen = torch.randint(len(allowed), (n, length), generator=generator)
        out = state["current"].repeat(n, 1)
        return out.scatter_(1, start + torch.arange(length), allowed[chosen])
