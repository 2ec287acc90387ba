"""The linear ops: hidden states and head weights in, the [T, V] logits never whole in memory.

A case whose op this version of the library does not have yet is still listed: its baselines and
peers run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import deepalign_kernels as dak
from benchmarks.cases.logits import Case, Shape, Work, stats_rows
from benchmarks.harness import plain
from benchmarks.harness.plain import IGNORE, Inputs


def _work(models: int, frozen: bool) -> Callable[[Shape, int, str], Work]:
    """GEMMs that no method avoids: logits of each model, then dX and, unless the head is frozen,
    dW.
    """

    def work(shape: Shape, itemsize: int, phase: str) -> Work:
        gemm = 2 * shape.T * shape.H * shape.V
        hidden, weight = shape.T * shape.H * itemsize, shape.V * shape.H * itemsize
        read = models * (hidden + weight)
        if phase == "fwd":
            return Work(read, 4 * shape.T, models * gemm)
        written = 4 * shape.T + hidden + (0 if frozen else weight)
        return Work(read, written, (models + 1 + (not frozen)) * gemm)

    return work


def products(case: Case, phase: str) -> Callable[[Inputs], Tensor]:
    """The matrix products of a case alone: of all tokens, in the dtype of the inputs, into
    memory that stays.
    """
    memory: dict[str, Tensor] = {}

    def into(name: str, a: Tensor, b: Tensor) -> Tensor:
        if name not in memory:
            memory[name] = a.new_empty(a.shape[0], b.shape[1])
        return torch.mm(a, b, out=memory[name])

    @torch.no_grad()
    def run(x: Inputs) -> Tensor:
        hidden, weight = x["hidden"], x["weight"]
        if "ref_weight" in x:
            into("logits", x["ref_hidden"], x["ref_weight"].t())
        dz = into("logits", hidden, weight.t())
        if phase == "fwd_bwd":
            into("hidden", dz, weight)
            if "weight" in case.leaves:
                into("weight", dz.t(), hidden)
        return dz

    return run


def _linear(tokens: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    return lambda x: tokens(plain.with_logits(x))


def _call(name: str) -> Callable[..., Any]:
    """The public op; older versions of the library lack some (see `providers`)."""
    return getattr(dak, name)


def _logp(x: Inputs) -> Tensor:
    return _call("linear_token_logp")(x["hidden"], x["weight"], x["target"], ignore_index=IGNORE)


def _kl(direction: str) -> Callable[[Inputs], Tensor]:
    def ours(x: Inputs) -> Tensor:
        heads = (x["hidden"], x["weight"], x["ref_hidden"], x["ref_weight"])
        return _call("linear_token_kl")(*heads, direction=direction, valid=x.get("valid"))

    return ours


def _constrained(x: Inputs) -> Tensor:
    kw = {"beta": x["beta"], "ref_logp": x["ref_logp"], "ignore_index": IGNORE}
    return _call("linear_constrained_loss")(x["hidden"], x["weight"], x["target"], **kw)


def _stats(x: Inputs) -> Tensor:
    heads = (x["hidden"], x["weight"], x["ref_hidden"], x["ref_weight"])
    return stats_rows(_call("linear_token_stats")(*heads, x["target"], js_beta=plain.JS_BETA))


def _case(name: str, ours: Any, tokens: Any, needs: str, rows: str, **more: Any) -> Case:
    """rows: the logits op whose backends the linear op uses for each chunk of logits."""
    frozen, models = name.endswith("frozen_head"), 2 if "ref_weight" in needs else 1
    ops: dict[str, tuple[str, ...]] = {"fwd": (f"{rows}_fwd",)}
    if rows != "token_stats":
        ops["fwd_bwd"] = (*ops["fwd"], f"{rows}_bwd")
    return Case(
        name=f"linear_{name}",
        ours=ours,
        tokens=_linear(tokens),
        needs=("hidden", "weight", "target", *needs.split()),
        ops=ops,
        linear_work=_work(models, frozen),
        leaves=("hidden",) if frozen else ("hidden", "weight"),
        **more,
    )


_HEADS = "ref_hidden ref_weight"
_LOGP = (_logp, plain.token_logp, "", "token_logp")
_CONSTRAINED = (_constrained, plain.constrained_ref_logp, "ref_logp beta", "token_logp")
_ALL = (
    _case("token_logp", *_LOGP),
    _case("token_logp/frozen_head", *_LOGP),
    _case("token_kl/policy_ref", _kl("policy_ref"), plain.token_kl_policy_ref, _HEADS, "token_kl"),
    _case("token_kl/js", _kl("js"), plain.token_kl_js, _HEADS, "token_kl"),
    _case("constrained_loss", *_CONSTRAINED, reduction="mean"),
    _case("constrained_loss/frozen_head", *_CONSTRAINED, reduction="mean"),
    _case("constrained_loss/70% masked", *_CONSTRAINED, reduction="mean", trained=0.3),
    _case("token_stats", _stats, plain.token_stats, _HEADS, "token_stats"),
)
LINEAR = {case.name: case for case in _ALL}
