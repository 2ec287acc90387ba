"""What a training step of a linear op launches on a GPU, recorded without one, and what that takes.

The step runs on meta tensors, which have shapes but no memory: every product, copy and row kernel
of the op's own code is noted with its bytes, and so is the most memory that lives at one time. The
time of a step is then

    GEMM         the longer of its operations at `flops` and its bytes at `bandwidth`, and, where it
                 adds to its result, half the time of reading and writing that: K is too short to
                 hide it
    row kernel   its bytes at `bandwidth`; the second sweep over a row of 513 kB (fp32, V = 128256)
                 is read again by the Triton kernels and comes from the chip in the CUDA C++ ones
    the rest     its bytes at `bandwidth`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import deepalign_kernels as dak
from benchmarks.cases.logits import Shape
from benchmarks.harness import report
from benchmarks.offline.cards import CARDS, Card
from deepalign_kernels import backends
from deepalign_kernels.ops.linear import torch_ops
from deepalign_kernels.traffic import ideal_bytes

SHAPE = Shape(8192, 128256, 4096)


class Launch(NamedTuple):
    """One kernel. `bytes`: what memory must move; `asked`: with second sweeps over a row."""

    name: str
    bytes: int
    asked: int
    gemm: tuple[int, int, int] | None = None  # rows, columns, length of the sums
    dtypes: tuple[torch.dtype, torch.dtype] | None = None  # operands, result
    adds: int = 0  # bytes of a result that is read and written, in `bytes` too

    @property
    def flops(self) -> int:
        return 2 * self.gemm[0] * self.gemm[1] * self.gemm[2] if self.gemm else 0

    def seconds(self, card: Card, one_sweep: bool) -> float:
        moved = (self.bytes if one_sweep else self.asked) / card.copy
        return max(self.flops / card.flops, moved) + 0.5 * self.adds / card.copy


class Step(NamedTuple):
    """What one forward and backward launched."""

    launches: list[Launch]
    peak: int  # bytes allocated at most, results and gradients included

    @property
    def gemms(self) -> list[Launch]:
        return [x for x in self.launches if x.gemm]

    def milliseconds(self, card: Card, one_sweep: bool) -> float:
        return 1e3 * sum(x.seconds(card, one_sweep) for x in self.launches)


class _Recorder(TorchDispatchMode):
    """Runs the bodies of the linear ops instead of their fakes, and notes what they call."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if func.namespace == "deepalign" and name.startswith("linear_"):
            body = getattr(torch_ops, f"_{name.removeprefix('linear_')}_body")
            with self, torch.no_grad():
                return body(*args)
        given = {x.untyped_storage()._cdata for x in _tensors(args, kwargs)}
        out = func(*args, **(kwargs or {}))
        results = _tensors(out)
        self._allocated([x for x in results if x.untyped_storage()._cdata not in given])
        written = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        fresh = any(x.untyped_storage()._cdata not in given for x in results)
        if "empty" not in name and (written or fresh):
            self.launches.append(_launch(name, args, kwargs or {}, results))
        return out

    def _allocated(self, new: list[Tensor]) -> None:
        self.live = {k: x for k, x in self.live.items() if not x[0].expired()}
        for x in new:
            storage = x.untyped_storage()
            self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))

    def row_kernel(self, op: str, *_: Any) -> Callable[..., Any]:
        """In place of `backends.choose`."""

        def run(*args: Any) -> Any:
            tensors = _tensors(args)
            scores = [x for x in tensors if x.dim() == 3]
            key = op
            if op.startswith("constrained") and args[3] is not None:
                key += "_ref_logits"
            out = scores.pop() if op.endswith(("fused", "bwd")) else None
            rows, columns = scores[0].shape[1:]
            item = scores[0].element_size()
            to = None if out is None else out.element_size()
            moved, asked = (
                sum(ideal_bytes(key, rows, columns, item, out_itemsize=to, perfect_cache=cached))
                for cached in (True, False)
            )
            self.launches.append(Launch(op, moved, asked))
            return _outputs(op, scores[0])

        return run


def _outputs(op: str, scores: Tensor) -> Any:
    """What the op of the logits level gives, in shapes."""
    rows = scores.shape[1]
    one, norm = (rows,), (rows, 2)
    shapes = {
        "token_logp_fwd": (one, norm),
        "token_kl_fwd": (one, norm, norm, one),
        "constrained_loss_fwd": (one, one, one, one, norm),
        "constrained_loss_fused": (one, one, one, one),
    }
    made = [scores.new_empty(s, dtype=torch.float32) for s in shapes.get(op, (one,))]
    return made if len(made) > 1 else made[0]


def _tensors(*trees: Any) -> list[Tensor]:
    return [x for x in tree_leaves(trees) if isinstance(x, Tensor)]


