"""Where in the vocabulary two models differ: the terms of KL(model || base) at one position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepalign_kernels import check
from deepalign_kernels.analyze.pairs import Pair
from deepalign_kernels.analyze.profile import WORKSPACE
from deepalign_kernels.analyze.states import States


@dataclass(frozen=True)
class Terms:
    """Means over examples at one position. kl = sum(terms) + rest: exact, as terms may be negative.

    terms[j] is the mean of p(v) log(p(v) / q(v)) of token v = tokens[j], p the model, q the base.
    """

    position: int  # from 1
    examples: int
    kl: float  # nats
    tokens: list[int]  # ids, the largest term first
    terms: list[float]  # nats
    model_prob: list[float]  # mean probability of each token
    base_prob: list[float]
    rest: float  # nats, all other tokens together
    rest_model_prob: float
    rest_base_prob: float


@torch.no_grad()
def largest_terms(
    model: States,
    base: States,
    pairs: Sequence[Pair],
    *,
    positions: int = 5,
    top: int = 10,
    group: str | None = None,
    max_workspace_bytes: int = WORKSPACE,
) -> list[Terms]:
    """The tokens that carry the divergence at the first positions: what the model prefers instead.

    Args:
        model: hidden states of `pairs` under the model; see `collect`.
        base: the same under the base.
        pairs: see `pairs_of`.
        positions: at most so many, fewer where all answers are shorter.
        top: tokens shown for each.
        group: of examples; None: all.
        max_workspace_bytes: of scores at a time.

    Raises:
        ValueError: a wrong number; no example in the group.
    """
    check.count("positions", positions, 1)
    check.count("top", top, 1)
    vocab = min(len(model.head.weight), len(base.head.weight))
    top = min(top, vocab)
    starts = torch.tensor([0, *(len(p.answer) for p in pairs)]).cumsum(0)
    out = []
    for t in range(1, positions + 1):
        rows = [
            int(starts[i]) + t - 1
            for i, p in enumerate(pairs)
            if len(p.answer) >= t and group in (None, p.group)
        ]
        if not rows and t == 1:
            raise ValueError(f"group: no example in {group!r}")
        if rows:
            size = max(1, max_workspace_bytes // (32 * vocab))
            sums = sum(
                _sums(model, base, rows[a : a + size], vocab) for a in range(0, len(rows), size)
            )
            out.append(_terms(t, len(rows), sums / len(rows), top))  # type: ignore[operator]
    return out


def _sums(model: States, base: States, rows: list[int], vocab: int) -> Tensor:
    """[3, V] fp64, summed over rows: the terms, the model's probabilities, the base's."""
    logp, logq = (
        x.head.first(vocab).scores(x.hidden[rows]).log_softmax(-1).to(model.head.weight.device)
        for x in (model, base)
    )
    p = logp.exp()
    terms = torch.where(p > 0, p * (logp - logq), 0.0)
    return torch.stack([x.double().sum(0) for x in (terms, p, logq.exp())])


def _terms(position: int, examples: int, means: Tensor, top: int) -> Terms:
    best = means[0].topk(top).indices
    chosen = means[:, best]
    total, rest = means.sum(1), means.sum(1) - chosen.sum(1)
    terms, model_prob, base_prob = chosen.tolist()
    return Terms(
        position,
        examples,
        total[0].item(),
        best.tolist(),
        terms,
        model_prob,
        base_prob,
        *rest.tolist(),
    )
