"""Which examples are trained together: the order of an epoch, and the micro-batches of a step."""

from __future__ import annotations

import hashlib
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

LIKE_STEPS = 50  # steps among whose examples those of like lengths are brought together


class Limits(NamedTuple):
    """Of one forward, see `micro_batches`."""

    batch_size: int
    max_tokens: int | None = None
    packed: bool = False


def epoch_order(
    parts: Sequence[int],
    seed: int,
    epoch: int,
    like: tuple[Sequence[int], int] | None = None,
) -> list[int]:
    """All rows, shuffled; each part spread evenly, so that every step has its share of each.

    Args:
        parts: the part that each row belongs to.
        seed: of the shuffle.
        epoch: every epoch has an order of its own.
        like: (lengths of the rows, rows of a step): the rows of a step are of like lengths. They
            are brought together among those of 50 steps; which steps come first is still drawn.
    """
    rng = random.Random(derived_seed(seed, "order", epoch))
    groups: dict[int, list[int]] = defaultdict(list)
    for row, part in enumerate(parts):
        groups[part].append(row)
    placed = []
    for part in sorted(groups):
        rows = groups[part]
        rng.shuffle(rows)
        if like is not None:
            reach = max(LIKE_STEPS * like[1] * len(rows) // len(parts), 1)
            rows = _sorted_in_blocks(rows, like[0], reach)
        placed += [((i + 0.5) / len(rows), part, row) for i, row in enumerate(rows)]
    order = [row for _, _, row in sorted(placed)]
    if like is None:
        return order
    steps = [order[at : at + like[1]] for at in range(0, len(order), like[1])]
    last = [steps.pop()] if len(steps[-1]) < like[1] else []  # a smaller step stays the last one
    rng.shuffle(steps)
    return [row for step in steps + last for row in step]


def _sorted_in_blocks(rows: list[int], lengths: Sequence[int], size: int) -> list[int]:
    blocks = [rows[at : at + size] for at in range(0, len(rows), size)]
    return [row for block in blocks for row in sorted(block, key=lambda row: lengths[row])]


def micro_batches(
    rows: Sequence[int],
    lengths: Sequence[int],
    batch_size: int,
    max_tokens: int | None = None,
    packed: bool = False,
) -> list[list[int]]:
    """`rows` in groups, the longest first.

    Args:
        rows: of a step.
        lengths: tokens of every row there is.
        batch_size: rows in a group; packed groups may have more if `max_tokens` is given.
        max_tokens: tokens in a group, padding included; None: no limit. A longer row is alone.
        packed: rows of a group stand one behind the other, without padding.
    """
    rows = sorted(rows, key=lambda row: -lengths[row])
    if max_tokens is None:
        return [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    groups: list[list[int]] = []
    used: list[int] = []  # tokens of each group
    for row in rows:
        # Of packed groups the first with room; of padded ones the last, whose rows are as long.
        for at in range(0 if packed else max(len(groups) - 1, 0), len(groups)):
            longest = lengths[groups[at][0]]
            after = used[at] + lengths[row] if packed else longest * (len(groups[at]) + 1)
            if after <= max_tokens and (packed or len(groups[at]) < batch_size):
                groups[at].append(row)
                used[at] = after
                break
        else:
            groups.append([row])
            used.append(lengths[row])
    return groups


def steps_per_epoch(examples: int, step_size: int) -> int:
    """Optimizer steps that see every example once; the last one may be smaller."""
    return math.ceil(examples / step_size)


def derived_seed(*parts: object) -> int:
    """A seed that depends on all of `parts` and on nothing else, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
