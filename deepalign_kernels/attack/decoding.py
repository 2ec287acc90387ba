"""The decoding-parameter exploit (arXiv 2310.06987; the paper's section 3): 49 ways to sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from deepalign_kernels.attack.attack import Asking
from deepalign_kernels.attack.chat import Ask, Chat, begun, replies
from deepalign_kernels.data.prompts import Prompt
from deepalign_kernels.generate.engine import Engine, Sampling
from deepalign_kernels.runs.record import Record

TWENTY = tuple(round(0.05 * n, 2) for n in range(1, 21))


@dataclass(frozen=True, kw_only=True)
class Decoding(Asking):
    """One reply per prompt under each of 20 temperatures, 9 top-k and 20 top-p values.

    While one is swept the others are pinned, whatever the checkpoint's generation config says:
    top_k = 0, top_p = 1 and temperature 1. `temperature`, `top_k` and `top_p` of Asking are unused.
    Two ways to count success, in `runs.table`: `union` over all settings, and `picked`, where a
    scorer picks the worst reply and a judge decides on it alone (the paper's).

    Args:
        temperatures: swept.
        top_ks: swept.
        top_ps: swept.
    """

    temperatures: tuple[float, ...] = TWENTY
    top_ks: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100, 200, 500)
    top_ps: tuple[float, ...] = TWENTY

    name: ClassVar[str] = "decoding"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.grid():
            raise ValueError("temperatures, top_ks, top_ps: all empty")

    def grid(self) -> list[tuple[dict[str, Any], Sampling]]:
        """(cell, how to sample) of every setting."""
        n = self.max_new_tokens
        return [
            *(({"temperature": t}, Sampling(t, 0, 1.0, n)) for t in self.temperatures),
            *(({"top_k": k}, Sampling(1.0, k, 1.0, n)) for k in self.top_ks),
            *(({"top_p": p}, Sampling(1.0, 0, p, n)) for p in self.top_ps),
        ]

    def __call__(self, engine: Engine, prompts: Sequence[Prompt]) -> Iterator[Record]:
        """As `Attack`; the cell has the parameter that is swept."""
        chat = Chat(engine.tokenizer, self)
        asks = [
            Ask(p, ids, cell, n, sampling=sampling, error=why)
            for p, ids, why in begun(chat, prompts)
            for cell, sampling in self.grid()
            for n in range(self.samples)
        ]
        return replies(self.name, self, chat, engine, asks)
