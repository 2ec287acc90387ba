"""What goes into an engine and comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; nothing is taken from a checkpoint's generation config.

    Args:
        temperature: divides the logits; 0 takes the most probable token.
        top_k: keeps so many of the most probable tokens, 0 all. Comes before top_p.
        top_p: keeps the smallest set of the most probable tokens with at least this share.
        max_new_tokens: of one reply, at most.

    Raises:
        ValueError: naming the argument.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a number >= 0, got {self.temperature!r}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k: expected an int >= 0, got {self.top_k!r}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p!r}")
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected an int >= 1, got {self.max_new_tokens!r}")


@dataclass(frozen=True)
class Request:
    """One reply that is wanted.

    Attributes:
        prompt: ids of everything that comes before, special tokens included; at least one.
        sampling: how to choose tokens.
        seed: the reply's own random numbers; nothing else decides them.
        messages: the conversation that `prompt` renders, for a server that takes no ids; its last
            turn may be the assistant's, which is then continued.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    seed: int = 0
    messages: tuple[dict[str, str], ...] | None = None


@dataclass(frozen=True)
class Reply:
    """What followed the prompt, or why nothing did.

    Attributes:
        ids: new ids, with the end mark where it came; empty from a server that gives none.
        logps: log-prob of each id in nats, under the model itself (temperature 1, all tokens);
            empty where unknown.
        text: the ids without special tokens, as text.
        finish: "stop" at an end mark, "length" at the most tokens or a full context, "error".
        error: what went wrong; never a server's words, which may repeat the prompt.
        again: whether it may go well later: the server was busy, broken or gone.
        detail: the server's words.
    """

    ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()
    text: str = ""
    finish: str = "stop"
    error: str | None = None
    again: bool = False
    detail: str = ""


class Engine(Protocol):
    """A model that replies. `mode` goes into every result: "exact", "fast" or "server"."""

    tokenizer: Any
    mode: str

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request, in order. What fails alone is a Reply with an error."""
        ...

    def score(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Log-prob in nats of each id of each target, behind its prompt."""
        ...

    def about(self) -> dict[str, Any]:
        """Plain values for a manifest: which model, which mode."""
        ...
