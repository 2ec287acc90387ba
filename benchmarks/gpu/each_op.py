"""Every internal op once: what the sanitizers and ncu look at, and what `sweep` times.

python -m benchmarks each_op --backend native [--shapes 6x4096,6x50257] [--ops token_kl_fwd]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.logits import DTYPES, Shape, make_inputs
from benchmarks.harness import machine
from benchmarks.harness.plain import IGNORE, JS_BETA
from deepalign_kernels import backends, use_backend
from deepalign_kernels.traffic import IDEAL, ideal_bytes

POLICY_REF, _, JS = range(3)  # directions, as the internal ops number them
TAIL = (1.0, 0.0)  # temperature, no softcap


@dataclass(frozen=True)
class Call:
    """One internal op in one mode.

    name: a key of `traffic.IDEAL` where there is one. args: its inputs; a gradient is written to
    the last of them where `writes`.
    """

    name: str
    op: str
    args: tuple[Any, ...]
    writes: bool = False

    @property
    def logits(self) -> Tensor:
        return next(a for a in self.args if isinstance(a, Tensor) and a.dim() == 3)

    def on(self, backend: str) -> Callable[[], tuple[Tensor, ...]]:
        """A call on `backend` that returns all that was made, the gradient last."""
        with use_backend(backend):
            implementation = backends.choose(self.op, self.logits.device.type, self.logits.dtype)

        def run() -> tuple[Tensor, ...]:
            made: Any = implementation(*self.args)
            made = () if made is None else made if isinstance(made, tuple | list) else (made,)
            return (*made, self.args[-1]) if self.writes else tuple(made)

        return run

    def bytes(self, shape: Shape, itemsize: int) -> int:
        """What it cannot avoid to move; 0 where nobody declared it."""
        key = self.name if self.name in IDEAL else self.op
        if key not in IDEAL:
            return 0
        return sum(ideal_bytes(key, shape.T, shape.V, itemsize, perfect_cache=True))


def calls(shape: Shape, dtype: torch.dtype, device: str, backend: str = "auto") -> list[Call]:
    """Every op of `backends.OPS`, those with a Jensen-Shannon mode or two ways to give the
    reference twice. Small inputs are drawn on the CPU, so that on a GPU no kernel but this
    library's runs; normalisers are those of the forward ops of `backend`.
    """
    large = shape.T * shape.V > 1 << 24
    x = make_inputs(shape, dtype, device if large else "cpu")
    x = {name: value.to(device) for name, value in x.items()}
    q, p = x["policy"][None], x["ref"][None]
    y, beta, given, grad = (x[n] for n in ("target", "beta", "ref_logp", "upstream"))
    out = torch.zeros_like(q) if not large else torch.empty_like(q)
    scale = torch.tensor(0.5).to(device)
    valid = None

    def kl(direction: int) -> tuple[Any, ...]:
        return direction, JS_BETA, *TAIL

    found = [
        Call("token_logp_fwd", "token_logp_fwd", (q, y, IGNORE, *TAIL)),
        Call("token_kl_fwd", "token_kl_fwd", (q, p, valid, *kl(POLICY_REF))),
        Call("token_kl_fwd_js", "token_kl_fwd", (q, p, valid, *kl(JS))),
    ]
    norm = found[0].on(backend)()[1]
    _, norm_q, norm_p, center = found[1].on(backend)()
    js_center = found[2].on(backend)()[3]
    back = (grad, q, p, valid, norm_q, norm_p)
    found += [
        Call("token_logp_bwd", "token_logp_bwd", (grad, q, y, norm, IGNORE, *TAIL, out), True),
        Call("token_kl_bwd", "token_kl_bwd", (*back, center, *kl(POLICY_REF), out), True),
        Call("token_kl_bwd_js", "token_kl_bwd", (*back, js_center, *kl(JS), out), True),
        Call("token_logp_fused", "token_logp_fused", (grad, q, y, IGNORE, *TAIL, out), True),
    ]
    for name, direction in (("token_kl_fused", POLICY_REF), ("token_kl_fused_js", JS)):
        found.append(Call(name, "token_kl_fused", (grad, q, p, valid, *kl(direction), out), True))
    for name, ref in (("", (None, given)), ("_ref_logits", (p, None))):
        rest = (IGNORE, False, 0.0, *TAIL)
        op = "constrained_loss_fwd"
        found.append(Call(op + name, op, (q, y, beta, *ref, *rest)))
        op = "constrained_loss_fused"
        found.append(Call(op + name, op, (q, y, beta, *ref, scale, *rest, out), True))
    for name, js_beta in (("token_stats_fwd", 0.0), ("token_stats_fwd_js", JS_BETA)):
        args = (q, p, y, valid, IGNORE, js_beta, *TAIL)
        found.append(Call(name, "token_stats_fwd", args))
    parts = (q, p, valid, norm_q, norm_p, JS_BETA, *TAIL)
    found.append(Call("token_js_parts", "token_js_parts", parts))
    entropy, norm = Call("token_entropy_fwd", "token_entropy_fwd", (q, valid, *TAIL)).on(backend)()
    found.append(Call("token_entropy_fwd", "token_entropy_fwd", (q, valid, *TAIL)))
    args = (grad, q, valid, norm, entropy, *TAIL, out)
    found.append(Call("token_entropy_bwd", "token_entropy_bwd", args, True))
    flip = torch.tensor(-1.0).to(device)  # a factor that changes nothing but signs
    found.append(Call("scale_grad", "scale_grad", (out, flip)))
    return found


def select(found: list[Call], wanted: str | None) -> list[Call]:
    names = set(wanted.split(",")) if wanted else None
    known = {c.name for c in found} | {c.op for c in found}
    if names and not names <= known:
        raise ValueError(f"ops: expected some of {', '.join(sorted(known))}, got {min(names)!r}")
    return [c for c in found if names is None or {c.name, c.op} & names]


def command(argv: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Exit status 1 where the backend has none of the ops, or a result holds a NaN."""
    p = argparse.ArgumentParser(prog="python -m benchmarks each_op", description=__doc__)
    p.add_argument("--backend", choices=backends.BACKENDS, default="native")
    p.add_argument("--shapes", default="6x4096,6x50257,6x128256", help="comma-separated TxV")
    p.add_argument("--dtype", choices=DTYPES, default="bf16")
    p.add_argument("--ops", help="comma-separated; default all")
    p.add_argument("--device", choices=("cpu", "cuda"), default=machine.default_device())
    args = p.parse_args(argv)
    dtype, ran, wrong = DTYPES[args.dtype], 0, 0
    for shape in map(Shape.parse, args.shapes.split(",")):
        for call in select(calls(shape, dtype, args.device, args.backend), args.ops):
            if why := backends.unavailable(args.backend, call.op, args.device, dtype):
                say(f"{shape} {call.name}: not run: {why}")
                continue
            made = call.on(args.backend)()
            # On the host, so that no kernel of anybody else is looked at.
            bad = any(m.cpu().isnan().any() for m in made)
            say(f"{shape} {call.name}: {'NaN' if bad else 'ran'}")
            ran, wrong = ran + 1, wrong + bad
    say(f"{ran} calls on {args.backend}, {wrong} with a NaN")
    return 0 if ran and not wrong else 1
