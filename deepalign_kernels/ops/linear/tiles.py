"""The backward of rows whose normalisers are known (`Inputs.state`), over tiles of the vocabulary.

The gradient of any columns can then be made by itself. For the columns a..b of the head:

    scores           = hidden @ weight[a:b].T      all rows
    dz               = d sum(upstream * values) / d scores
    d weight[a:b]    = dz.T @ hidden               written once, in its own dtype
    d hidden        += dz @ weight[a:b]            fp32

Over chunks of tokens it is the other way round, and the gradient of the head, 2.1 GB in fp32 at
V = 128256 and H = 4096, is what has to be summed; that of hidden is V / N times smaller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepalign_kernels.ops._register import accumulator
from deepalign_kernels.ops.linear import gemm, plan
from deepalign_kernels.ops.linear.engine import Engine, picker, sizes_of
from deepalign_kernels.ops.linear.plan import Phase, Sizes
from deepalign_kernels.ops.linear.types import Inputs, Options, Trained
from deepalign_kernels.ops.shard.group import ELSEWHERE, IGNORED


def takes(kind: str, x: Inputs, o: Options, wanted: tuple[bool, ...]) -> bool:
    """Whether the backward of row function `kind` goes over the vocabulary; from shapes and dtypes
    alone."""
    sizes = sizes_of(kind, x, o, x.hidden.shape[0], wanted, shared=False)
    return plan.by_tiles(sizes, o.budget)


class TileEngine(Engine):
    """One backward. Heads, workspace and scores are those of `Engine`, of one tile at a time."""

    def __init__(
        self, kind: str, x: Inputs, o: Options, upstream: Tensor, wanted: tuple[bool, ...]
    ) -> None:
        super().__init__(kind, x, o, upstream, wanted, Phase.TILES)

    def _sized(self, s: Sizes) -> Sizes:
        return s._replace(vocab=plan.tile_columns(s, self.o.budget))

    def backward(self) -> None:
        """Leaves the gradients in `self.grads`."""
        n, given, keep = self.sizes.rows, self.x, self.keep
        if not n:
            return
        rows = self.hidden_rows(0, n, keep)
        low = self.low_rank(rows)
        self._move_rows(n)
        whole = self.x, self.weight, self.lora_b, self.bias, self.ref_weight, self.ref_bias
        memory = self.scores, self.dz
        totals = self._totals(low)
        vocab, columns = len(self.weight), self.sizes.vocab
        for a in range(0, vocab, columns):
            self._cut(whole, memory, a, min(a + columns, vocab))
            self._chunk(0, n, rows, low, slice(0, n))
            self._tile_products(totals, rows, low, a)
        _, self.weight, self.lora_b, self.bias, self.ref_weight, self.ref_bias = whole
        self.x, self.keep = given, keep
        del memory
        self.scores = self.dz = None
        self.grads = self._finished(totals, rows)

    def _move_rows(self, n: int) -> None:
        """Everything by row, moved and converted once and not for every tile."""
        x, index = self.x, self.keep
        pick, ref = picker(0, n, index), x.ref_hidden
        if ref is not None:
            ref = self._take(ref, 0, n, index, self.ref_rows)
        self.x = x._replace(
            target=pick(x.target),
            valid=x.valid if index is None else None,
            state=pick(x.state),
            ref_hidden=ref,
        )
        self.upstream, self.keep, self.ref_rows = pick(self.upstream), None, None

    def _cut(self, whole: tuple, memory: tuple, a: int, b: int) -> None:
        """Columns a..b of all that has columns."""
        x, weight, *heads = whole
        target = x.target
        if target is not None:
            here = torch.where((target >= a) & (target < b), target - a, ELSEWHERE)
            target = torch.where(target == IGNORED, IGNORED, here)
        self.x = x._replace(target=target)
        self.weight = weight[a:b]
        self.lora_b, self.bias, self.ref_weight, self.ref_bias = (
            None if h is None else h[a:b] for h in heads
        )
        self.scores, self.dz = (m.view(-1)[: len(m) * (b - a)].view(len(m), b - a) for m in memory)

    def _totals(self, low: Tensor | None) -> Trained:
        """Memory for the gradients, by rows used: of hidden, and with it of `low` in the place of
        lora_a's, summed over the tiles; of the rest written tile by tile."""
        s, x = self.sizes, self.x
        wide = accumulator(s.compute)
        hidden, weight, bias, lora_a, lora_b = s.wanted
        both = low is not None and (hidden or lora_a)
        assert not (bias and x.bias is None) and not (lora_b and x.lora_b is None)
        return Trained(
            self._new(s.rows, s.hidden, dtype=wide) if hidden else None,
            self._new(*x.weight.shape, dtype=s.weight_dtype) if weight else None,
            self._new(len(x.weight), dtype=wide) if bias else None,
            self._new(s.rows, s.rank, dtype=wide) if both else None,
            self._new(len(x.weight), s.rank, dtype=wide) if lora_b else None,
        )

    def _tile_products(self, g: Trained, rows: Tensor, low: Tensor | None, a: int) -> None:
        assert self.dz is not None
        dz, scratch = self.dz[: len(rows)], self.scratch  # behind it: the reference's scores
        b, first = a + dz.shape[1], a == 0
        if g.weight is not None:
            gemm.head_gradient_add(g.weight[a:b], dz, rows, scratch, first=True)
        if g.bias is not None:
            ones = dz.new_ones((len(dz), 1))
            gemm.head_gradient_add(g.bias[a:b, None], dz, ones, scratch, first=True)
        if g.lora_b is not None and low is not None:
            gemm.head_gradient_add(g.lora_b[a:b], dz, low, scratch, first=True)
        if g.hidden is not None:
            gemm.head_gradient_add(g.hidden, dz.t(), self.weight, scratch, first=first)
        if g.lora_a is not None and self.lora_b is not None:
            gemm.head_gradient_add(g.lora_a, dz.t(), self.lora_b, scratch, first=first)

    def _finished(self, g: Trained, rows: Tensor) -> Trained:
        """The gradients themselves, from what `_totals` made room for."""
        hidden, lora_a = g.hidden, None
        if g.lora_a is not None and self.lora_a is not None:
            dlow = g.lora_a.mul_(self.o.lora_scale).to(self.o.compute)
            if self.sizes.wanted[3]:
                lora_a = self._new(*self.lora_a.shape, dtype=g.lora_a.dtype)
                gemm.head_gradient_add(lora_a, dlow, rows, self.scratch, first=True)
            if hidden is not None:
                gemm.head_gradient_add(hidden, dlow.t(), self.lora_a, self.scratch, first=False)
        if hidden is not None:
            hidden = hidden.to(self.x.hidden.dtype)
            if self.keep is not None:
                hidden = torch.zeros_like(self.x.hidden).index_copy_(0, self.keep, hidden)
        return g._replace(hidden=hidden, lora_a=lora_a)
