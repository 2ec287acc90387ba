"""The torch ops of the linear level. All of them are `engine.Engine`; they differ in when the
gradient is made.

linear_fwd     values [K, N], without gradients
linear_saved   values, and d values[0] / d scores by row, where all tokens are one chunk; else an
               empty tensor: see `saved.py`
linear_saved_bwd  the gradients of sum(upstream * values[0]) from that
linear_bwd     the same without it: makes the scores again
linear_unit    values, and d values[0] / d hidden by row: with a frozen head the backward is then a
               product of [N] with [N, H], no GEMM: linear_row_scale
linear_shard   values of which other ranks, or a run before, know the normalisers; its backward is
               linear_bwd of this rank's part, on a GPU over tiles of the vocabulary
linear_fused   scale * sum(values[0]), values, and the gradients of the former, made in the forward
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepalign_kernels.ops._reduce import scaled_sum
from deepalign_kernels.ops._register import (
    accumulator,
    autograd,
    define_plain,
    no_double_backward,
)
from deepalign_kernels.ops.linear import gemm, plan, saved, tiles
from deepalign_kernels.ops.linear.engine import Engine, sizes_of
from deepalign_kernels.ops.linear.types import (
    ARGUMENTS,
    KINDS,
    KNOWN,
    Inputs,
    Options,
    Trained,
    shares_head,
    trained,
)
from deepalign_kernels.ops.logits.scale_grad import hand_over

_K = 1 + len(Inputs._fields)  # where the options begin
_N = _K + len(Options._fields)  # where an op's own arguments begin
_FIVE = ", ".join(f"Tensor grad_{name}" for name in Trained._fields)


def _define(schema: str, body: Any) -> Any:
    def run(*arguments: Any) -> Any:
        device = next(x for x in arguments if isinstance(x, Tensor)).device.type
        with torch.no_grad():
            if not torch.is_autocast_enabled(device):
                return body(*arguments)
            with torch.autocast(device, enabled=False):
                return body(*arguments)

    return define_plain(schema, run)


def _call(arguments: Sequence[Any]) -> tuple[str, Inputs, Options]:
    return arguments[0], Inputs(*arguments[1:_K]), Options(*arguments[_K:_N])


def _grad_dtypes(x: Inputs, o: Options, scaled_later: bool) -> list[torch.dtype | None]:
    """dtype of each gradient an op returns. What is still to be scaled stays wide for fp16: its
    range is short."""
    late = scaled_later and o.compute == torch.float16
    dtypes = [None if t is None else t.dtype for t in trained(x)]
    return dtypes[:1] + [torch.float32 if late and d is not None else d for d in dtypes[1:]]


def _finish(engine: Engine, scaled_later: bool) -> list[Tensor]:
    """The gradients in the dtypes promised, an empty tensor for each that is not wanted."""
    x, o, grads = engine.x, engine.o, engine.grads
    engine.release()  # before the conversions allocate
    dtypes = _grad_dtypes(x, o, scaled_later)
    return [
        x.hidden.new_empty(0) if grad is None else grad.to(dtype)
        for grad, dtype in zip(grads, dtypes, strict=True)
    ]


def _stacked(grads: list[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """The wanted ones as [1, rows, columns], the shape that scale_grad takes."""
    return [
        (g[None] if g.dim() == 2 else g[None, None]) if w else g
        for g, w in zip(grads, wanted, strict=True)
    ]


def _fwd_body(*arguments: Any) -> Tensor:
    return Engine(*_call(arguments)).run()


def _bwd_body(*arguments: Any) -> tuple[Tensor, ...]:
    kind, x, o = _call(arguments)
    upstream, wanted = arguments[_N], tuple(arguments[_N + 1])
    if x.state is not None and tiles.takes(kind, x, o, wanted):
        engine = tiles.TileEngine(kind, x, o, upstream, wanted)
        engine.backward()
    else:
        engine = Engine(kind, x, o, upstream, wanted)
        engine.run()
    return tuple(_finish(engine, False))


def _refuse_late(kind: str, x: Inputs, o: Options) -> None:
    """A budget that is enough for the values alone is refused before they are made."""
    if o.budget is None:
        return
    every = (True,) * len(Trained._fields)
    rows = len(x.hidden) if x.valid is None or not o.compact else int(x.valid.sum())
    plan.refuse_late(sizes_of(kind, x, o, rows, every, shares_head(x)), o.budget)


def _saved_body(*arguments: Any) -> tuple[Tensor, Tensor]:
    kind, x, o = _call(arguments)
    if saved.keeps(kind, x, o):
        return saved.forward(kind, x, o, arguments[_N])
    _refuse_late(kind, x, o)
    return Engine(kind, x, o).run(), x.hidden.new_empty(0)


def _saved_bwd_body(*arguments: Any) -> tuple[Tensor, ...]:
    upstream, wanted, grad_scores = arguments[_N:]
    engine = saved.gradients(*_call(arguments), upstream, tuple(wanted), grad_scores)
    return tuple(_finish(engine, False))


def _unit_body(*arguments: Any) -> tuple[Tensor, Tensor]:
    kind, x, o = _call(arguments)
    one = x.hidden.new_ones((), dtype=accumulator(o.logits))
    engine = Engine(kind, x, o, one, (True, False, False, False, False))
    values = engine.run()
    return values, _finish(engine, False)[0]


def _fused_body(*arguments: Any) -> tuple[Tensor, ...]:
    kind, x, o = _call(arguments)
    scale = arguments[_N]
    # The scale may be 1e-5, too small for fp16: its gradients get it with the upstream one instead.
    early = torch.ones_like(scale) if o.compute == torch.float16 else scale
    engine = Engine(kind, x, o, early, tuple(arguments[_N + 1]))
    values = engine.run()
    grads = _stacked(_finish(engine, True), arguments[_N + 1])
    return scaled_sum(values[0], scale), values, *grads


def _row_scale_body(unit: Tensor, rows: Tensor) -> Tensor:
    return unit.to(rows.dtype, copy=True).mul_(rows[:, None]).to(unit.dtype)


_fwd = _define(f"linear_fwd({ARGUMENTS}) -> Tensor", _fwd_body)
_bwd = _define(f"linear_bwd({ARGUMENTS}, Tensor upstream, bool[] wanted) -> ({_FIVE})", _bwd_body)
_saved = _define(
    f"linear_saved({ARGUMENTS}, bool whole) -> (Tensor values, Tensor grad_scores)", _saved_body
)
_saved_bwd = _define(
    f"linear_saved_bwd({ARGUMENTS}, Tensor upstream, bool[] wanted, Tensor grad_scores)"
    f" -> ({_FIVE})",
    _saved_bwd_body,
)
_unit = _define(f"linear_unit({ARGUMENTS}) -> (Tensor values, Tensor unit)", _unit_body)
_fused = _define(
    f"linear_fused({ARGUMENTS}, Tensor scale, bool[] wanted) -> (Tensor total, Tensor values, "
    f"{_FIVE})",
    _fused_body,
)
_row_scale = _define("linear_row_scale(Tensor unit, Tensor rows) -> Tensor", _row_scale_body)
no_double_backward("linear_bwd")
no_double_backward("linear_saved_bwd")
no_double_backward("linear_row_scale")


def _fake_values(arguments: Sequence[Any]) -> Tensor:
    kind, x, o = _call(arguments)
    shape = KINDS[kind].values, x.hidden.shape[0]
    return x.hidden.new_empty(shape, dtype=accumulator(o.logits))


def _fake_grads(arguments: Sequence[Any], scaled_later: bool) -> list[Tensor]:
    _, x, o = _call(arguments)
    dtypes = _grad_dtypes(x, o, scaled_later)
    return [
        x.hidden.new_empty(0) if not w or t is None else t.new_empty(t.shape, dtype=d)
        for t, d, w in zip(trained(x), dtypes, arguments[_N + 1], strict=True)
    ]


@torch.library.register_fake("deepalign::linear_fwd")
def _(*arguments: Any) -> Tensor:
    return _fake_values(arguments)


@torch.library.register_fake("deepalign::linear_bwd")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_fake_grads(arguments, False))


@torch.library.register_fake("deepalign::linear_saved")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    """As with `whole`: per_token asks for that where it is traced."""
    values, (kind, x, o) = _fake_values(arguments), _call(arguments)
    if not saved.keeps(kind, x, o):
        return values, x.hidden.new_empty(0)
    shape = x.hidden.shape[0], x.weight.shape[0]
    dtype = gemm.gradient_dtype(x.hidden.device.type, o.compute)
    return values, x.hidden.new_empty(shape, dtype=dtype)


@torch.library.register_fake("deepalign::linear_saved_bwd")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_fake_grads(arguments, False))


@torch.library.register_fake("deepalign::linear_unit")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _fake_values(arguments), arguments[1].new_empty(arguments[1].shape)


@torch.library.register_fake("deepalign::linear_row_scale")
def _(unit: Tensor, rows: Tensor) -> Tensor:
    return unit.new_empty(unit.shape)


@torch.library.register_fake("deepalign::linear_fused")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    values = _fake_values(arguments)
    grads = _stacked(_fake_grads(arguments, True), arguments[_N + 1])
    return values.new_empty(()), values, *grads


def _save(ctx: Any, arguments: tuple, x: Inputs, grad_scores: Tensor | None) -> None:
    ctx.kind, ctx.options = arguments[0], arguments[_K:_N]
    ctx.save_for_backward(*x, grad_scores)
    ctx.set_materialize_grads(False)


def _setup_saved(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, grad_scores = Inputs(*inputs[1:_K]), None
    if output[1].dim() == 2:
        grad_scores = output[1]
        only = {**dict.fromkeys(Inputs._fields), **trained(x)._asdict(), "valid": x.valid}
        x = Inputs(**only)
    _save(ctx, inputs, x, grad_scores)
    ctx.mark_non_differentiable(output[1])


def _named(grads: Sequence[Tensor | None], wanted: Sequence[bool]) -> dict[str, Tensor | None]:
    """By the names of the ops' arguments."""
    each = zip(Trained._fields, grads, wanted, strict=True)
    return {name: grad for name, grad, w in each if w}


