"""Who can run a case on this machine, and why the others cannot."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

import deepalign_kernels as dak
from benchmarks.cases.linear import products
from benchmarks.cases.logits import Case, mean
from benchmarks.harness import peers
from benchmarks.harness.plain import Inputs
from deepalign_kernels import backends

OURS = backends.BACKENDS
BASELINES = ("plain", "compile")  # plain torch as one would write it, and torch.compile of it
FLOOR = "gemms"  # the matrix products of a linear case: no loss, and no gate
GROUPS = ("ours", "baselines", "peers")
REHEARSAL = "DEEPALIGN_GPU_REHEARSAL"  # set: peers that cannot run here are played by plain torch


@dataclass(frozen=True)
class Provider:
    """One implementation of a case.

    fn: inputs -> per-token values, or a scalar where reduction is "mean". scope: entered around
    calls, outside the clock. compiles: the first call is compilation. consumes: overwrites the
    first leaf, so every call gets a copy, made outside the clock.
    """

    name: str
    group: str
    fn: Callable[[Inputs], Tensor]
    reduction: str = "none"
    scope: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    compiles: bool = False
    consumes: bool = False
    note: str = ""


@dataclass(frozen=True)
class Absent:
    """A provider that cannot run a case here, and why."""

    name: str
    why: str


def forced(backend: str) -> Callable[[], AbstractContextManager[object]]:
    return lambda: dak.use_backend(backend)


def _ours(case: Case, device: str, dtype: torch.dtype, phase: str) -> list[Provider | Absent]:
    found: list[Provider | Absent] = []
    for backend in OURS:
        public = case.name.partition("/")[0]
        if not hasattr(dak, public):
            return [Absent("ours", f"deepalign_kernels has no {public}")]
        whys = (backends.unavailable(backend, op, device, dtype) for op in case.ops[phase])
        why = next(filter(None, whys), None)
        if backend == "triton" and device == "cpu":
            why = "Triton has no CPU code generator here, and its interpreter is not timed"
        if why:
            found.append(Absent(backend, " ".join(why.split())))
        else:
            found.append(Provider(backend, "ours", case.ours, case.reduction, forced(backend)))
    return found


def _baselines(case: Case, device: str, phase: str) -> list[Provider | Absent]:
    def plain(x: Inputs) -> Tensor:
        values = case.tokens(x)
        return mean(x, values) if case.reduction == "mean" else values

    found: list[Provider | Absent] = [Provider("plain", "baselines", plain, case.reduction)]
    if case.linear:
        found.append(Provider(FLOOR, "baselines", products(case, phase), note="products alone"))
    if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        found.append(Absent("compile", "torch.compile needs a C++ compiler for CPU tensors"))
    else:
        compiled = torch.compile(plain, fullgraph=True, dynamic=False)
        found.append(Provider("compile", "baselines", compiled, case.reduction, compiles=True))
    return found


def _mean_of(case: Case) -> Callable[[Inputs], Tensor]:
    return lambda x: mean(x, case.tokens(x))


def _peers(case: Case, device: str) -> list[Provider | Absent]:
    found: list[Provider | Absent] = []
    for peer in peers.ALL:
        if case.name not in peer.cases:
            continue
        why, fn, note = peer.unavailable(device), peer.cases[case.name], peer.note
        if why and os.environ.get(REHEARSAL):
            scalar = peer.scalar or case.reduction == "mean"
            fn, note = (_mean_of(case) if scalar else case.tokens), f"stands in: {why}"
        elif why:
            found.append(Absent(peer.name, why))
            continue
        found.append(
            Provider(
                peer.name,
                "peers",
                fn,
                "mean" if peer.scalar or case.reduction == "mean" else "none",
                consumes=peer.consumes,
                note=note,
            )
        )
    return found


def available(
    case: Case, device: str, dtype: torch.dtype, phase: str, wanted: str | None = None
) -> tuple[list[Provider], list[Absent]]:
    """(providers that can try, the others) for one case.

    Args:
        case: the op and its options.
        device: "cpu" or "cuda".
        dtype: of the logits or hidden states.
        phase: "fwd" or "fwd_bwd".
        wanted: comma-separated names of providers or of GROUPS; None: all.
    """
    names = set(wanted.split(",")) if wanted and wanted != "all" else set(GROUPS)
    known = {*GROUPS, *OURS, *BASELINES, FLOOR, *(p.name for p in peers.ALL)}
    if not names <= known:
        raise ValueError(
            f"providers: expected some of {', '.join(sorted(known))}, got {min(names - known)!r}"
        )
    by_group: dict[str, Callable[[], list[Provider | Absent]]] = {
        "ours": lambda: _ours(case, device, dtype, phase),
        "baselines": lambda: _baselines(case, device, phase),
        "peers": lambda: _peers(case, device),
    }
    members = {
        "ours": {*OURS},
        "baselines": {*BASELINES, FLOOR},
        "peers": {p.name for p in peers.ALL},
    }
    found: list[Provider | Absent] = []
    for group, make in by_group.items():
        if group in names or members[group] & names:  # probing peers imports them: only if asked
            found += [p for p in make() if group in names or p.name in names]
    return (
        [p for p in found if isinstance(p, Provider)],
        [p for p in found if isinstance(p, Absent)],
    )
