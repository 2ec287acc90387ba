"""What is measured: for each op its inputs, our call, the plain call, and the traffic an ideal one
needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import deepalign_kernels as dak
from benchmarks.harness import plain
from benchmarks.harness.plain import IGNORE, Inputs
from deepalign_kernels.traffic import ideal_bytes

PHASES = ("fwd", "fwd_bwd")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROW_INPUTS = frozenset("policy ref hidden ref_hidden target beta ref_logp upstream".split())


@dataclass(frozen=True)
class Shape:
    """T tokens, vocabulary V and, for the linear ops, hidden size H (0: the op starts from
    logits).
    """

    T: int
    V: int
    H: int = 0

    def __str__(self) -> str:
        return f"{self.T}x{self.H}x{self.V}" if self.H else f"{self.T}x{self.V}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        sizes = [int(n) for n in text.lower().split("x")]
        if len(sizes) not in (2, 3) or min(sizes) < 1:
            raise ValueError(f"shape: expected TxV, or TxHxV for the linear ops, got {text!r}")
        return cls(sizes[0], sizes[-1], sizes[1] if len(sizes) == 3 else 0)


@dataclass(frozen=True)
class Work:
    """What cannot be avoided: bytes read and written in main memory, floating-point operations in
    GEMMs.
    """

    read: int
    written: int
    flops: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def seconds(self, bytes_per_s: float, flops_per_s: float = float("inf")) -> float:
        return max(self.bytes / bytes_per_s, self.flops / flops_per_s)


@dataclass(frozen=True)
class Case:
    """One op. `ours` and `tokens` map inputs to per-token values; with reduction "mean", `ours` to
    a scalar.

    ops: internal ops per phase, named as in `backends.STEMS`; kernels: the same as keys of
    `traffic.IDEAL`. leaves: inputs that receive a gradient. vectors: bytes per token of everything
    [T], by phase. trained: the fraction of targets that is not ignored. row_gradients: gradients of
    row t depend on row t alone, so a few rows can be checked by themselves.
    """

    name: str
    ours: Callable[[Inputs], Tensor]
    tokens: Callable[[Inputs], Tensor]
    needs: tuple[str, ...]
    ops: dict[str, tuple[str, ...]]
    kernels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    vectors: tuple[int, int] = (0, 0)
    linear_work: Callable[[Shape, int, str], Work] | None = None
    leaves: tuple[str, ...] = ("policy",)
    reduction: str = "none"
    trained: float = 1.0

    @property
    def linear(self) -> bool:
        return self.linear_work is not None

    @property
    def phases(self) -> tuple[str, ...]:
        return tuple(self.ops)

    @property
    def row_gradients(self) -> bool:
        return not self.linear


def mean(x: Inputs, tokens: Tensor) -> Tensor:
    """Sum over trained tokens / their number, as `reduction="mean"` has it."""
    return tokens.sum() / (x["target"] != IGNORE).sum()


def traffic(case: Case, shape: Shape, itemsize: int, phase: str, cached: bool) -> tuple[int, int]:
    """(bytes read, bytes written) of a logits case, from `deepalign_kernels.traffic`; vectors [T]
    left out.

    cached: a kernel's second sweep over a row comes out of a cache.
    """
    parts = [
        ideal_bytes(op, shape.T, shape.V, itemsize, perfect_cache=cached)
        for op in case.kernels[phase]
    ]
    return sum(r for r, _ in parts), sum(w for _, w in parts)


def _logits_work(case: Case, shape: Shape, itemsize: int, phase: str) -> Work:
    """Each internal op reads each of its inputs once and writes each output once."""
    read, written = traffic(case, shape, itemsize, phase, cached=True)
    return Work(read + case.vectors[PHASES.index(phase)] * shape.T, written)


def _kl_ours(direction: str) -> Callable[[Inputs], Tensor]:
    def ours(x: Inputs) -> Tensor:
        kw = {"direction": direction, "js_beta": plain.JS_BETA, "valid": x.get("valid")}
        return dak.token_kl(x["policy"], x["ref"], **kw)

    return ours


def _constrained_ours(given: str) -> Callable[[Inputs], Tensor]:
    def ours(x: Inputs) -> Tensor:
        ref_logits, ref_logp = (x["ref"], None) if given == "ref" else (None, x["ref_logp"])
        value = dak.constrained_loss(
            x["policy"],
            x["target"],
            beta=x["beta"],
            ref_logits=ref_logits,
            ref_logp=ref_logp,
            ignore_index=IGNORE,
        )
        assert isinstance(value, Tensor)
        return value

    return ours


def _stats_ours(x: Inputs) -> Tensor:
    return stats_rows(dak.token_stats(x["policy"], x["ref"], x["target"], js_beta=plain.JS_BETA))


def stats_rows(s: dak.TokenStats) -> Tensor:
    """[7, T], in the order of `plain.token_stats`."""
    rows = (s.logp, s.ref_logp, s.kl_policy_ref, s.kl_ref_policy, s.js, s.entropy, s.ref_entropy)
    return torch.stack([row for row in rows if row is not None])


def _kl_case(direction: str, tokens: Callable[[Inputs], Tensor]) -> Case:
    fwd = "token_kl_fwd_js" if direction == "js" else "token_kl_fwd"
    return Case(
        name=f"token_kl/{direction}",
        ours=_kl_ours(direction),
        tokens=tokens,
        needs=("policy", "ref", "target"),
        ops={"fwd": ("token_kl_fwd",), "fwd_bwd": ("token_kl_fwd", "token_kl_bwd")},
        kernels={"fwd": (fwd,), "fwd_bwd": (fwd, "token_kl_bwd")},
        # fwd: kl, two normaliser pairs and the center out; bwd: those but kl, and upstream, in.
        vectors=(24, 48),
    )


def _constrained_case(given: str, tokens: Callable[[Inputs], Tensor]) -> Case:
    tail = "" if given == "ref_logp" else "_ref_logits"
    return Case(
        name=f"constrained_loss/{given if given == 'ref_logp' else 'ref_logits'}",
        ours=_constrained_ours(given),
        tokens=tokens,
        needs=("policy", "target", "beta", given),
        ops={"fwd": ("constrained_loss_fwd",), "fwd_bwd": ("constrained_loss_fused", "scale_grad")},
        kernels={
            "fwd": (f"constrained_loss_fwd{tail}",),
            "fwd_bwd": (f"constrained_loss_fused{tail}",),  # scale_grad moves nothing for factor 1
        },
        # target and beta (and ref_logp) in; loss, logp, ref_logp, weight (and the normaliser) out.
        vectors=(36, 28) if tail else (40, 32),
        reduction="mean",
    )


_ALL = (
    Case(
        name="token_logp",
        ours=lambda x: dak.token_logp(x["policy"], x["target"], ignore_index=IGNORE),
        tokens=plain.token_logp,
        needs=("policy", "target"),
        ops={"fwd": ("token_logp_fwd",), "fwd_bwd": ("token_logp_fwd", "token_logp_bwd")},
        kernels={"fwd": ("token_logp_fwd",), "fwd_bwd": ("token_logp_fwd", "token_logp_bwd")},
        vectors=(20, 40),
    ),
    _kl_case("policy_ref", plain.token_kl_policy_ref),
    _kl_case("ref_policy", plain.token_kl_ref_policy),
    _kl_case("js", plain.token_kl_js),
    _constrained_case("ref", plain.constrained_ref_logits),
    _constrained_case("ref_logp", plain.constrained_ref_logp),
    Case(
        name="token_entropy",
        ours=lambda x: dak.token_entropy(x["policy"], valid=x.get("valid")),
        tokens=plain.token_entropy,
        needs=("policy", "target"),
        ops={"fwd": ("token_entropy_fwd",), "fwd_bwd": ("token_entropy_fwd", "token_entropy_bwd")},
        kernels={
            "fwd": ("token_entropy_fwd",),
            "fwd_bwd": ("token_entropy_fwd", "token_entropy_bwd"),
        },
        vectors=(12, 28),  # fwd: entropy and normaliser out; bwd: those and upstream in
    ),
    Case(
        name="token_stats",
        ours=_stats_ours,
        tokens=plain.token_stats,
        needs=("policy", "ref", "target"),
        ops={"fwd": ("token_stats_fwd",)},
        kernels={"fwd": ("token_stats_fwd_js",)},
        vectors=(40, 40),
        leaves=(),
    ),
)
LOGITS = {case.name: case for case in _ALL}


def select(table: dict[str, Case], names: str | None) -> list[Case]:
    """Cases whose name, or whose name before the slash, is in the comma-separated `names`; None:
    all.
    """
    if not names:
        return list(table.values())
    wanted = names.split(",")
    known = {*table, *(name.partition("/")[0] for name in table)}
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"ops: expected some of {', '.join(sorted(known))}, got {unknown[0]!r}")
    return [c for c in table.values() if {c.name, c.name.partition("/")[0]} & set(wanted)]


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: str, *, trained: float = 1.0, seed: int = 0
) -> Inputs:
    """One input set: two models' logits (or hidden states and heads), targets, beta, upstream
    gradient.

    Logits have standard deviation 2; every fourth target stands 20 above them, where p - 1 cancels.
    Of the targets a fraction `trained` is kept and the rest, spread evenly, is IGNORE.
    """
    g = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=g, device=device).mul_(std)

    T, V, H = shape.T, shape.V, shape.H
    target = torch.randint(V, (T,), generator=g, device=device)
    x: Inputs = {"beta": torch.tensor([0.5, 2.0, 0.1], device=device).repeat(T // 3 + 1)[:T]}
    if H:
        for name in ("", "ref_"):
            x[name + "hidden"] = normal(T, H).to(dtype)
            x[name + "weight"] = normal(V, H, std=2 * H**-0.5).to(dtype)
    else:
        for name in ("policy", "ref"):
            logits = normal(T, V, std=2.0)
            logits[::4].scatter_add_(1, target[::4, None], torch.full_like(logits[::4, :1], 20.0))
            x[name] = logits.to(dtype)
    x["ref_logp"] = -normal(T).abs() - 1
    x["upstream"] = normal(T)
    return masked({**x, "target": target}, trained)


def masked(x: Inputs, trained: float) -> Inputs:
    """With a fraction `trained` of the targets kept and the rest, spread evenly, IGNORE."""
    target = x["target"]
    rows = torch.arange(len(target), device=target.device)
    kept = ((rows + 1) * trained).long() > (rows * trained).long()
    x = {**x, "target": torch.where(kept, target, torch.full_like(target, IGNORE))}
    return {**x, "valid": x["target"] != IGNORE} if trained < 1 else x


def for_case(case: Case, inputs: Inputs) -> Inputs:
    """The inputs this case uses, with fresh leaves."""
    inputs = masked(inputs, case.trained) if case.trained < 1 else inputs
    names = {*case.needs, "target", "upstream", "valid"} & inputs.keys()
    return {
        n: inputs[n].detach().requires_grad_() if n in case.leaves else inputs[n] for n in names
    }


def rotated(inputs: Inputs, by: int) -> Inputs:
    """The same problem at other addresses: rows rolled by `by`, weights copied."""
    return {
        n: x.roll(by, 0) if n in ROW_INPUTS or n == "valid" else x.clone()
        for n, x in inputs.items()
    }


def first_rows(inputs: Inputs, n: int) -> Inputs:
    """The first n tokens of the inputs of a logits case."""
    tokens = inputs["target"].shape[0]
    cut = {k: v.detach()[:n] if v.shape[:1] == (tokens,) else v for k, v in inputs.items()}
    return {k: v.requires_grad_(inputs[k].requires_grad) for k, v in cut.items()}


def work_of(case: Case, shape: Shape, itemsize: int, phase: str, trained: float = 1.0) -> Work:
    """Ideal work of a case; rows that are left out are neither read nor multiplied, their gradient
    is written.
    """
    trained *= case.trained
    if case.linear_work:
        full = case.linear_work(shape, itemsize, phase)
    else:
        full = _logits_work(case, shape, itemsize, phase)
    return replace(full, read=int(full.read * trained), flops=int(full.flops * trained))
