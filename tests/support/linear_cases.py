"""The linear ops beside independent formulas in plain torch.

`plain` forms the whole logits with F.linear and takes torch's own softmax; in fp64 it is the truth,
in the dtype under test it sets the error budget.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from cases import IGNORE, plain_constrained, plain_kl, plain_logp
from torch import Tensor

import deepalign_kernels as dak
from deepalign_kernels.ops.linear import gemm, plan
from deepalign_kernels.testing import assert_in_budget

TRAINED = ("hidden", "weight", "bias", "lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class Problem:
    """hidden [N, H], weight [V, H], LoRA of rank r, a reference of another hidden size, targets
    [N]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    ref_hidden: Tensor
    ref_weight: Tensor
    ref_bias: Tensor | None
    target: Tensor
    beta: Tensor
    grad: Tensor
    options: dict[str, Any]  # softcap, logit_scale, temperature, lora_scale

    def trained(self) -> dict[str, Tensor]:
        return {k: x for k in TRAINED if (x := getattr(self, k)) is not None}

    def leaves(self, dtype: torch.dtype | None = None, only: tuple[str, ...] = TRAINED) -> Problem:
        """A copy in `dtype` whose trained inputs are leaves; `only` those require a gradient."""
        changed = {}
        for field in dataclasses.fields(self):
            x = getattr(self, field.name)
            if isinstance(x, Tensor) and x.is_floating_point():
                x = x.detach().to(dtype or x.dtype).clone()
                changed[field.name] = x.requires_grad_(field.name in only)
        return dataclasses.replace(self, **changed)


FULL = {"softcap": 15.0, "logit_scale": 0.8, "temperature": 1.3, "lora_scale": 0.5}
PLAIN: dict[str, Any] = {}


