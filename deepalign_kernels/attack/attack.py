"""What an attack is: a frozen config that is called with an engine and prompts, and yields records.

    records = list(Prefill(depths=(5, 10))(engine, prompts))

An attack leaves model, tokenizer, random state and flags as it found them, knows nothing of files,
resume, progress or judges, and gives the same records for the same engine, prompts and config. What
fails for one prompt is a record with an error; the others go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from deepalign_kernels import check
from deepalign_kernels.data.prompts import Prompt
from deepalign_kernels.generate.engine import Engine, Sampling
from deepalign_kernels.runs.record import Record


class Attack(Protocol):
    """Anything that has these; the classes of this room do."""

    name: ClassVar[str]  # of its records
    together: ClassVar[bool]  # whether it needs all prompts in one call
    local: ClassVar[bool]  # whether it needs the model itself; a server is not enough
    continues: ClassVar[bool]  # whether replies have to go on behind a given beginning

    def __call__(self, engine: Engine, prompts: Sequence[Prompt]) -> Iterator[Record]:
        """Records of kind "sample", and of other kinds between them, prompt by prompt."""
        ...


class Prepares(Attack, Protocol):
    """An attack that another one can follow (`Compose`)."""

    def prepare(
        self, engine: Any, prompts: Sequence[Prompt]
    ) -> tuple[list[Record], Any, list[Prompt]]:
        """(records of the search, engine to go on with, prompts to go on with)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What all attacks share. Defaults are the paper's (appendix B): no system prompt, temperature
    0.9, top-p 0.6.

    Args:
        system: the system turn; None sends none, which is not the same as an empty one.
        chat: "template" renders through the tokenizer's chat template; "plain" gives the text and
            two line ends, for base models.
        wrap: what the user says, with {prompt} in the place of prompt and suffix: a template of an
            attack, or the words that a fine-tuned identity listens to.
        samples: replies per prompt and setting, each with a seed of its own.
        seed: of the run.
        temperature: of replies; 0 is greedy.
        top_k: of replies, 0: all.
        top_p: of replies.
        max_new_tokens: of replies.
    """

    system: str | None = None
    chat: str = "template"
    wrap: str = "{prompt}"
    samples: int = 1
    seed: int = 0
    temperature: float = 0.9
    top_k: int = 0
    top_p: float = 0.6
    max_new_tokens: int = 512

    together: ClassVar[bool] = False
    local: ClassVar[bool] = False
    continues: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check.one_of("chat", self.chat, ("template", "plain"))
        if self.wrap.count("{prompt}") != 1:
            raise ValueError(f"wrap: expected {{prompt}} once in it, got {self.wrap!r}")
        check.count("samples", self.samples, 1)
        check.count("seed", self.seed, 0)
        _ = self.sampling

    @property
    def sampling(self) -> Sampling:
        """Of replies."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.max_new_tokens)