def _from_saved(ctx: Any, grad: Tensor | None) -> dict[str, Tensor | None]:
    """Gradients from `grad` [N]."""
    if grad is None:
        return {}
    *x, grad_scores = ctx.saved_tensors
    wanted = list(trained(Inputs(*ctx.needs_input_grad[1:_K])))
    given = ctx.kind, *x, *ctx.options, grad.contiguous(), wanted
    return _named(_bwd(*given) if grad_scores is None else _saved_bwd(*given, grad_scores), wanted)


def _backward_saved(ctx: Any, grad: Tensor | None, _unused: Any) -> dict[str, Tensor | None]:
    return _from_saved(ctx, None if grad is None else grad[0])


autograd("linear_saved", _backward_saved, _setup_saved)


def _setup_unit(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    # `unit` stays differentiable, so that a second derivative reaches linear_row_scale and raises
    ctx.save_for_backward(output[1], _call(inputs)[1].valid)
    ctx.set_materialize_grads(False)


def _backward_unit(ctx: Any, grad: Tensor | None, _unused: Any) -> dict[str, Tensor]:
    if grad is None:
        return {}
    unit, valid = ctx.saved_tensors
    # 0 * NaN of an ignored row
    rows = grad[0] if valid is None else torch.where(valid, grad[0], 0.0)
    return {"hidden": _row_scale(unit, rows)}


autograd("linear_unit", _backward_unit, _setup_unit)


def _setup_fused(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, x, o = _call(inputs)
    ctx.late = o.compute == torch.float16
    ctx.dtypes = _grad_dtypes(x, o, False)
    ctx.wanted = tuple(inputs[_N + 1])
    ctx.shapes = [None if t is None else t.shape for t in trained(x)]
    grads = [g if w else None for g, w in zip(output[2:], ctx.wanted, strict=True)]
    # hand_over scales all that is saved, so it gets a copy of the scale.
    ctx.save_for_backward(*grads, inputs[_N].clone().view(1, 1, 1) if ctx.late else None)
    unwanted = (g for g, w in zip(output[2:], ctx.wanted, strict=True) if not w)
    ctx.mark_non_differentiable(output[1], *unwanted)  # the others: see hand_over
    ctx.set_materialize_grads(False)


def _backward_fused(ctx: Any, grad: Tensor | None, *_unused: Any) -> dict[str, Tensor | None]:
    if grad is None:
        return {}
    factor = grad * ctx.saved_tensors[-1].view(()) if ctx.late else grad
    grads = hand_over(ctx, "a linear loss", factor)[:-1]
    cast = [
        None if g is None else _shaped(g, shape).to(dtype)
        for g, shape, dtype in zip(grads, ctx.shapes, ctx.dtypes, strict=True)
    ]
    return _named(cast, ctx.wanted)


def _shaped(grad: Tensor, shape: torch.Size) -> Tensor:
    view = grad.view(shape)
    alone = type(view) is Tensor and not torch.is_grad_enabled()  # `.data`: see hand_over
    return view.data if alone else view


autograd("linear_fused", _backward_fused, _setup_fused)


def per_token(kind: str, x: Inputs, o: Options) -> Tensor:
    """Values [K, N]; the first is differentiable: by row scaling with a frozen head, else from the
    gradient of the scores, saved or made again, over the vocabulary where that is faster."""
    wanted = [t is not None and t.requires_grad for t in trained(x)]
    if not torch.is_grad_enabled() or not any(wanted):
        return _fwd(kind, *x, *o)
    if not any(wanted[1:]):
        return _unit(kind, *x, *o)[0]
    # Traced: shapes must not depend on data, and what a rule asks the machine cannot be traced.
    whole = torch.compiler.is_compiling() or type(x.hidden) is not Tensor
    if not whole and tiles.takes(kind, x, o, tuple(wanted)) and not saved.keeps(kind, x, o):
        return KNOWN[kind](x, o)
    return _saved(kind, *x, *o, whole)[0]


def summed(kind: str, x: Inputs, o: Options, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(scale * sum(values[0]), values [K, N]); the former is differentiable, its gradients made
    right here."""
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in trained(x)]
    if any(wanted):
        total, values, *_ = _fused(kind, *x, *o, scale, wanted)
        return total, values
    values = _fwd(kind, *x, *o)
    return scaled_sum(values[0], scale), values


# Over a process group (`sharded.py`)


def _shard_body(*arguments: Any) -> Tensor:
    _refuse_late(*_call(arguments))
    return arguments[_N].clone()


_shard = _define(f"linear_shard({ARGUMENTS}, Tensor value) -> Tensor", _shard_body)


@torch.library.register_fake("deepalign::linear_shard")
def _(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[_N])


def _backward_shard(ctx: Any, grad: Tensor | None) -> dict[str, Tensor | None]:
    return _from_saved(ctx, grad)


def _setup_shard(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _save(ctx, inputs, Inputs(*inputs[1:_K]), None)


autograd("linear_shard", _backward_shard, _setup_shard)


def local_values(kind: str, x: Inputs, o: Options) -> Tensor:
    """Values [K, N] of this rank's shard, without gradients."""
    detached = (None if t is None else t.detach() for t in x)
    return _fwd(kind, *detached, *o)


def with_gradient(kind: str, x: Inputs, o: Options, value: Tensor) -> Tensor:
    """`value` [N], whose gradients are those that the row function `kind` writes."""
    return _shard(kind, *x, *o, value)
