"""The loop of every linear op: scores of a chunk and its row function, and for every group of
chunks the products of its gradient.

An op hands in a row function; it meets the scores of some rows, returns their values, and writes
the gradient of `upstream * value` over the policy's scores when it is given an `upstream`. Whether
that is the scale of a scalar loss, the upstream gradient of a recomputing backward or a column of
ones for a gradient by row makes no difference here. A backward that kept that gradient
(`saved.py`) has the products alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from deepalign_kernels import backends
from deepalign_kernels.ops._register import accumulator
from deepalign_kernels.ops.linear import gemm
from deepalign_kernels.ops.linear.plan import Phase, Sizes, make_plan
from deepalign_kernels.ops.linear.types import (
    KINDS,
    Inputs,
    Options,
    RowFactors,
    Rows,
    Trained,
    shares_head,
    trained,
)


def sizes_of(
    kind: str,
    x: Inputs,
    o: Options,
    rows: int,
    wanted: tuple[bool, ...] | None,
    shared: bool,
) -> Sizes:
    """`wanted`: which gradients are; None: values only. `shared`: what `shares_head` says."""
    device, ref = x.hidden.device.type, {}
    if x.ref_hidden is not None and x.ref_weight is not None:
        ref = {
            "ref_hidden": x.ref_hidden.shape[1],
            "ref_compute": o.ref_compute,
            "ref_dtypes": (x.ref_hidden.dtype, x.ref_weight.dtype),
            "shared_head": shared and o.compute == o.ref_compute,
        }
    return Sizes(
        rows=rows,
        tokens=x.hidden.shape[0],
        hidden=x.hidden.shape[1],
        vocab=x.weight.shape[0],
        device=device,
        compute=o.compute,
        logits=o.logits,
        hidden_dtype=x.hidden.dtype,
        weight_dtype=x.weight.dtype,
        accumulate=o.accumulate,
        rank=x.lora_a.shape[0] if x.lora_a is not None else 0,
        values=KINDS[kind].values,
        gradients=wanted is not None,
        wanted=wanted or (False,) * 5,
        eager_copies=eager_copies(kind, device, o.logits, wanted is not None),
        **ref,
    )


def eager_copies(kind: str, device: str, logits: torch.dtype, gradients: bool) -> float:
    eager = any(backends.runs_eagerly(op, device, logits) for op in KINDS[kind].ops)
    return KINDS[kind].eager_copies[gradients] if eager else 0.0


def total_dtypes(s: Sizes, groups: int) -> tuple[torch.dtype, ...]:
    """What the gradients of weight, bias, lora_a and lora_b are summed in.

    One group needs no accumulator beside the result; a 16-bit bias or LoRA matrix is small enough
    to have one always.
    """
    wide = accumulator(s.compute)
    weight = s.accumulate if groups > 1 else s.weight_dtype
    if torch.float16 in (s.compute, weight):  # unscaled sums leave its range
        weight = wide
    return weight, wide, wide, wide


class Engine:
    """One call: the head in its compute dtype, the workspace, the gradients so far."""

    def __init__(
        self,
        kind: str,
        x: Inputs,
        o: Options,
        upstream: Tensor | None = None,
        wanted: tuple[bool, ...] | None = None,
        phase: Phase = Phase.CHUNKS,
        whole: bool = False,
    ) -> None:
        """`whole`: a gradient of the scores that is saved has a row for every token."""
        self.kind, self.x, self.o, self.upstream = KINDS[kind], x, o, upstream
        self.keep = x.valid.nonzero()[:, 0] if o.compact and x.valid is not None else None
        if self.keep is not None and len(self.keep) == len(x.hidden):
            self.keep = None
        rows = len(x.hidden) if self.keep is None else len(self.keep)
        sizes = sizes_of(kind, x, o, rows, wanted, shares_head(x))
        self.sizes = self._sized(sizes._replace(phase=phase))
        self.plan = make_plan(self.sizes, o.budget)
        self._heads()
        self._workspace(whole)

    def _sized(self, s: Sizes) -> Sizes:
        """What is worked with at a time, where that is not the whole vocabulary."""
        return s

    def _heads(self) -> None:
        x, o = self.x, self.o
        self.weight = x.weight.to(o.compute)
        self.lora_a = None if x.lora_a is None else x.lora_a.to(o.compute)
        self.lora_b = None if x.lora_b is None else x.lora_b.to(o.compute)
        self.bias = None if x.bias is None else x.bias.to(o.logits)
        self.ref_bias = None if x.ref_bias is None else x.ref_bias.to(o.logits)
        self.ref_weight = None
        if x.ref_weight is not None:
            shared = self.sizes.shared_head
            self.ref_weight = self.weight if shared else x.ref_weight.to(o.ref_compute)

    def _new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        new = torch.empty(shape, dtype=dtype, device=self.x.hidden.device)
        return backends.fresh_pages(new)

    def _workspace(self, whole: bool) -> None:
        s, p = self.sizes, self.plan
        grad_rows = s.tokens if whole else p.group
        self.scores = self.dz = self.ref_scores = None
        if s.phase != Phase.SAVED:
            rows = p.chunk if s.separate_gradient else grad_rows
            together = p.chunk if s.ref_hidden and not s.ref_apart else 0
            self.scores = self._new(rows + together, s.vocab, dtype=s.logits)
            self.dz = self.scores
            if s.ref_apart:
                self.ref_scores = self._new(p.chunk, s.vocab, dtype=s.logits)
        if s.separate_gradient:
            self.dz = self._new(grad_rows, s.vocab, dtype=s.grad_dtype)
        self.rows = self.ref_rows = self.grad_rows = self.wide = None
        if s.gathered:
            both = 2 if s.joined else 1
            self.rows = self._new(p.group * both, s.hidden, dtype=s.compute)
        if s.ref_gathered:
            self.ref_rows = self._new(p.chunk, s.ref_hidden, dtype=s.ref_compute)
        if s.scattered:
            self.grad_rows = self._new(p.group, s.hidden, dtype=s.compute)
        if s.widened:
            self.wide = self._new(p.group, s.hidden, dtype=torch.float32)
        scratch = self._new(p.scratch_rows + p.scratch_tile, dtype=torch.uint8)
        self.scratch = gemm.scratch_of(scratch, p.scratch_tile)

    @functools.cached_property
    def grads(self) -> Trained:
        """Allocated when the first product needs them: one group's scores are gone by then."""
        x, s = self.x, self.sizes
        hidden, *head = s.wanted
        grad_hidden = None
        if hidden:
            grad_hidden = self._new(*x.hidden.shape, dtype=x.hidden.dtype)
            if s.dropped:
                grad_hidden.zero_()
        dtypes = total_dtypes(s, self.plan.groups)
        totals = [
            self._new(*like.shape, dtype=dtype) if want else None  # type: ignore[union-attr]
            for like, dtype, want in zip(trained(x)[1:], dtypes, head, strict=True)
        ]
        for total in totals:
            if total is not None and not self.plan.groups:
                total.zero_()
        return Trained(grad_hidden, *totals)

    def run(self) -> Tensor:
        """Values [K, N], zero in dropped rows; the gradients are left in `self.grads`."""
        s, p = self.sizes, self.plan
        values = self._new(self.kind.values, s.tokens, dtype=accumulator(s.logits))
        if s.dropped:
            values.zero_()
        for a in range(0, s.rows, p.group or 1):
            self._group(a, min(a + p.group, s.rows), values)
        return values

    def release(self) -> None:
        """Give back all memory but the gradients'."""
        self._release_scores()
        self.scores = self.dz = None
        del self.scratch, self.rows, self.ref_rows, self.grad_rows, self.wide
        del self.weight, self.ref_weight, self.lora_a, self.lora_b

    def _release_scores(self) -> None:
        """Give back what `released` counts: scores that are not also the gradient."""
        self.ref_scores = None
        if self.sizes.separate_gradient:
            self.scores = None

    def _group(self, start: int, stop: int, values: Tensor) -> None:
        """Rows start..stop: their values, and the products of their gradient."""
        index = self._index(start, stop)
        rows = self.hidden_rows(start, stop, index)
        low = self.low_rank(rows)
        for a in range(start, stop, self.plan.chunk):
            b = min(a + self.plan.chunk, stop)
            part = slice(a - start, b - start)
            done = self._chunk(a, b, rows[part], None if low is None else low[part], part)
            index_part = self._index(a, b)
            if index_part is None:
                values[:, a:b] = done
            else:
                values.index_copy_(1, index_part, done)
        if self.upstream is not None:
            assert self.dz is not None
            dz = self.dz[: stop - start]
            if stop == self.sizes.rows:
                self._release_scores()
            self.products(rows, low, dz, start, stop, index)

    def _index(self, a: int, b: int) -> Tensor | None:
        """Which tokens rows a..b are; None: the same."""
        return None if self.keep is None else self.keep[a:b]

    def _chunk(self, a: int, b: int, rows: Tensor, low: Tensor | None, part: slice) -> Tensor:
        """Values of rows a..b; their gradient goes to rows `part` of the group's."""
        assert self.dz is not None
        index = self._index(a, b)
        policy, ref = self._scores(rows, low, a, b, index, part)
        pick = picker(a, b, index)
        x = self.x
        whole = Rows(
            policy[None],
            None if ref is None else ref[None],
            pick(x.target),
            None if self.keep is not None else pick(x.valid),
            pick(x.beta),
            pick(x.ref_logp),
            pick(self.upstream),
            None if self.upstream is None else self.dz[part][None],
            pick(x.state),
        )
        return self._row_function(whole, b - a)

    def _row_function(self, whole: Rows, n: int) -> Tensor:
        if self.plan.block >= n:
            return torch.stack(self.kind.run(whole, self.o))
        out = self._new(self.kind.values, n, dtype=accumulator(self.o.logits))
        for a in range(0, n, self.plan.block):
            b = min(a + self.plan.block, n)
            torch.stack(self.kind.run(whole.part(a, b), self.o), out=out[:, a:b])
        return out

    def _take(
        self, source: Tensor, a: int, b: int, index: Tensor | None, out: Tensor | None
    ) -> Tensor:
        """Rows a..b of `source`, in place where nothing has to be moved or converted."""
        if out is None:
            return source[a:b]
        if index is not None and source.dtype == out.dtype:
            return torch.index_select(source, 0, index, out=out)
        return out.copy_(source[a:b] if index is None else source[index])

    def hidden_rows(self, a: int, b: int, index: Tensor | None) -> Tensor:
        """Rows a..b of the policy's hidden states; a copy where the sizes are `gathered`."""
        return self._take(self.x.hidden, a, b, index, _first(self.rows, b - a))

    def low_rank(self, rows: Tensor) -> Tensor | None:
        """What LoRA multiplies lora_b by."""
        if self.lora_a is None:
            return None
        return (rows @ self.lora_a.t()).mul_(self.o.lora_scale)

    def _scores(
        self,
        rows: Tensor,
        low: Tensor | None,
        a: int,
        b: int,
        index: Tensor | None,
        part: slice,
    ) -> tuple[Tensor, Tensor | None]:
        """Scores of the policy and of the reference for rows a..b."""
        x, s, n = self.x, self.sizes, b - a
        assert self.scores is not None
        policy = self.scores[:n] if s.separate_gradient else self.scores[part]
        ref = None
        if s.joined:
            assert self.rows is not None and x.ref_hidden is not None
            self._take(x.ref_hidden, a, b, index, self.rows[n : 2 * n])
            gemm.scores_into(self.scores[: 2 * n], self.rows[: 2 * n], self.weight, self.scratch)
        else:
            gemm.scores_into(policy, rows, self.weight, self.scratch)
        if low is not None and self.lora_b is not None:
            gemm.scores_into(policy, low, self.lora_b, self.scratch, add=True)
        if self.bias is not None:
            policy.add_(self.bias)
        if x.ref_hidden is not None and self.ref_weight is not None:
            ref = self.scores[n : 2 * n] if self.ref_scores is None else self.ref_scores[:n]
            if not s.joined:
                ref_rows = self._take(x.ref_hidden, a, b, index, _first(self.ref_rows, n))
                gemm.scores_into(ref, ref_rows, self.ref_weight, self.scratch)
            if self.ref_bias is not None:
                ref.add_(self.ref_bias)
        return policy, ref

    def products(
        self,
        rows: Tensor,
        low: Tensor | None,
        dz: Tensor,
        a: int,
        b: int,
        index: Tensor | None,
        by: RowFactors | None = None,
    ) -> None:
        """Adds the gradients of rows a..b to `self.grads`. `by`: `dz` is a unit gradient, of which
        `rows` and `low` have been multiplied by `by.sums`."""
        g, first = self.grads, a == 0
        grad_rows = None
        if g.hidden is not None:
            grad_rows = g.hidden[a:b] if self.grad_rows is None else self.grad_rows[: b - a]
            gemm.rows_gradient_into(grad_rows, dz, self.weight, self.scratch)
        if low is not None:
            self._lora_products(rows, low, dz, grad_rows, first)
        if g.weight is not None:
            gemm.head_gradient_add(g.weight, dz, rows, self.scratch, first=first)
        if g.bias is not None:
            column = dz.new_ones((len(dz), 1)) if by is None else by.sums[:, None].to(dz.dtype)
            gemm.head_gradient_add(g.bias[:, None], dz, column, self.scratch, first=first)
        if grad_rows is not None and by is not None:
            gemm.weigh_rows(grad_rows, by.rows, self.wide)
        if g.hidden is not None and self.grad_rows is not None:
            assert grad_rows is not None
            if index is None:
                g.hidden[a:b] = grad_rows
            else:
                g.hidden.index_copy_(0, index, grad_rows.to(g.hidden.dtype))

    def _lora_products(
        self, rows: Tensor, low: Tensor, dz: Tensor, grad_rows: Tensor | None, first: bool
    ) -> None:
        """scores += low @ B.T with low = scale * rows @ A.T; nothing of the size of the head is
        formed."""
        g, o = self.grads, self.o
        assert self.lora_a is not None and self.lora_b is not None
        if g.lora_b is not None:
            gemm.head_gradient_add(g.lora_b, dz, low, self.scratch, first=first)
        if g.lora_a is None and grad_rows is None:
            return
        dlow = torch.empty_like(low)
        gemm.rows_gradient_into(dlow, dz, self.lora_b, self.scratch)
        dlow.mul_(o.lora_scale)
        if g.lora_a is not None:
            gemm.head_gradient_add(g.lora_a, dlow, rows, self.scratch, first=first)
        if grad_rows is not None:
            torch.addmm(grad_rows, dlow, self.lora_a, out=grad_rows)


def picker(a: int, b: int, index: Tensor | None) -> Callable[[Tensor | None], Tensor | None]:
    def pick(x: Tensor | None) -> Tensor | None:
        if x is None or x.dim() == 0 or (index is None and b - a == len(x)):
            return x
        return x[a:b] if index is None else x.index_select(0, index)

    return pick


def _first(buffer: Tensor | None, n: int) -> Tensor | None:
    return None if buffer is None else buffer[:n]
