"""The logits-level ops beside independent formulas in plain torch, and the rows they are tried on.

A formula here is written from torch's own softmax and loss functions and never from
`deepalign_kernels.reference`: run in fp64 it is the truth, run in fp32 it sets the error budget.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import deepalign_kernels as dak
from deepalign_kernels import backends
from deepalign_kernels.testing import assert_in_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORE = -100


@dataclass(frozen=True)
class Rows:
    """One problem: logits [T, V], targets [T] (some ignored), beta [T] fp32, upstream gradient [T]
    fp32."""

    policy: Tensor
    ref: Tensor
    target: Tensor
    beta: Tensor
    grad: Tensor

    def to(self, device, dtype) -> Rows:
        d = torch.device(device)
        return Rows(
            self.policy.to(d, dtype),
            self.ref.to(d, dtype),
            *(x.to(d) for x in (self.target, self.beta, self.grad)),
        )


def _noise(T, V, g):
    return 4 * torch.randn(T, V, generator=g), 4 * torch.randn(T, V, generator=g)


def _confident(height):
    def make(T, V, g):
        p, r = _noise(T, V, g)
        p[torch.arange(T), torch.arange(T) * 7 % V] += height
        r[torch.arange(T), torch.arange(T) * 5 % V] += height
        return p, r

    return make


def _uniform(T, V, g):
    return torch.full((T, V), 2.5), torch.full((T, V), -1.0)


def _heavy(T, V, g):
    p, r = _noise(T, V, g)
    return (p.pow(3) / 8).clamp(-300, 300), (r.pow(3) / 8).clamp(-300, 300)


def _offset(policy_by, ref_by):
    def make(T, V, g):
        p, r = _noise(T, V, g)
        return p + policy_by, r + ref_by

    return make


def _masked_block(T, V, g):
    """The first half of the columns masked in both models: whole leading blocks of -inf for wide
    rows."""
    p, r = _noise(T, V, g)
    p[:, : V // 2] = r[:, : V // 2] = -torch.inf
    return p, r


def _close(T, V, g):
    p, _ = _noise(T, V, g)
    return p, p + 1e-2 * torch.randn(T, V, generator=g)


KINDS: dict[str, Callable] = {
    "noise": _noise,
    "confident_20": _confident(20.0),
    "confident_50": _confident(50.0),
    "uniform": _uniform,
    "heavy_tails": _heavy,
    "common_offset": _offset(1e3, 1e3),
    "offset_in_one_model": _offset(1e3, 0.0),
    "all_at_minus_1e4": _offset(-1e4, -1e4),
    "all_at_plus_1e4": _offset(1e4, 1e4),
    "leading_block_masked": _masked_block,
    "nearly_equal": _close,
}


def make(T: int, V: int, kind: str = "noise", seed: int = 0) -> Rows:
    g = torch.Generator().manual_seed(seed + 1000 * T + V)
    policy, ref = KINDS[kind](T, V, g)
    low = V // 2 if kind == "leading_block_masked" else 0
    target = torch.randint(low, V, (T,), generator=g)
    if kind.startswith("confident"):
        target[::2] = (torch.arange(T) * 7 % V)[::2]  # p_y close to 1: the cancellation in p_y - 1
    target[2::3] = IGNORE
    beta = torch.tensor([0.5, 2.0, 0.0, 0.1, 2.0]).repeat(T // 5 + 1)[:T]
    return Rows(policy, ref, target, beta, torch.randn(T, generator=g))


def _z(x: Tensor, temperature: float, softcap: float | None) -> Tensor:
    x = x.masked_fill(x == -torch.inf, -1e30)  # keeps 0 * inf out of the formula and its gradient
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    return x / temperature


def plain_logp(x, target, temperature=1.0, softcap=None):
    z = _z(x, temperature, softcap).reshape(-1, x.shape[-1])
    nll = F.cross_entropy(z, target.long().reshape(-1), ignore_index=IGNORE, reduction="none")
    return -nll.view(target.shape)


def plain_kl(policy, ref, target, direction, js_beta=0.5, temperature=1.0, softcap=None):
    q, p = (F.log_softmax(_z(x, temperature, softcap), -1) for x in (policy, ref))
    if direction == "js":
        q2, p2 = (
            q + torch.log(torch.tensor(1.0 - js_beta, dtype=q.dtype)),
            p + torch.log(torch.tensor(js_beta, dtype=q.dtype)),
        )
        m = torch.logaddexp(q2, p2)
        kl = js_beta * (p.exp() * (p - m)).sum(-1) + (1 - js_beta) * (q.exp() * (q - m)).sum(-1)
    else:
        a, b = (q, p) if direction == "policy_ref" else (p, q)
        kl = F.kl_div(b, a, reduction="none", log_target=True).sum(-1)
    return torch.where(target != IGNORE, kl, torch.zeros_like(kl))


def plain_entropy(logits, target, temperature=1.0, softcap=None):
    logp = F.log_softmax(_z(logits, temperature, softcap), -1)
    entropy = F.kl_div(torch.zeros_like(logp), logp, reduction="none", log_target=True).sum(-1)
    return torch.where(target != IGNORE, -entropy, torch.zeros_like(entropy))


def plain_constrained(
    policy, ref, target, beta, objective="exact", floor=0.0, temperature=1.0, softcap=None
):
    logp = plain_logp(policy, target, temperature, softcap)
    delta = plain_logp(ref, target, temperature, softcap).detach() - logp
    beta = beta.to(logp.dtype)
    if objective == "exact":
        safe = torch.where(beta > 0, beta, torch.ones_like(beta))
        loss = torch.where(beta > 0, -2 / safe * F.logsigmoid(-safe * delta), delta)
    else:
        weight = (2 * torch.sigmoid(beta * delta)).detach().clamp(min=floor)
        loss = -weight * logp
    return torch.where(target != IGNORE, loss, torch.zeros_like(loss))


@dataclass(frozen=True)
class Case:
    """`ours` and `plain` map (Rows, score options) to per-token values that depend on
    rows.policy."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    complete: bool = True  # has kernels on every backend, and a form over a process group


