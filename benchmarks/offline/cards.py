"""What is known of each GPU that predictions and limits are about."""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """name: a part of what torch calls it. flops: bf16 operations per second of large products.
    copy: bytes per second read + written by a device-to-device copy. 0: not known.
    """

    name: str
    flops: float
    copy: float


# H100: Liger's rate for the products of 8192 x 4096 x 128256 (its #1400), and 90 % of 3.35 TB/s, as
# QuACK's row kernels reach. H200: 25.8 TFLOP in 35 ms (Liger #1472), and what a copy through torch
# was measured at, 2026-10.
CARDS = {"H100": Card("H100 80GB HBM3", 700e12, 3.0e12), "H200": Card("H200", 736e12, 4.3e12)}


def card_of(gpu: str, copy: float) -> Card:
    """The card by its name as torch gives it; one that is not in CARDS by the `copy` measured."""
    known = (card for card in CARDS.values() if card.name in gpu)
    return next(known, Card(gpu or "unknown card", 0.0, copy))
