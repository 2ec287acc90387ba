"""Host time of one call: Python, dispatch, autograd and the launch, on inputs that take no time.

`python -m benchmarks host [--json FILE]`. On the CPU with the native kernels, and as on a GPU:
through Triton's launcher with a driver that does nothing (`triton_kernels/_pretend.py`), so that
what remains is what the host does before a GPU can begin. Microseconds, the fastest of ROUNDS.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import deepalign_kernels as dak
from benchmarks.harness import machine, report
from deepalign_kernels import backends

ROUNDS, CALLS = 15, 40
T, V, H = 128, 64, 16
Op = Callable[[], Any]


def ops(train: bool) -> dict[str, tuple[Op, list[Tensor]]]:
    """{name: (call, what its gradient is asked for)}"""
    make = torch.Generator().manual_seed(0)
    policy, ref = (torch.randn(1, T, V, generator=make) for _ in range(2))
    hidden, weight = torch.randn(1, T, H, generator=make), torch.randn(V, H, generator=make)
    target = torch.randint(0, V, (1, T), generator=make)
    ref_logp = torch.full((1, T), -4.0)
    leaves = [policy, hidden, weight]
    for leaf in leaves:
        leaf.requires_grad_(train)
    head = [hidden, weight]
    return {
        "token_logp": (lambda: dak.token_logp(policy, target), [policy]),
        "token_kl": (lambda: dak.token_kl(policy, ref), [policy]),
        "constrained_loss": (
            lambda: dak.constrained_loss(policy, target, beta=0.5, ref_logp=ref_logp),
            [policy],
        ),
        "linear_token_logp": (lambda: dak.linear_token_logp(hidden, weight, target), head),
        "linear_constrained_loss": (
            lambda: dak.linear_constrained_loss(
                hidden, weight, target, beta=0.5, ref_logp=ref_logp
            ),
            head,
        ),
    }


def microseconds(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - start)
    return round(best / CALLS * 1e6, 1)


@contextlib.contextmanager
def pretended(arch: str = "sm_90") -> Iterator[None]:
    """Triton takes CPU tensors, as it would take CUDA ones; nothing is computed."""
    from deepalign_kernels.triton_kernels import _pretend

    real = backends.unavailable

    def unavailable(backend: str, *rest: object) -> str | None:
        return None if backend == "triton" else real(backend, *rest)  # type: ignore[arg-type]

    with _pretend.gpu(arch), mock.patch.object(backends, "unavailable", unavailable):
        yield


def measure(backend: str) -> list[dict[str, object]]:
    rows = []
    place = pretended() if backend == "triton" else contextlib.nullcontext()
    with place, dak.use_backend(backend):
        for name in ops(False):
            call, leaves = ops(True)[name]
            inference, _ = ops(False)[name]

            def step(call: Op = call, leaves: list[Tensor] = leaves) -> object:
                return torch.autograd.grad(call().sum(), leaves)

            step()
            inference()
            fwd, both = microseconds(inference), microseconds(step)
            rows.append({"op": name, "backend": backend, "fwd_us": fwd, "fwd_bwd_us": both})
    return rows


def command(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [row for backend in ("native", "triton") for row in measure(backend)]
    about = machine.describe("cpu")
    print(report.table(list(rows[0]), [[str(x) for x in row.values()] for row in rows]))
    if options.json:
        text = json.dumps({"machine": about, "rows": rows}, indent=1)
        pathlib.Path(options.json).write_text(text + "\n")
    return 0