def _launch(name: str, args: Any, kwargs: dict[str, Any], results: list[Tensor]) -> Launch:
    touched = _tensors(args, kwargs, results)
    once = {(x.untyped_storage()._cdata, x.storage_offset(), x.shape): x for x in touched}
    moved = 0 if name == "scale_grad" else sum(x.nbytes for x in once.values())  # the factor is 1
    if name not in ("mm", "addmm"):
        return Launch(name, moved, moved)
    a, b = args[-3:-1] if isinstance(args[-1], torch.dtype) else args[-2:]
    out = results[0]
    adds = 2 * out.nbytes if name == "addmm" and kwargs.get("beta", 1) else 0
    moved = a.nbytes + b.nbytes + (adds or out.nbytes)
    shape = (a.shape[0], b.shape[1], a.shape[1])
    return Launch(name, moved, moved, shape, (a.dtype, out.dtype), adds)


@contextmanager
def recording() -> Iterator[_Recorder]:
    """Linear ops called on meta tensors inside the block are recorded."""
    recorder = _Recorder()
    with (
        mock.patch.object(backends, "choose", recorder.row_kernel),
        mock.patch.object(backends, "runs_eagerly", lambda *_: False),
        recorder,
    ):
        yield recorder


def _step(op: str, shape: Shape, reduction: str, trained: tuple[str, ...], **kw: Any) -> Step:
    """One training step of `op` in bf16; all tokens are trained, `compact` would wait for them."""

    def new(*size: int, grad: bool = False) -> Tensor:
        return torch.empty(size, device="meta", dtype=torch.bfloat16, requires_grad=grad)

    (T, V, H), kw = (shape.T, shape.V, shape.H), {"compact": False, **kw}
    hidden, weight = new(T, H, grad="hidden" in trained), new(V, H, grad="weight" in trained)
    target = torch.empty(T, dtype=torch.long, device="meta")
    row, ref, ref_weight = target.float(), new(T, H), new(V, H)
    reduced: dict[str, Any] = {"reduction": reduction}
    calls: dict[str, Callable[[], Any]] = {
        "linear_token_logp": lambda: dak.linear_token_logp(hidden, weight, target, **kw),
        "linear_token_kl": lambda: dak.linear_token_kl(
            hidden, weight, ref, ref_weight, **reduced, **kw
        ),
        "linear_constrained_loss": lambda: dak.linear_constrained_loss(
            hidden, weight, target, beta=row, ref_logp=row, **reduced, **kw
        ),
    }
    with recording() as recorder:
        out = calls[op]()
        leaves = [x for x in (hidden, weight) if x.requires_grad]
        torch.autograd.grad(out, leaves, torch.empty_like(out))
    return Step(recorder.launches, recorder.peak)


_BOTH = ("hidden", "weight")
STEPS: dict[str, tuple[str, str, tuple[str, ...], dict[str, Any]]] = {
    "constrained_loss": ("linear_constrained_loss", "mean", _BOTH, {}),
    "constrained_loss, bf16 logits": (
        "linear_constrained_loss", "mean", _BOTH, {"logits_dtype": torch.bfloat16}
    ),
    "constrained_loss/frozen_head": ("linear_constrained_loss", "mean", ("hidden",), {}),
    "constrained_loss, by token": ("linear_constrained_loss", "none", _BOTH, {}),
    "token_logp": ("linear_token_logp", "none", _BOTH, {}),
    "token_kl/policy_ref": ("linear_token_kl", "none", _BOTH, {}),
    "token_kl/policy_ref, mean": ("linear_token_kl", "mean", _BOTH, {}),
}  # fmt: skip


def step(name: str, shape: Shape = SHAPE) -> Step:
    """A step of one of STEPS."""
    op, reduction, trained, more = STEPS[name]
    return _step(op, shape, reduction, trained, **more)


def table(shape: Shape = SHAPE) -> str:
    """All steps: products, bytes, launches, memory and predicted time."""
    lines = []
    for name in STEPS:
        s = step(name, shape)
        line = [name, str(len(s.gemms)), f"{sum(x.flops for x in s.gemms) / 1e12:.1f}"]
        line += [f"{sum(x.bytes for x in s.launches) / 1e9:.1f}", str(len(s.launches))]
        line += [f"{s.peak / 1e9:.2f}"]
        for card in CARDS.values():
            line += [f"{s.milliseconds(card, one):.1f}" for one in (True, False)]
        lines.append(line)
    header = ["linear op", "GEMMs", "TFLOP", "GB", "launches", "peak GB"]
    header += [f"{card} ms, {rows}" for card in CARDS for rows in ("C++ rows", "Triton rows")]
    return f"[forward + backward of {shape} bf16, predicted]\n{report.table(header, lines)}"
