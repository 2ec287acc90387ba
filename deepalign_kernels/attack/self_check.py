"""How many replies of a run depend on what else is in their batch: mode "fast" against "exact"."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from deepalign_kernels.attack.attack import Attack
from deepalign_kernels.attack.suite import units
from deepalign_kernels.data.prompts import Prompt
from deepalign_kernels.generate.engine import Reply, Request


class _Asked:
    """In the place of an engine: keeps what it is asked, and says nothing."""

    def __init__(self, engine: Any) -> None:
        self.tokenizer, self.mode, self.requests = engine.tokenizer, engine.mode, []

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        self.requests += requests
        return [Reply() for _ in requests]


def self_check(
    engine: Any,
    attacks: Mapping[str, Attack],
    prompts: Sequence[Prompt],
    n: int,
    *,
    chunk: int = 8,
    seed: int = 0,
) -> dict[str, int]:
    """The engine's own check on n random requests of a run, in the batches that they have there.

    Random units are asked in mode "fast" until they hold n requests, n of which are asked again in
    mode "exact". Searches and trainings are left out: their replies take hours.

    Args:
        engine: local.
        attacks: of the run, by name.
        prompts: of the run.
        n: replies that are compared, or all there are.
        chunk: of the run.
        seed: of the draw.

    Returns:
        "asked": n; "rows" that were compared; how many of these are "different".

    Raises:
        ValueError: a server; no attack but searches and trainings.
    """
    if not hasattr(engine, "self_check"):
        raise ValueError("self_check: a server has no mode exact; give a local model")
    simple = {name: attack for name, attack in attacks.items() if not attack.local}
    if not simple:
        raise ValueError(f"self_check: {', '.join(attacks)}: searches and trainings alone")
    asked, rng = _Asked(engine), random.Random(seed)
    todo, drawn = units(asked, simple, prompts, chunk), []
    rng.shuffle(todo)
    for unit in todo:
        asked.requests = []
        list(unit.make())
        drawn.append(asked.requests)
        if sum(map(len, drawn)) >= n:
            break
    places = [(u, row) for u, requests in enumerate(drawn) for row in range(len(requests))]
    chosen = rng.sample(places, min(n, len(places)))
    total = Counter(rows=0, different=0)
    for u, requests in enumerate(drawn):
        total.update(engine.self_check(requests, sorted(row for v, row in chosen if v == u)))
    return {"asked": n, **total}
