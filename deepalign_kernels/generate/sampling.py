"""The next token of every row, from settings and one random number that are the row's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deepalign_kernels.generate.engine import Request


class Picker:
    """Chooses tokens for the rows of one batch.

    Row and step decide the random number, by the request's seed; so a reply does not depend on its
    neighbours in the batch, but for the rounding of the logits.
    """

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        settings = [r.sampling for r in requests]
        self.greedy = all(s.temperature == 0 for s in settings)

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

        self._temperature = column([s.temperature for s in settings])
        self._top_k = column([s.top_k or float("inf") for s in settings])
        self._top_p = column([s.top_p for s in settings])
        steps = max(s.max_new_tokens for s in settings)
        drawn = np.zeros((steps, len(requests)))
        for row, request in enumerate(requests):
            if request.sampling.temperature > 0:
                drawn[:, row] = np.random.default_rng(request.seed).random(steps)
        self._uniform = torch.from_numpy(drawn).to(device)

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(ids [b], their log-probs [b] in nats) from logits [b, V] of the rows [b] of the batch.

        Of equal logits the first counts as the more probable. Where logits are NaN or infinite,
        the log-prob is NaN and the id means nothing.
        """
        logits = logits.float()
        total = logits.logsumexp(-1)
        logits = torch.where(total.isfinite()[:, None], logits, 0.0)
        best = logits.argmax(-1)
        ids = best if self.greedy else self._draw(logits, best, rows, step)
        logp = logits.gather(1, ids[:, None])[:, 0] - total
        return ids, torch.where(logp.isfinite(), logp, torch.nan)

    def _draw(self, logits: Tensor, best: Tensor, rows: Tensor, step: int) -> Tensor:
        temperature = self._temperature[rows]
        scaled = logits.double() / temperature.clamp(min=1e-6)  # those of 0 take `best`
        values, order = scaled.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(values.shape[-1], device=values.device)
        share = values.masked_fill(rank >= self._top_k[rows], -torch.inf).softmax(-1)
        before = share.cumsum(-1) - share
        share = share.masked_fill((before >= self._top_p[rows]) & (rank > 0), 0.0)
        filled = share.cumsum(-1)
        wanted = self._uniform[step, rows][:, None] * filled[:, -1:]
        at = torch.searchsorted(filled, wanted, right=True)
        at = torch.minimum(at, (share > 0).sum(-1, keepdim=True) - 1)
        return torch.where(temperature[:, 0] > 0, order.gather(1, at)[:, 0], best)
