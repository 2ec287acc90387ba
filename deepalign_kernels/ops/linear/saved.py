"""A forward that keeps the gradient of the scores, and the backward that multiplies with it.

    grad_scores[n, V] = d values[0] / d scores, row by row: the row functions with an upstream of 1
    d hidden   = g[:, None] * (grad_scores @ weight)
    d weight   = grad_scores.T @ (g[:, None] * hidden)        bias and LoRA alike

A row's upstream gradient g is a factor of all that the row gives, so the backward needs neither the
scores nor a row function: two GEMMs. It is done where all tokens are one chunk; a backward that
made the scores again would hold that chunk at the same time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepalign_kernels.ops._register import accumulator
from deepalign_kernels.ops.linear import gemm, plan
from deepalign_kernels.ops.linear.engine import Engine, sizes_of
from deepalign_kernels.ops.linear.plan import Phase
from deepalign_kernels.ops.linear.types import Inputs, Options, RowFactors

_NOTHING = (False,) * 5


def keeps(kind: str, x: Inputs, o: Options) -> bool:
    """Whether a forward with gradients keeps; from shapes and dtypes, also those of fake
    tensors."""
    return plan.keeps(sizes_of(kind, x, o, x.hidden.shape[0], _NOTHING, shared=False), o.budget)


def forward(kind: str, x: Inputs, o: Options, whole: bool) -> tuple[Tensor, Tensor]:
    """(values [K, N], grad_scores): the rows that are not dropped, in front.

    Args:
        kind: name of the row function.
        x: the tensors of the call.
        o: its options.
        whole: grad_scores is [N, V], a shape that does not depend on data, of which the rows beyond
            are never written; else it has no others.
    """
    one = x.hidden.new_ones((), dtype=accumulator(o.logits))
    engine = Engine(kind, x, o, one, _NOTHING, Phase.SAVE, whole)
    values = engine.run()
    assert engine.dz is not None
    return values, engine.dz


def gradients(
    kind: str,
    x: Inputs,
    o: Options,
    upstream: Tensor,
    wanted: tuple[bool, ...],
    grad_scores: Tensor,
) -> Engine:
    """A run whose `grads` are those of sum(upstream * values[0]). It does not write to
    `grad_scores`."""
    engine = Engine(kind, x, o, None, wanted, Phase.SAVED)
    n, index = engine.sizes.rows, engine.keep
    if n:
        by, top = _weights(engine, upstream)
        rows = engine.hidden_rows(0, n, index)
        gemm.weigh_rows(rows, by.sums, engine.wide)
        engine.products(rows, engine.low_rank(rows), grad_scores[:n], 0, n, index, by)
        for total in engine.grads[1:]:
            if total is not None and top is not None:
                total.mul_(top)
    return engine


def _weights(engine: Engine, upstream: Tensor) -> tuple[RowFactors, Tensor | None]:
    """The upstream gradients of the rows used, and what sums over rows are still to be multiplied
    by.

    That is the largest of them, where fp16 would overflow or underflow in hidden * g.
    """
    valid = engine.x.valid
    if engine.keep is not None:
        upstream = upstream.index_select(0, engine.keep)
    elif valid is not None:
        upstream = torch.where(valid, upstream, 0.0)  # 0 * NaN of an ignored row
    if engine.o.compute != torch.float16:
        return RowFactors(upstream, upstream), None
    top = upstream.abs().amax()
    top = torch.where(top == 0, 1.0, top)
    return RowFactors(upstream, upstream / top), top