def _kl_case(direction, **kw):
    return Case(
        lambda r, **o: dak.token_kl(
            r.policy, r.ref, direction=direction, valid=r.target != IGNORE, **kw, **o
        ),
        lambda r, **o: plain_kl(r.policy, r.ref, r.target, direction, **kw, **o),
    )


def _constrained_case(given: bool, objective="exact", floor=0.0):
    def ours(r, **o):
        ref = {"ref_logits": r.ref}
        if given:
            gold = plain_logp(r.ref.double(), r.target, **o)
            ref = {
                "ref_logp": gold.to(
                    torch.float64 if r.policy.dtype == torch.float64 else torch.float32
                )
            }
        kw = dict(beta=r.beta, objective=objective, min_weight=floor, reduction="none")
        return dak.constrained_loss(r.policy, r.target, **ref, **kw, **o)

    return Case(
        ours,
        lambda r, **o: plain_constrained(r.policy, r.ref, r.target, r.beta, objective, floor, **o),
    )


CASES: dict[str, Case] = {
    "token_entropy": Case(
        lambda r, **o: dak.token_entropy(r.policy, valid=r.target != IGNORE, **o),
        lambda r, **o: plain_entropy(r.policy, r.target, **o),
        complete=False,
    ),
    "token_logp": Case(
        lambda r, **o: dak.token_logp(r.policy, r.target, **o),
        lambda r, **o: plain_logp(r.policy, r.target, **o),
    ),
    "token_kl/policy_ref": _kl_case("policy_ref"),
    "token_kl/ref_policy": _kl_case("ref_policy"),
    "token_kl/js": _kl_case("js"),
    "token_kl/js_0.1": _kl_case("js", js_beta=0.1),
    "constrained_loss/ref_logits": _constrained_case(False),
    "constrained_loss/ref_logp": _constrained_case(True),
    "constrained_loss/surrogate": _constrained_case(False, "surrogate", 0.2),
}


COMPLETE = {name: case for name, case in CASES.items() if case.complete}


def values_and_grad(fn: Callable[..., Tensor], rows: Rows, **options) -> tuple[Tensor, Tensor]:
    leaf = rows.policy.detach().requires_grad_()
    value = fn(Rows(leaf, rows.ref, rows.target, rows.beta, rows.grad), **options)
    (grad,) = torch.autograd.grad(value, leaf, rows.grad.to(value.dtype))
    return value.detach(), grad


