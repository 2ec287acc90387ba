"""Attacks, to measure how deep a model's safety goes (defensive evaluation; arXiv 2406.05946).

    attack      what an attack is, and what all share
    prefill     tokens put into the model's mouth: of an answer, fixed, inserted, rank-assisted
    decoding    49 ways to sample
    gcg         a suffix by gradient and trial; random_search: without gradient
    compose     two attacks in a row
    suite       attacks on prompts into a run, judges over its replies

No harmful prompt, target or text ships with the project; users bring their own sets.
"""

from deepalign_kernels.attack.attack import Asking, Attack
from deepalign_kernels.attack.compose import Compose
from deepalign_kernels.attack.decoding import Decoding
from deepalign_kernels.attack.gcg import GCG
from deepalign_kernels.attack.prefill import Direct, Insertion, Prefill, RankAssisted
from deepalign_kernels.attack.random_search import RandomSearch

__all__ = [
    "GCG",
    "Asking",
    "Attack",
    "Compose",
    "Decoding",
    "Direct",
    "Insertion",
    "Prefill",
    "RandomSearch",
    "RankAssisted",
]
