"""Greedy coordinate gradient (arXiv 2307.15043): a suffix by gradient and trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from deepalign_kernels import check, progress
from deepalign_kernels.attack.search import Field, Search, loaded, rows, saved, searching
from deepalign_kernels.attack.suffix import distinct
from deepalign_kernels.data.prompts import Prompt
from deepalign_kernels.runs.record import Record

UNIVERSAL = {"universal": True}  # cell of the search
# (scores [S, V], -inf where not allowed; current ids [S]; config; generator) -> candidates [B, S]
Proposal = Callable[[Tensor, Tensor, "GCG", torch.Generator], Tensor]


def by_gradient(scores: Tensor, current: Tensor, config: GCG, generator: torch.Generator) -> Tensor:
    """`width` copies of `current`, each with `replace` random places changed to one of the `topk`
    ids of highest score there, drawn uniformly."""
    width, S = config.width, len(current)
    top = scores.topk(min(config.topk, scores.shape[1]), dim=-1).indices.cpu()
    places = torch.rand(width, S, generator=generator).argsort(-1)[:, : config.replace]
    chosen = torch.randint(top.shape[1], places.shape, generator=generator)
    out = current.cpu().repeat(width, 1)
    return out.scatter_(1, places, top[places, chosen]).to(current.device)


@dataclass(frozen=True, kw_only=True)
class GCG(Search):
    """Defaults are those of the method's paper; this paper ran 500 steps, universal, with the
    model's own system prompt, and does not state width and top-k.

    Args:
        width: candidates per step, before those are left out that no text gives.
        topk: ids per place, by gradient.
        replace: places changed in one candidate.
        momentum: of the gradient, in [0, 1); 0 is the method's.
        universal: one suffix for all prompts instead of one each.
        train: a universal suffix is searched on the first so many prompts, 0: all. Cells of
            replies say "train" or "test", which are rates of their own.
        progressive: a universal search begins with one prompt, and takes in the next when greedy
            decoding gives the target for all it has.
        early_stop: end when greedy decoding gives the target (for all prompts).
        abandon: give candidates up whose first target tokens cost too much already; changes no
            result.
        proposal: makes candidates; another function is another attack, such as Mask-GCG.
        also: more models with the same tokenizer; losses and gradients are added up.
    """

    width: int = 512
    topk: int = 256
    replace: int = 1
    momentum: float = 0.0
    universal: bool = False
    train: int = 0
    progressive: bool = True
    early_stop: bool = False
    abandon: bool = False
    proposal: Proposal = by_gradient
    also: tuple[Any, ...] = ()

    name: ClassVar[str] = "gcg"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "topk", "replace"):
            check.count(name, getattr(self, name), 1)
        check.count("train", self.train, 0)
        check.number("momentum", self.momentum, low=0.0, below=1.0)

    @property
    def together(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether all prompts are needed at once."""
        return self.universal

    def about(self) -> dict[str, Any]:
        """The config as plain values."""
        out = {k: v for k, v in vars(self).items() if k not in ("state", "proposal", "also")}
        return {"attack": self.name, **out, "proposal": self.proposal.__qualname__}

    def marks(self, prompts: Sequence[Prompt]) -> dict[str, dict[str, Any]]:
        """Of a universal suffix, whether the prompt was one of those it was searched on."""
        if not self.universal:
            return {}
        train = self.train or len(prompts)
        return {
            p.id: {"universal": "train" if at < train else "test"} for at, p in enumerate(prompts)
        }

    def prepare(
        self, engine: Any, prompts: Sequence[Prompt]
    ) -> tuple[list[Record], Any, list[Prompt]]:
        """As `Prepares`."""
        if not self.universal:
            return super().prepare(engine, prompts)
        if not hasattr(engine, "model"):
            raise ValueError("engine: gcg needs a local model, got a server")
        try:
            with searching(engine.model) as model:
                record = self._searched(model, engine.tokenizer, prompts[: self.train or None])
        except ValueError as error:
            return [Record("search", self.name, UNIVERSAL, error=str(error))], engine, [*prompts]
        return [record], engine, [replace(p, suffix=record.text["suffix"]) for p in prompts]

    def _searched(self, model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> Record:
        with ExitStack() as stack:
            also = [stack.enter_context(searching(m)) for m in self.also]
            field = Field(self, model, tokenizer, prompts, also)
            return self._run(field, prompts)

    def _run(self, field: Field, prompts: Sequence[Prompt]) -> Record:
        file = self._state_file(prompts)
        generator = torch.Generator().manual_seed(self._seed(prompts))
        state = loaded(file) or {
            "step": 0,
            "active": 1 if self.universal and self.progressive else len(prompts),
            "current": field.first.cpu(),
            "momentum": None,
            "best": {"loss": float("inf"), "ids": field.first.cpu(), "text": field.init},
            "history": [],
            "grown": [],
            "matched": False,
            **field.spent(generator),
        }
        field.restore(state, generator)
        while state["step"] < self.steps and not (state["matched"] and self.early_stop):
            self._step(field, state, generator)
            progress.told(state["step"], self.steps)
            if state["step"] % self.save_every == 0:
                saved(file, state | field.spent(generator))
        saved(file, state | field.spent(generator))
        best, active = state["best"], state["active"]
        checked = field.of_text(best["text"], best["loss"], active)
        data = {
            "loss": best["loss"],
            "loss_as_text": checked,
            "steps": state["step"],
            "matched": state["matched"],
            "prompts": active,
            "history": state["history"],
            "grown": state.get("grown", []),  # steps after which the loss is of one prompt more
            "flops": field.flops(),
        }
        item, cell = ("", UNIVERSAL) if self.universal else (prompts[0].id, {})
        text = {"suffix": best["text"]}
        return Record("search", self.name, cell, item, 0, data, text, seconds=field.seconds)

    def _step(self, field: Field, state: dict[str, Any], generator: torch.Generator) -> None:
        """One step: gradient, candidates, the best of them is the next suffix."""
        losses = [loss for group in field.losses[: state["active"]] for loss in group]
        current = state["current"].to(field.first.device)
        # Every prompt has the same say at each place, as in the method's own universal search.
        grads = torch.stack([loss.gradient(current) for loss in losses])
        grad = (grads / grads.norm(dim=-1, keepdim=True).clamp(min=1e-30)).sum(0)
        if self.momentum and state["momentum"] is not None:
            grad = grad + self.momentum * state["momentum"].to(current.device)
        state["momentum"] = grad.cpu() if self.momentum else None
        scores = (-grad).masked_fill(~field.allowed, float("-inf"))
        made = distinct(self.proposal(scores, current, self, generator), current)
        candidates, texts = field.survivors(made, state["active"])
        state["step"] += 1
        if not candidates:  # other draws come in the next step
            state["history"].append(None)
            return
        batch = rows(candidates, current.device)
        bound = float("inf") if self.abandon and len(losses) == 1 else None
        total = torch.stack([loss.losses(batch, bound) for loss in losses]).mean(0)
        at = int(total.argmin())
        found = {"loss": float(total[at]), "ids": batch[at].cpu(), "text": texts[at]}
        state["current"] = found["ids"]
        state["history"].append(found["loss"])
        looked = self.early_stop or state["active"] < len(field.losses)
        matched = looked and all(loss.matched(batch[at]) for loss in losses)
        if matched and state["active"] < len(field.losses):
            state["active"] += 1  # the loss is another one from here on
            state.setdefault("grown", []).append(state["step"])
            state["best"] = found | {"loss": self._loss_of(field, state["active"], batch[at])}
        elif found["loss"] < state["best"]["loss"] or matched:
            state["best"] = found
            state["matched"] = matched

    @staticmethod
    def _loss_of(field: Field, active: int, suffix: Tensor) -> float:
        losses = [loss for group in field.losses[:active] for loss in group]
        return float(torch.stack([loss.losses(suffix[None]) for loss in losses]).mean())
