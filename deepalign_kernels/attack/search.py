"""What searches for a suffix share: places, losses, the result checked as text, records, resume."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from deepalign_kernels import check, hf, progress
from deepalign_kernels.attack.attack import Asking
from deepalign_kernels.attack.chat import Ask, Chat, Ids, begun, replies
from deepalign_kernels.attack.suffix import Place, allowed_ids
from deepalign_kernels.attack.target_loss import TargetLoss, plain_loss
from deepalign_kernels.data.prompts import Prompt
from deepalign_kernels.modes import kept_modes
from deepalign_kernels.runs.record import Record, derived_seed, digest

VERIFIED = 2e-2  # nats by which the loss of the suffix as text may differ from that of the search


@dataclass(frozen=True, kw_only=True)
class Search(Asking):
    """A suffix that makes a target likely. Of each prompt its `target`, else `target` here.

    Args:
        target: what the answer is to begin with, for prompts without a target of their own.
        init: the first suffix; its number of tokens stays.
        steps: of the search, at most.
        ascii_only: only tokens of printable ASCII.
        batch: candidates in one forward; halved when memory runs out.
        state: folder for the states of searches, "" keeps none. A search that was stopped goes on
            from its state and ends as if it had not been; one that is finished is not made again
            for as long as its state is there (`suite.evaluate` clears them with each unit).
        save_every: steps between two states.
    """

    target: str = "Sure, here is"
    init: str = "! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! !"
    steps: int = 500
    ascii_only: bool = True
    batch: int = 256
    state: str = ""
    save_every: int = 25

    name: ClassVar[str] = "search"
    local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch", "save_every"):
            check.count(name, getattr(self, name), 1)
        for name in ("target", "init"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}: expected text, got {getattr(self, name)!r}")

    def __call__(self, engine: Any, prompts: Sequence[Prompt]) -> Iterator[Record]:
        """As `Attack`: a record of kind "search" per suffix, then replies to prompts with it."""
        with progress.part(0.0, 0.95):
            records, _, found = self.prepare(engine, prompts)
        yield from records
        chat, marks = Chat(engine.tokenizer, self), self.marks(prompts)
        asks = [
            Ask(p, ids, marks.get(p.id, {}), n, error=why if p.suffix else "no suffix was found")
            for p, ids, why in begun(chat, found)
            for n in range(self.samples)
        ]
        with progress.part(0.95, 1.0):
            made = list(replies(self.name, self, chat, engine, asks))
        yield from made

    def marks(self, prompts: Sequence[Prompt]) -> dict[str, dict[str, Any]]:
        """By prompt, what the cells of its replies say of the search."""
        return {}

    def prepare(
        self, engine: Any, prompts: Sequence[Prompt]
    ) -> tuple[list[Record], Any, list[Prompt]]:
        """As `Prepares`."""
        if not hasattr(engine, "model"):
            raise ValueError(f"engine: {self.name} needs a local model, got a server")
        records, found = [], []
        for n, prompt in enumerate(prompts):
            try:
                within = progress.part(n / len(prompts), (n + 1) / len(prompts))
                with within, searching(engine.model) as model:
                    records.append(self._searched(model, engine.tokenizer, [prompt]))
                found.append(replace(prompt, suffix=records[-1].text["suffix"]))
            except ValueError as error:
                records.append(Record("search", self.name, {}, prompt.id, error=str(error)))
                found.append(prompt)
        return records, engine, found

    def _searched(self, model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> Record:
        raise NotImplementedError

    def target_ids(self, chat: Chat, prompt: Prompt) -> Ids:
        """What is to become likely behind the prompt."""
        return chat.answer_ids(prompt, prompt.target or self.target)

    def _seed(self, prompts: Sequence[Prompt]) -> int:
        return derived_seed(self.seed, self.name, [p.id for p in prompts])

    def _state_file(self, prompts: Sequence[Prompt], *details: Any) -> Path | None:
        if not self.state:
            return None
        plain = {k: v for k, v in vars(self).items() if k not in ("state", "also", "proposal")}
        name = digest(self.name, plain, [vars(p) for p in prompts], *details)
        return Path(self.state) / f"{self.name}-{name}.pt"


class Field:
    """All places and losses of one search, for one suffix behind several prompts.

    Args:
        search: its config.
        model: as in `searching`.
        tokenizer: of the model.
        prompts: behind which the suffix stands.
        also: more models with this tokenizer, as in `searching`.
    """

    def __init__(
        self,
        search: Search,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        also: Sequence[Any] = (),
    ) -> None:
        self.seconds = 0.0
        self.chat = Chat(tokenizer, search)
        first = [replace(p, suffix=p.suffix or search.init) for p in prompts]
        self.prompts, self._model, self._models = first, model, (model, *also)
        self.targets = [search.target_ids(self.chat, p) for p in first]
        self.places = [Place(self.chat, p) for p in first]
        if len({p.first for p in self.places}) > 1:
            raise ValueError("init: other token ids behind other prompts")
        pairs = zip(self.places, self.targets, strict=True)
        whole = max(len(p.before) + len(p.first) + len(p.after) + len(t) for p, t in pairs)
        for m in self._models:
            room = getattr(m.config, "max_position_embeddings", None) or whole
            if whole > room:
                raise ValueError(
                    f"{whole} tokens with the target do not fit into a context of {room}"
                )
        self.losses = [
            [TargetLoss(m, p.before, p.after, t, search.batch) for m in (model, *also)]
            for p, t in zip(self.places, self.targets, strict=True)
        ]  # by prompt
        self.init = first[0].suffix
        self.first = torch.tensor(self.places[0].first, device=model.device)
        vocab = model.get_input_embeddings().weight.shape[0]
        self.allowed = allowed_ids(
            tokenizer, vocab, ascii_only=search.ascii_only, device=model.device
        )

    def survivors(self, candidates: list[Ids], active: int) -> tuple[list[Ids], list[str]]:
        """(ids, their text) of candidates that are the ids of their text in the first `active`
        prompts."""
        texts = [place.texts(candidates) for place in self.places[:active]]
        pairs = [
            (ids, row[0])
            for ids, row in zip(candidates, zip(*texts, strict=True), strict=True)
            if row[0] is not None and all(t == row[0] for t in row)
        ]
        return [ids for ids, _ in pairs], [text for _, text in pairs]

    def of_text(self, text: str, loss: float, active: int) -> float:
        """Loss of a suffix as text: rendered, encoded and run anew. Raises if it is another."""
        found = []
        for prompt, target in zip(self.prompts[:active], self.targets, strict=False):
            ids = self.chat.ids(replace(prompt, suffix=text))
            found += [plain_loss(m, ids, target) for m in self._models]
        mean = sum(found) / len(found)
        if not abs(mean - loss) <= VERIFIED * max(1.0, abs(loss)):
            raise ValueError(f"the suffix as text has loss {mean:.4f}, in the search {loss:.4f}")
        return mean

    def spent(self, generator: torch.Generator) -> dict[str, Any]:
        """For the state of a search: what was drawn, computed and taken so far."""
        return {"rng": generator.get_state(), "tokens": self.tokens, "seconds": self.seconds}

    def restore(self, state: Mapping[str, Any], generator: torch.Generator) -> None:
        """Go on behind what `spent` told."""
        generator.set_state(state["rng"])
        self.tokens, self.seconds = state["tokens"], state.get("seconds", self.seconds)

    @property
    def tokens(self) -> list[list[int]]:
        """What each loss has computed so far (`TargetLoss.tokens`); part of a search's state."""
        return [list(loss.tokens) for group in self.losses for loss in group]

    @tokens.setter
    def tokens(self, counts: Sequence[Sequence[int]]) -> None:
        losses = [loss for group in self.losses for loss in group]
        for loss, count in zip(losses, counts, strict=True):
            loss.tokens = list(count)

    @property
    def seconds(self) -> float:
        """That the search has taken so far, before it was stopped too; part of its state."""
        return time.monotonic() - self._begun

    @seconds.setter
    def seconds(self, before: float) -> None:
        self._begun = time.monotonic() - before

    def flops(self) -> int:
        """About 2 per parameter and token forward, 6 with the backward (arXiv 2001.08361)."""
        embed = self._model.get_input_embeddings().weight
        size = sum(p.numel() for p in self._model.parameters()) - embed.numel()
        return sum(size * (2 * forward + 6 * both) for forward, both in self.tokens)


@contextlib.contextmanager
def searching(model: Any) -> Iterator[Any]:
    """`model` in eval mode, attached, without gradients of its parameters; then as it was."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    with kept_modes(model), hf.attached(model):
        try:
            model.eval().requires_grad_(False)
            yield model
        finally:
            for p, flag in wanted:
                p.requires_grad_(flag)


def saved(path: Path | None, state: dict[str, Any]) -> None:
    """Write a state, the whole of it or nothing; readable by its owner alone."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        torch.save(state, file)
    os.replace(part, path)


def loaded(path: Path | None) -> dict[str, Any] | None:
    """A state that `saved` wrote, if there is one."""
    if path is None or not path.is_file():
        return None
    return torch.load(path, map_location="cpu", weights_only=True)


def rows(candidates: Sequence[Ids], device: Any) -> Tensor:
    """[B, S] int64."""
    return torch.tensor([list(c) for c in candidates], device=device)
