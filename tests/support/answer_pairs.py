"""Contexts with answers, as random token ids."""

import torch

from deepalign_kernels.analyze import Pair


def draw_pairs(vocab, lengths=((5, 7), (3, 4), (9, 1), (4, 8)), seed=0):
    """One pair for each (tokens of context, tokens of answer), in the groups "odd" and "even"."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, vocab, (sum(n),), generator=generator).tolist() for n in lengths]
    names = ("odd", "even")
    return [
        Pair(tuple(x[:c]), tuple(x[c:]), names[i % 2], f"pair {i}")
        for i, (x, (c, _)) in enumerate(zip(ids, lengths, strict=True))
    ]
