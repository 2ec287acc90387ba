"""The loss of one trained token as a function of its log-probabilities: each formula in one place.

A rule takes three vectors of one shape, nats and fp32 or fp64, and gives two:

    loss, weight = rule(logp, ref_logp, beta)        d loss[t] / d logp[t] = -weight[t]

logp are the log-probabilities of the targets under the policy, ref_logp under the frozen reference,
beta the strength of the constraint. `weight` is what the token's cross-entropy gradient is
multiplied by. It is taken as it comes: a rule may hold part of its loss fixed. A rule that needs
no reference, or no beta, gives that argument the default None.

Who calls a rule has [T] vectors only, so plain torch is as fast as a kernel would be. The fused
kernels of `constrained_loss` have a copy of the paper's rule; tests hold them to this one.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

Rule = Callable[..., tuple[Tensor, Tensor]]
"""(loss, weight) [T] of a function of (logp, ref_logp, beta) [T]: what `objective=` takes beside a
name."""


def exact(logp: Tensor, ref_logp: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 3 of arXiv 2406.05946, Delta = ref_logp - logp:

        loss   = (2 / beta) softplus(beta Delta)      for beta = 0: Delta, its limit less a constant
        weight = 2 sigmoid(beta Delta)                (equation 5)

    A negative beta gives NaN.
    """
    delta, u, weight = _constraint(logp, ref_logp, beta)
    softplus = u.clamp(min=0.0) + torch.log1p(torch.exp(-u.abs()))
    loss = torch.where(beta == 0, delta, 2.0 * softplus / beta)
    return torch.where(beta < 0, torch.nan, loss), weight


def surrogate(
    logp: Tensor, ref_logp: Tensor, beta: Tensor, min_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What the authors' code computes (there min_weight = 1e-3): the weight of `exact`, with a
    floor, times the negative log-probability, the weight held fixed."""
    weight = _constraint(logp, ref_logp, beta)[2].clamp(min=min_weight)
    return weight * -logp, weight


def nll(
    logp: Tensor, ref_logp: Tensor | None = None, beta: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy: supervised fine-tuning."""
    return -logp, torch.ones_like(logp)


def dft(
    logp: Tensor, ref_logp: Tensor | None = None, beta: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Dynamic fine-tuning (arXiv 2508.05629): cross-entropy times the probability of the token,
    that held fixed. What the policy finds unlikely is hardly learnt."""
    p = logp.exp()
    return p * -logp, p


def _constraint(logp: Tensor, ref_logp: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Delta, beta Delta, 2 sigmoid(beta Delta)), with the edge cases of
    `reference/constrained_loss.py`."""
    delta = torch.where(logp == ref_logp, 0.0, ref_logp - logp)
    u = torch.where(beta == 0, 0.0, beta * delta)
    weight = torch.where((beta < 0) | delta.isnan(), torch.nan, 2.0 * torch.sigmoid(u))
    return delta, u, weight


RULES: dict[str, Rule] = {"exact": exact, "surrogate": surrogate, "nll": nll, "dft": dft}
KernelRule = Literal["exact", "surrogate"]
KERNELS = get_args(KernelRule)  # those that the kernels of constrained_loss have a copy of


class Objective(NamedTuple):
    """A rule as the torch ops carry it: they can hold a name and numbers, but no function."""

    name: str
    needs_reference: bool
    needs_beta: bool


def objective_of(objective: Any) -> Objective:
    """The rule that a caller means by a name or a function.

    A function gets a name that holds as long as the function itself (see `keep_alive`).

    Raises:
        ValueError: an unknown name, or a function that does not take (logp, ref_logp, beta).
    """
    if isinstance(objective, str) and objective in RULES:
        return _objective(objective, RULES[objective])
    if not callable(objective):
        raise ValueError(
            f"objective: expected one of {', '.join(map(repr, RULES))} or a function of (logp, "
            f"ref_logp, beta), got {objective!r}"
        )
    function = cast(Rule, objective)
    return _objective(_name_of(function), function)


# torch.compiler.assume_constant_result(objective_of), which would import torch._dynamo here.
objective_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run(
    name: str, min_weight: float, logp: Tensor, ref_logp: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(loss, weight) of the rule with this name; `min_weight` is that of "surrogate"."""
    given = {"min_weight": min_weight} if name == "surrogate" else {}
    rule = RULES[name] if name in RULES else _FUNCTIONS[name]
    loss, weight = rule(logp, ref_logp, beta, **given)
    for what, x in (("loss", loss), ("weight", weight)):
        if x.shape != logp.shape:
            raise ValueError(
                f"objective: expected {what} in the shape of logp, {tuple(logp.shape)}, from "
                f"{name!r}, got {tuple(x.shape)}"
            )
    return loss.to(logp.dtype), weight.to(logp.dtype)


def with_gradient(logp: Tensor, loss: Tensor, weight: Tensor) -> Tensor:
    """`loss` [...] whose gradient is -weight times that of `logp` [...]."""
    return loss.detach() - weight.detach() * (logp - logp.detach())


def keep_alive(objective: Any, result: Tensor) -> None:
    """The backward of `result` may call the function `objective` again, by its name. A compiled
    graph keeps the functions it was traced with."""
    if isinstance(objective, str) or torch.compiler.is_compiling():
        return
    if result.grad_fn is not None:
        node: Any = result.grad_fn
        node.metadata["deepalign objective"] = objective


@functools.cache
def _signature(name: str) -> tuple[bool, bool]:
    return _needs(RULES[name])


def _objective(name: str, rule: Rule) -> Objective:
    return Objective(name, *(_signature(name) if name in RULES else _needs(rule)))


def _needs(rule: Rule) -> tuple[bool, bool]:
    parameters = list(inspect.signature(rule).parameters.values())
    if len(parameters) < 3:
        raise ValueError(
            f"objective: expected a function of (logp, ref_logp, beta), got one of "
            f"({', '.join(p.name for p in parameters)})"
        )
    return tuple(p.default is p.empty for p in parameters[1:3])  # type: ignore[return-value]


# Functions by the names that stand for them in the ops' arguments.
_NAMES: weakref.WeakKeyDictionary[Rule, str] = weakref.WeakKeyDictionary()
_FUNCTIONS: weakref.WeakValueDictionary[str, Rule] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def _name_of(rule: Rule) -> str:
    if rule not in _NAMES:
        name = getattr(rule, "__qualname__", type(rule).__qualname__)
        _NAMES[rule] = f"{name}#{next(_numbers)}"
        _FUNCTIONS[_NAMES[rule]] = rule
    return _NAMES[rule]
