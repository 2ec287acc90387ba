"""How the curves move while a model is fine-tuned: figure 3 of arXiv 2406.05946."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import nn

from deepalign_kernels import check
from deepalign_kernels.analyze.pairs import pairs_of
from deepalign_kernels.analyze.profile import WORKSPACE, Profile, profile_of
from deepalign_kernels.analyze.states import collect
from deepalign_kernels.runs import Record, Run

CURVES = ("nll", "kl_model_base", "head_grad")


class Dynamics:
    """A callback that records, every few steps, cross-entropy, KL to the model before training and
    the head's gradient norm by position on a few fixed answers.

        watch = Dynamics(model, tokenizer, probe, every=5, folder="out/dynamics")
        fit(model, tokenizer, config, data, callbacks=[watch])  # the thin loop
        Trainer(..., callbacks=[watch.for_trainer()])           # Hugging Face and TRL

    The weights, the random state and the modes of modules stay as they are, so a run comes out bit
    for bit as without it.

    Args:
        model: as it is before training; its hidden states are kept, not its weights.
        tokenizer: as in `pairs_of`.
        probe: what `pairs_of` takes; some 16 to 100 answers.
        every: training steps between two looks, >= 1.
        positions: of each answer, at most.
        share: of the time since the beginning that looks may take, at most; one that would take
            more is left for a later step. None: no limit.
        folder: of the run in which records are kept for a report; None: in `records` alone.
        title: of the model in figures.
        max_tokens: with padding, in a batch.

    Attributes:
        records: of kind "profile", one a look, the first of step 0. Values are means by position.
        spent: seconds in looks since the first.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        probe: Any,
        *,
        every: int = 10,
        positions: int = 20,
        share: float | None = 0.05,
        folder: str | Path | None = None,
        title: str = "training",
        max_tokens: int = 8192,
    ) -> None:
        check.count("every", every, 1)
        self.every, self.max_tokens = every, max_tokens
        self.share = None if share is None else check.number("share", share, above=0.0)
        self.pairs = pairs_of(tokenizer, probe, positions)
        about = {
            "about": "dynamics",
            "title": title,
            "answers": [list(p.answer) for p in self.pairs],
        }
        self._run = None if folder is None else Run(folder, about)
        self.records: list[Record] = []
        self.spent, self._last, self._due = 0.0, 0.0, every
        self._before = collect(model, self.pairs, max_tokens=max_tokens)
        head = self._before.head  # of a trained model it moves
        bias = None if head.bias is None else head.bias.clone()
        self._before = type(self._before)(
            self._before.hidden, type(head)(head.weight.clone(), bias, *_form(head))
        )
        self._begun = time.perf_counter()
        self.look(model, 0)
        self._last = self.spent
        self.begin()

    def begin(self) -> None:
        """Training begins now: `share` is of the time from here on."""
        self.spent, self._begun = 0.0, time.perf_counter()

    def __call__(self, run: Any, record: dict[str, Any]) -> None:
        """What the thin loop calls with every line of its log."""
        self.step(run.model, int(record["step"]))

    def step(self, model: nn.Module, number: int) -> None:
        """Step `number` is done: look if it is time."""
        if number < self._due:
            return
        elapsed = time.perf_counter() - self._begun
        if self.share is None or self.spent + self._last <= self.share * elapsed:
            self._due = number - number % self.every + self.every
            self.look(model, number)

    def look(self, model: nn.Module, number: int) -> Profile:
        """Record the curves now."""
        begun = time.perf_counter()
        now = collect(model, self.pairs, max_tokens=self.max_tokens)
        found = profile_of(now, self._before, self.pairs, max_workspace_bytes=WORKSPACE)
        values = {name: found.curve(name, resamples=1).mean.tolist() for name in CURVES}
        data = {"values": values, "count": len(self.pairs)}
        self.records.append(Record("profile", "dynamics", {"step": number}, data=data))
        if self._run is not None and f"{number}" not in self._run.records.units:
            self._run.records.commit(f"{number}", self.records[-1:])
        self._last = time.perf_counter() - begun
        self.spent += self._last
        return found

    def for_trainer(self) -> Any:
        """The same as a `transformers.TrainerCallback`, for trl's trainers too; in a run of several
        processes give it to the first one alone (`args.process_index == 0`), and only where that
        has the whole model."""
        from transformers import TrainerCallback

        watch = self

        class Callback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                watch.begin()

            def on_step_end(
                self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
            ) -> None:
                watch.step(model, state.global_step)

        return Callback()


def _form(head: Any) -> tuple[float | None, float]:
    return head.softcap, head.logit_scale
