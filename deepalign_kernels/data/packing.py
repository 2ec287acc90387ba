"""Which examples are trained together: the order of an epoch, and the micro-batches of a step."""

from __future__ import annotations

import hashlib
import math
import random
from collections import defaultdict
from collections.abc import Sequence


def epoch_order(parts: Sequence[int], seed: int, epoch: int) -> list[int]:
    """All rows, shuffled; each part spread evenly, so that every step has its share of each.

    `parts`: the part that each row belongs to.
    """
    rng = random.Random(derived_seed(seed, "order", epoch))
    groups: dict[int, list[int]] = defaultdict(list)
    for row, part in enumerate(parts):
        groups[part].append(row)
    placed = []
    for part in sorted(groups):
        rows = groups[part]
        rng.shuffle(rows)
        placed += [((i + 0.5) / len(rows), part, row) for i, row in enumerate(rows)]
    return [row for _, _, row in sorted(placed)]


def micro_batches(rows: Sequence[int], lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """`rows` in groups of `batch_size` and of like lengths, the longest first.

    `lengths`: tokens of every row there is.
    """
    rows = sorted(rows, key=lambda row: -lengths[row])
    return [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]


def steps_per_epoch(examples: int, step_size: int) -> int:
    """Optimizer steps that see every example once; the last one may be smaller."""
    return math.ceil(examples / step_size)


def derived_seed(*parts: object) -> int:
    """A seed that depends on all of `parts` and on nothing else, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