FUSED = {  # case -> the internal op that gives value and gradient in one call
    "token_logp": "token_logp_fused",
    "token_kl/policy_ref": "token_kl_fused",
    "token_kl/ref_policy": "token_kl_fused",
    "token_kl/js": "token_kl_fused",
}


def fused(name: str, rows: Rows, temperature=1.0, softcap=None) -> tuple[Tensor, Tensor]:
    """(value, gradient) of CASES[name] from its fused op on the backend now chosen."""
    run = backends.choose(FUSED[name], rows.policy.device.type, rows.policy.dtype)
    x, y, tail = rows.policy[None], rows.ref[None], (temperature, softcap or 0.0)
    out = torch.empty_like(x)
    if name == "token_logp":
        return run(rows.grad, x, rows.target, IGNORE, *tail, out), out[0]
    direction = ("policy_ref", "ref_policy", "js").index(name.partition("/")[2])
    return run(rows.grad, x, y, rows.target != IGNORE, direction, 0.5, *tail, out), out[0]


_truths: dict[tuple, tuple] = {}


def truth(name: str, rows: Rows, **options) -> tuple[tuple, tuple]:
    """(value, gradient) of the formula in fp64, and the same in fp32. Kept for a while: all
    backends are tried on the same rows, one after another."""
    host = rows.to("cpu", rows.policy.dtype)
    tensors = host.policy, host.ref, host.target, host.beta, host.grad
    parts = [(x.dtype, x.shape, x.contiguous().view(-1).view(torch.uint8)) for x in tensors]
    key = name, *options.items(), *((d, s, x.numpy().tobytes()) for d, s, x in parts)
    if key not in _truths:
        if len(_truths) == 16:
            _truths.clear()
        _truths[key] = tuple(
            values_and_grad(CASES[name].plain, host.to("cpu", dtype), **options)
            for dtype in (torch.float64, torch.float32)
        )
    return _truths[key]


def check(name: str, rows: Rows, ours=None, **options) -> None:
    """Hold value and gradient of CASES[name] on these (already rounded) rows to the error budget;
    or `ours(name, rows, **options)` in their place."""
    case = CASES[name]
    if ours is None:
        ours = values_and_grad(case.ours, rows, **options)
    else:
        ours = ours(name, rows, **options)
    gold, base = truth(name, rows, **options)
    for what, o, b, g in zip(("value", "gradient"), ours, base, gold, strict=True):
        assert_in_budget(f"{name} {what}", o, b, g)


POISONS: dict[str, Callable[[Rows], Tensor]] = {  # what makes the first row's loss NaN
    "policy of only -inf": lambda r: r.policy[0].fill_(-torch.inf),
    "reference of only -inf": lambda r: r.ref[0].fill_(-torch.inf),
    "NaN in the policy": lambda r: r.policy[0, 5].fill_(torch.nan),
    "NaN in the reference": lambda r: r.ref[0, 5].fill_(torch.nan),
    "target out of range": lambda r: r.target[0].fill_(10**6),
    "negative beta": lambda r: r.beta[0].fill_(-0.5),
    "NaN in beta": lambda r: r.beta[0].fill_(torch.nan),
}


def check_poisoned(poison: str, beta: float, device: torch.device | str) -> None:
    """Loss, weight and the whole gradient of the row are NaN together, also where beta = 0 leaves
    the reference out of the formula of the gradient; the other rows are untouched."""
    modes = itertools.product(("none", "sum"), (False, True), ("exact", "surrogate"))
    for reduction, given, objective in modes:
        r = make(3, 61).to(device, torch.float32)
        r.beta.fill_(beta)
        POISONS[poison](r)
        ref = {"ref_logp": dak.token_logp(r.ref, r.target)} if given else {"ref_logits": r.ref}
        floor = 0.2 if objective == "surrogate" else 0.0
        leaf = r.policy.detach().requires_grad_()
        loss, parts = dak.constrained_loss(
            leaf, r.target, beta=r.beta, reduction=reduction, return_parts=True,
            objective=objective, min_weight=floor, **ref,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        what = (poison, beta, reduction, given, objective)
        tokens = loss if reduction == "none" else parts.weight
        for x in (tokens, parts.weight, grad):
            assert x[0].isnan().all() and torch.isfinite(x[1:]).all(), what
        assert loss.isnan().any(), what
