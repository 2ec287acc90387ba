"""What the files of the linear level hand to each other: a call's tensors and numbers, and the row
functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepalign_kernels import backends


class Trained(NamedTuple):
    """One thing for each input that may be trained: the tensor itself, its gradient (None unless
    wanted), a dtype or a flag."""

    hidden: Any
    weight: Any
    bias: Any
    lora_a: Any
    lora_b: Any


class Inputs(NamedTuple):
    """Tensors of one call. Rows are [N]; the first are those of `Trained`, the rest is frozen."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    lora_a: Tensor | None  # [r, H]
    lora_b: Tensor | None  # [V, r]
    ref_hidden: Tensor | None  # [N, R]
    ref_weight: Tensor | None  # [V, R]
    ref_bias: Tensor | None  # [V]
    target: Tensor | None  # [N] int64
    valid: Tensor | None  # [N] bool; None: all
    beta: Tensor | None  # [N]
    ref_logp: Tensor | None  # [N]
    state: Tensor | None = None  # [N, 6], what a process group knows: `sharded.py`


def trained(x: Inputs) -> Trained:
    """The inputs that may be trained. (torch 2.10 traces no property of a NamedTuple.)"""
    return Trained(*x[: len(Trained._fields)])


class Options(NamedTuple):
    """Numbers of one call; the annotations are also the types in the ops' schemas."""

    temperature: float  # logit_scale is folded into this one and softcap
    softcap: float  # 0: none
    lora_scale: float
    js_beta: float
    kl_coef: float
    min_weight: float
    ignore_index: int
    direction: int
    max_workspace_bytes: int  # -1: the default rule
    rule: str  # of the constrained kinds: see rules.py
    compact: bool
    compute: torch.dtype
    ref_compute: torch.dtype
    logits: torch.dtype
    accumulate: torch.dtype

    @property
    def budget(self) -> int | None:
        """max_workspace_bytes as the caller gave it."""
        return None if self.max_workspace_bytes < 0 else self.max_workspace_bytes


_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "float": "float",
    "int": "int",
    "bool": "bool",
    "str": "str",
    "torch.dtype": "ScalarType",
}
# A call as the arguments of a torch op.
ARGUMENTS = "str kind, " + ", ".join(
    f"{_TYPES[annotation.__forward_arg__]} {name}"
    for part in (Inputs, Options)
    for name, annotation in part.__annotations__.items()
)


class Rows(NamedTuple):
    """What a row function sees: some rows of a chunk. `policy`, `ref` and `out` are [1, n, V], the
    rest [n]."""

    policy: Tensor
    ref: Tensor | None
    target: Tensor | None
    valid: Tensor | None
    beta: Tensor | None
    ref_logp: Tensor | None
    upstream: Tensor | None  # [n] or 0-d; None: values only
    out: Tensor | None  # where the gradient goes; may be `policy` itself
    state: Tensor | None = None  # [n, 6]

    def call(self, op: str, *args: Any) -> Any:
        """Run a row op of the logits level on the backend chosen for it."""
        return backends.choose(op, self.policy.device.type, self.policy.dtype)(*args)

    def upstream_rows(self) -> Tensor:
        """`upstream` as a contiguous [n]."""
        assert self.upstream is not None
        return self.upstream.expand(self.policy.shape[1]).contiguous()

    def part(self, a: int, b: int) -> Rows:
        def cut(x: Tensor | None) -> Tensor | None:
            if x is None or x.dim() == 0:
                return x
            return x[:, a:b] if x.dim() == 3 else x[a:b]

        return Rows(*(cut(x) for x in self))  # pyright: ignore[reportArgumentType]


class RowFunction(NamedTuple):
    """One kind of linear op."""

    run: Callable[[Rows, Options], tuple[Tensor, ...]]  # -> `values` tensors [n]
    values: int
    ops: tuple[str, ...]  # row ops it calls
    # wide [n, V] temporaries that its eager implementation holds at the peak, without and with the
    # gradient (measured, torch 2.13)
    eager_copies: tuple[float, float]


KINDS: dict[str, RowFunction] = {}
# By kind: per-token values [K, N], the first differentiable by tiles of the vocabulary.
KNOWN: dict[str, Callable[[Inputs, Options], Tensor]] = {}


class RowFactors(NamedTuple):
    """Upstream gradients [n] of the rows of a unit gradient."""

    rows: Tensor  # what gradients by row are multiplied by
    sums: Tensor  # what `rows` and `low`, and so all sums over rows, have been multiplied by


def shares_head(x: Inputs) -> bool:
    """Policy and reference multiply by one and the same tensor, so their rows can go through it
    together."""
    w, r = x.weight, x.ref_weight
    if r is None or x.ref_hidden is None or x.ref_hidden.shape[1] != x.hidden.shape[1]:
        return False
    return (
        w.data_ptr() == r.data_ptr()
        and w.dtype == r.dtype
        and w.shape == r.shape
        and w.stride() == r.stride()
    )
