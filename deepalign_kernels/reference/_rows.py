"""What one row of logits means, shared by every specification in this folder.

Shapes used throughout: logits [B, T, V] with last stride 1; N = B * T rows; vectors are [N].

Score of column v:   z_v = softcap * tanh(x_v / softcap) / temperature   (no cap if softcap is 0)
Normaliser of a row: (m, s) with m = max_v z_v (0 where the row is all -inf) and
                     s = log sum_v exp(z_v - m).  log softmax(z)_v = (z_v - m) - s.
It is kept as a pair [N, 2] because m + s in one fp32 loses 6e-5 where |z| is 1e3.
A masked column (x = -inf) stays outside the distribution as long as softcap is off; with a softcap
the formula above makes it z = -softcap / temperature, so mask after capping.
Gradients are written to `out` [B, T, V], whose last stride is 1; it may be the policy's own logits
(the linear ops overwrite a chunk of logits with its gradient), and it may be bf16 or fp16 for fp32
logits, and on the CPU fp32 for 16-bit ones.
token_kl's may also be the reference's: a kernel reads a column of both before it writes it.
Accumulation dtype: fp32 for bf16, fp16 and fp32 logits, fp64 for fp64 (gradcheck).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """[B, T, V] -> [N, V] in the accumulation dtype."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.dtype == torch.float64 else x.float()


def scores(x: Tensor, temperature: float, softcap: float) -> Tensor:
    z = rows(x)
    if softcap > 0:
        z = softcap * torch.tanh(z / softcap)
    return z if temperature == 1.0 else z / temperature


def score_slope(x: Tensor, temperature: float, softcap: float) -> Tensor | float:
    """dz/dx, to be multiplied into the gradient with respect to z."""
    if softcap <= 0:
        return 1.0 / temperature
    return (1.0 - torch.tanh(rows(x) / softcap).square()) / temperature


def normaliser(z: Tensor) -> Tensor:
    m = z.amax(-1, keepdim=True)
    m = torch.where(m == -torch.inf, 0.0, m)
    s = (z - m).exp().sum(-1, keepdim=True).log()
    return torch.cat([m, s], -1)


def log_probs(z: Tensor, norm: Tensor) -> Tensor:
    return (z - norm[:, :1]) - norm[:, 1:]


def masked(valid: Tensor | None, *vectors: Tensor) -> tuple[Tensor, ...]:
    """Rows that are not valid give exactly 0, whatever their logits held."""
    if valid is None:
        return vectors
    keep = (valid.view(-1, *[1] * (v.dim() - 1)) for v in vectors)
    return tuple(torch.where(k, v, torch.zeros_like(v)) for k, v in zip(keep, vectors, strict=True))
