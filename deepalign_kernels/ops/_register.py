"""Turns a schema into a torch op whose body is `backends.choose`. Used by every file in ops/.

Library.define + impl instead of @torch.library.custom_op: the same single node under torch.compile
at about a third of the eager cost per call (11 us against 33 us, torch 2.13, CPU). What custom_op
would check at run time (aliasing, mutation) opcheck checks in the tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepalign_kernels import backends

_LIB = torch.library.Library("deepalign", "DEF")
_KERNELS: dict[str, Callable[..., Any]] = {}  # what runs an op on a CPU or a GPU
_DENSE = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)


def _define(schema: str, kernel: Callable[[str], Callable[..., Any]]) -> Any:
    """Define `deepalign::<schema>`, with kernel(name) for CPU and CUDA; returns its overload."""
    name = schema.partition("(")[0]
    _LIB.define(schema)
    _KERNELS[name] = kernel(name)
    for key in ("CPU", "CUDA"):
        _LIB.impl(name, _KERNELS[name], key)
    return getattr(torch.ops.deepalign, name).default


def define(schema: str, body: Callable[..., Any] | None = None) -> Any:
    """Define `deepalign::<schema>` for CPU and CUDA and return its overload.

    `body(implementation, *inputs)` stands between the op and the backend where their signatures
    differ: backends write gradients to a tensor that they are handed.
    """
    return _define(schema, lambda name: functools.partial(_run, name, body))


def define_plain(schema: str, body: Callable[..., Any]) -> Any:
    """Define `deepalign::<schema>` with `body` as the whole of it, on every backend."""
    return _define(schema, lambda name: body)


def call(op: str, *inputs: Any) -> Any:
    """Run the registered op `deepalign::<op>`."""
    return getattr(torch.ops.deepalign, op).default(*inputs)


def _run(name: str, body: Callable[..., Any] | None, *inputs: Any) -> Any:
    logits = next((x for x in inputs if isinstance(x, Tensor) and x.dim() == 3), inputs[0])
    implementation = backends.choose(name, logits.device.type, logits.dtype)
    return implementation(*inputs) if body is None else body(implementation, *inputs)


def backward_body(
    implementation: Callable[..., Any], grad: Tensor, logits: Tensor, *rest: Any
) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    implementation(grad, logits, *rest, out)
    return out


def autograd(
    name: str,
    backward: Callable[..., dict[str, Any]],
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """`torch.library.register_autograd` for `deepalign::<name>`, whose arguments have no defaults.
    `backward(ctx, *grads)` returns the gradients there are, by the names of the arguments.

    Torch looks for defaults at every call that keeps something for a backward, and copies the whole
    list of arguments for each of them: 10 us for the 5 arguments of token_logp_fwd, 287 us for the
    31 of linear_fused (torch 2.13, Zen 3).
    """
    op, kernel = getattr(torch.ops.deepalign, name).default, _KERNELS[name]
    below, after = torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset

    def run_below(keys: Any, inputs: tuple) -> Any:
        left = keys & after
        if left.highestPriorityTypeId() in _DENSE:  # the next kernel, without its way through torch
            output = kernel(*inputs)
            return tuple(output) if isinstance(output, list) else output
        return op.redispatch(left, *inputs)

    def forward(ctx: Any, *inputs_and_keys: Any) -> Any:
        inputs, keys = inputs_and_keys[:-1], inputs_and_keys[-1]
        with below():
            output = run_below(keys, inputs)
            if setup_context is not None:
                setup_context(ctx=ctx, inputs=inputs, output=output)
        return output

    names = [argument.name for argument in op._schema.arguments]

    def derive(ctx: Any, *grads: Any) -> tuple:
        found = backward(ctx, *grads)
        return *map(found.get, names), None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(derive)}
    function = type(f"deepalign_{name}", (torch.autograd.Function,), methods)

    def run(keys: Any, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return function.apply(*inputs, keys)
        with below():
            return run_below(keys, inputs)

    _LIB.impl(name, run, "Autograd", with_keyset=True)


def no_double_backward(op: str) -> None:
    """A second derivative through `deepalign::<op>` raises instead of being wrong or missing."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"deepalign::{op} has no second derivative: a fused kernel computes its gradient. "
            "Drop create_graph=True, or use the formula in deepalign_kernels/reference."
        )

    autograd(op, refuse)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """dtype of every [N] result: fp32, and fp64 for fp64 logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fake_rows(logits: Tensor, *, pair: bool = False) -> Tensor:
    """A fake [N] (or [N, 2]) result for logits [B, T, V]."""
    n = logits.shape[0] * logits.shape[1]
    return logits.new_empty((n, 2) if pair else (n,), dtype=accumulator(logits.dtype))


def fake_grad(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)
