"""How firmly the first token of a reply is chosen: what a constrained loss can lean on.

The constrained loss (arXiv 2406.05946, equation 3) leaves a token's gradient the weight
2 sigmoid(-beta r) once it is r nats more likely than before. An alignment in the first token falls
when another first token overtakes it, so the further that has to rise, the less is left of the
gradient by then: `runs.curves.weight_at_flip` and `slowdown` turn a margin into these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deepalign_kernels.analyze.pairs import Pair
from deepalign_kernels.analyze.profile import WORKSPACE
from deepalign_kernels.analyze.states import States


@dataclass(frozen=True)
class FirstTokens:
    """By example, [N]."""

    favourite: np.ndarray  # id of the most probable first token: of a refusal, where one is given
    odds: np.ndarray  # nats: log-odds of the favourite against the best other token, >= 0
    margin: np.ndarray  # nats: of the favourite before the given answer's first token, >= 0


@torch.no_grad()
def first_tokens(
    model: States, pairs: Sequence[Pair], *, max_workspace_bytes: int = WORKSPACE
) -> FirstTokens:
    """The first token that a model prefers, and by how much.

    Args:
        model: hidden states of `pairs` under it; see `collect`.
        pairs: see `pairs_of`: answers that the model is to decline.
        max_workspace_bytes: of scores at a time.

    Returns:
        `odds` says what the best of all other tokens has to make up, `margin` what the one does
        that the answers begin with: an attack on these answers has the latter before it.
    """
    starts = torch.tensor([0, *(len(p.answer) for p in pairs)]).cumsum(0)[:-1]
    target = torch.tensor([p.answer[0] for p in pairs])
    size = max(1, max_workspace_bytes // (8 * len(model.head.weight)))
    parts = []
    for rows, wanted in zip(starts.split(size), target.split(size), strict=True):
        scores = model.head.scores(model.hidden[rows])
        best = scores.topk(2, dim=-1)
        given = scores.gather(1, wanted.to(scores.device)[:, None])[:, 0]
        first, second = best.values.unbind(-1)
        parts.append([x.cpu().numpy() for x in (best.indices[:, 0], first - second, first - given)])
    return FirstTokens(*(np.concatenate(column) for column in zip(*parts, strict=True)))