def make(N=24, H=16, V=67, *, dtype=torch.float32, full=True, seed=0, device="cpu") -> Problem:
    """`full`: bias, LoRA and every option of the head; else the head alone. A third is ignored."""
    g = torch.Generator().manual_seed(seed + 100 * N + V)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    target = torch.randint(0, V, (N,), generator=g)
    target[1::3] = IGNORE
    beta = torch.tensor([0.5, 2.0, 0.0, 0.1]).repeat(N // 4 + 1)[:N]
    return Problem(
        hidden=randn(N, H),
        weight=randn(V, H),
        bias=randn(V) if full else None,
        lora_a=randn(3, H) if full else None,
        lora_b=randn(V, 3) if full else None,
        ref_hidden=randn(N, H // 2),
        ref_weight=randn(V, H // 2),
        ref_bias=randn(V) if full else None,
        target=target.to(device),
        beta=beta.to(device),
        grad=torch.randn(N, generator=g).to(device),
        options=FULL if full else PLAIN,
    )


def plain_logits(p: Problem) -> tuple[Tensor, Tensor]:
    """Both models' logits, unrounded after the products, softcap and temperature still to come."""
    weight = p.weight
    logits = F.linear(p.hidden, weight, p.bias)
    if p.lora_a is not None:
        low = F.linear(F.linear(p.hidden, p.lora_a), p.lora_b) * p.options["lora_scale"]
        logits = logits + low
    ref = F.linear(p.ref_hidden, p.ref_weight, p.ref_bias)
    wide = torch.float64 if p.hidden.dtype == torch.float64 else torch.float32
    scale = p.options.get("logit_scale", 1.0)
    return logits.to(wide) * scale, ref.to(wide).detach() * scale


def _scores(p: Problem) -> dict[str, Any]:
    return {k: p.options[k] for k in ("softcap", "temperature") if k in p.options}


def _head(p: Problem) -> dict[str, Any]:
    return {"bias": p.bias, "lora_a": p.lora_a, "lora_b": p.lora_b, **p.options}


def _ref(p: Problem) -> dict[str, Any]:
    return {"ref_hidden": p.ref_hidden, "ref_weight": p.ref_weight, "ref_bias": p.ref_bias}


@dataclasses.dataclass(frozen=True)
class Case:
    ours: Callable[..., Tensor]  # (problem, **keywords of the op)
    plain: Callable[[Problem], Tensor]  # per-token values
    scalar: bool = True  # the op has a reduction


def _kl(direction: str) -> Case:
    def ours(p: Problem, **kw: Any) -> Tensor:
        ref = _ref(p)
        return dak.linear_token_kl(
            p.hidden, p.weight, ref.pop("ref_hidden"), ref.pop("ref_weight"), direction=direction,
            valid=p.target != IGNORE, **ref, **_head(p), **kw,
        )  # fmt: skip

    return Case(ours, lambda p: plain_kl(*plain_logits(p), p.target, direction, **_scores(p)))


def _constrained(given: bool, kl_coef: float = 0.0) -> Case:
    def plain(p: Problem) -> Tensor:
        policy, ref = plain_logits(p)
        loss = plain_constrained(policy, ref, p.target, p.beta, **_scores(p))
        if kl_coef:
            loss = loss + kl_coef * plain_kl(policy, ref, p.target, "policy_ref", **_scores(p))
        return loss

    def ours(p: Problem, **kw: Any) -> Tensor:
        ref = _ref(p)
        if given:
            gold = plain_logp(plain_logits(p.leaves(torch.float64, ()))[1], p.target, **_scores(p))
            wide = torch.float64 if p.hidden.dtype == torch.float64 else torch.float32
            ref = {"ref_logp": gold.to(wide)}
        return dak.linear_constrained_loss(
            p.hidden, p.weight, p.target, beta=p.beta, kl_coef=kl_coef, **ref, **_head(p), **kw
        )

    return Case(ours, plain)


CASES: dict[str, Case] = {
    "linear_token_logp": Case(
        lambda p, **kw: dak.linear_token_logp(p.hidden, p.weight, p.target, **_head(p), **kw),
        lambda p: plain_logp(plain_logits(p)[0], p.target, **_scores(p)),
        scalar=False,
    ),
    "linear_token_kl/policy_ref": _kl("policy_ref"),
    "linear_token_kl/ref_policy": _kl("ref_policy"),
    "linear_token_kl/js": _kl("js"),
    "linear_constrained_loss/ref_logp": _constrained(given=True),
    "linear_constrained_loss/ref_hidden": _constrained(given=False),
    "linear_constrained_loss/kl": _constrained(given=False, kl_coef=0.3),
}


def reductions(name: str) -> tuple[str, ...]:
    return ("none", "sum", "mean") if CASES[name].scalar else ("none",)


def run_ours(name: str, p: Problem, reduction: str, **kw: Any) -> dict[str, Tensor]:
    """{"value": ..., and a gradient per trained input that requires one}."""
    if CASES[name].scalar:
        kw["reduction"] = reduction
    value = CASES[name].ours(p, **kw)
    return _results(p, value, reduction)


def run_plain(name: str, p: Problem, reduction: str) -> dict[str, Tensor]:
    value = CASES[name].plain(p)
    if reduction != "none":
        value = value.sum() / ((p.target != IGNORE).sum() if reduction == "mean" else 1)
    return _results(p, value, reduction)


def _results(p: Problem, value: Tensor, reduction: str) -> dict[str, Tensor]:
    leaves = {k: x for k, x in p.trained().items() if x.requires_grad}
    if not leaves:
        return {"value": value}
    upstream = (
        p.grad.detach().to(value.dtype) if reduction == "none" else torch.full_like(value, 1.5)
    )
    grads = torch.autograd.grad(value, list(leaves.values()), upstream)
    return {"value": value.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_right(name: str, p: Problem, reduction: str, only=TRAINED, **kw: Any) -> None:
    """Values and gradients within the error of plain torch in the same dtype, against fp64."""
    ours = run_ours(name, p.leaves(None, only), reduction, **kw)
    base = run_plain(name, p.leaves(None, only), reduction)
    gold = run_plain(name, p.leaves(torch.float64, only), reduction)
    assert ours.keys() == gold.keys()
    if (
        reduction != "none"
    ):  # errors may cancel in a sum: what plain torch loses is their absolute sum
        tokens = (CASES[name].plain(p.leaves(d, ())).double() for d in (None, torch.float64))
        lost = torch.sub(*tokens).abs().sum()
        lost = lost / (p.target != IGNORE).sum() if reduction == "mean" else lost
        base["value"] = gold["value"] + lost
    for key, value in ours.items():
        expected = torch.float32 if key == "value" else getattr(p, key).dtype
        assert value.dtype == (torch.float64 if p.hidden.dtype == torch.float64 else expected), key
        assert_in_budget(f"{name} {reduction} {key}", value, base[key], gold[key])


def _wide_mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    return torch.mm(a.to(out_dtype), b.to(out_dtype), out=out)


def _wide_addmm(
    total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta=1, alpha=1, out: Tensor
) -> Tensor:
    a, b = a.to(out_dtype), b.to(out_dtype)
    return torch.addmm(total, a, b, beta=beta, alpha=alpha, out=out)


@contextlib.contextmanager
def as_on_a_gpu(chunk: int = 4) -> Iterator[None]:
    """CPU tensors go the way of CUDA ones: its chunks and groups (here of `chunk` rows), 16-bit
    gradients of the scores, and GEMMs of 16-bit operands with an fp32 result."""
    rules = {"cpu": plan.Granularity(step=2, groups=True)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(plan.GRANULARITY, rules))
        stack.enter_context(mock.patch.object(plan, "DEFAULT_CHUNK", chunk))
        tiles = dict(TILE_SCORES=1, LEAST_TILE=24, TILE_STEP=8)
        stack.enter_context(mock.patch.multiple(plan, **tiles))
        for name in ("has_wide_gemm", "fast_16bit"):
            stack.enter_context(mock.patch.object(gemm, name, lambda *_: True))
        aten = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        aten.impl("mm.dtype_out", _wide_mm, "CPU")
        aten.impl("addmm.dtype_out", _wide_addmm, "CPU")
        yield
