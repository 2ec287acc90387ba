"""What every rank of a small gloo group does with its shard of the vocabulary: the checks behind
`test_vocab_parallel.py`, which holds no process of its own.

A check is a function of `World`; it raises on the rank that sees something wrong. Each rank makes
the same whole rows from one seed, keeps the columns of its shard, and compares with independent
formulas over the whole vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import os
import re
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import linear_cases
import torch
import torch.distributed as dist
from cases import (
    CASES,
    DTYPES,
    IGNORE,
    KINDS,
    Rows,
    make,
    plain_constrained,
    plain_kl,
    plain_logp,
    values_and_grad,
)
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import deepalign_kernels as dak
from deepalign_kernels.testing import EPS32, assert_in_budget

# Shares of the columns per world size: uneven, one shard of a single column, first, middle or last.
CUTS = {2: ((40, 61), (100, 1)), 3: ((1, 60, 40), (33, 67, 1)), 4: ((40, 1, 37, 23), (25,) * 4)}
BACKENDS = ("eager", "native")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    wrong: list[str] = field(default_factory=list)  # what the check at hand has seen so far
    where: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def noting(self, where: str) -> Iterator[None]:
        """Note what fails and go on: the other ranks wait for this one's next collective."""
        self.where.append(where)
        try:
            yield
        except AssertionError as error:
            self.wrong.append(f"{', '.join(self.where)}: {error}")
        finally:
            self.where.pop()

    @property
    def group(self) -> Any:
        return dist.group.WORLD

    @contextlib.contextmanager
    def refused(self, match: str) -> Iterator[None]:
        """A ValueError with this message, on every rank alike."""
        with self.noting(match):
            try:
                yield
            except ValueError as error:
                assert re.search(match, str(error)), error
            else:
                raise AssertionError("nothing was refused")

    def alike(self, *mine: Tensor) -> None:
        """These must be the same bits on all ranks."""
        for x in mine:
            x = x.detach().nan_to_num(7.0).contiguous()
            everyone = [torch.empty_like(x) for _ in range(self.size)]
            dist.all_gather(everyone, x)
            assert all(torch.equal(x, y) for y in everyone), "ranks differ"

    def cut(self, V: int, which: int = 0) -> tuple[int, int]:
        """First column of this rank's shard, and the one after its last."""
        shares = CUTS[self.size][which]
        narrow = [s for s in shares if s == 1]
        wide = V - len(narrow)
        widths = [s if s == 1 else s * wide // (sum(shares) - len(narrow)) for s in shares]
        widths[max(range(self.size), key=lambda r: widths[r])] += V - sum(widths)
        ends = list(itertools.accumulate(widths))
        return ends[self.rank] - widths[self.rank], ends[self.rank]


CHECKS: dict[str, Callable[[World], None]] = {}


def check(fn: Callable[[World], None]) -> Callable[[World], None]:
    CHECKS[fn.__name__] = fn
    return fn


def shard_of(full: Rows, a: int, b: int) -> Rows:
    """Columns [a, b) as a view: its rows are as long as the whole ones."""
    return Rows(full.policy[:, a:b], full.ref[:, a:b], full.target, full.beta, full.grad)


def ours(op: str, full: Rows, r: Rows, **o: Any) -> Tensor:
    """CASES[op] on the shard `r` of `full`."""
    name, _, variant = op.partition("/")
    if name == "token_kl":
        o.pop("vocab_start", None)
    if variant == "ref_logp":
        scores = {k: v for k, v in o.items() if k in ("temperature", "softcap")}
        wide = torch.float64 if r.policy.dtype == torch.float64 else torch.float32
        ref_logp = plain_logp(full.ref.double(), full.target, **scores).to(wide)
        return dak.constrained_loss(
            r.policy, r.target, ref_logp=ref_logp, beta=r.beta, reduction="none", **o
        )
    return CASES[op].ours(r, **o)


def hold(op: str, full: Rows, a: int, b: int, w: World, scores: dict[str, Any], **o: Any) -> None:
    """Value and gradient of the shard within the budget of the whole rows, alike on all ranks."""
    value, grad = values_and_grad(
        functools.partial(ours, op, full), shard_of(full, a, b), process_group=w.group, **scores, **o
    )  # fmt: skip
    gold = values_and_grad(CASES[op].plain, full.to("cpu", torch.float64), **scores)
    base = values_and_grad(CASES[op].plain, full.to("cpu", torch.float32), **scores)
    whole = gold[1].to(grad.dtype)
    whole[..., a:b] = grad
    with w.noting(f"{op} {scores}"):
        assert_in_budget("value", value, base[0], gold[0])
        # One rounding more than plain torch: each shard's divergence is an fp32 number by the time
        # the ranks meet, and the gradient of policy_ref subtracts it.
        rounding = 2 * EPS32 * full.grad.abs().max() * gold[0].max()
        known = rounding if op == "token_kl/policy_ref" else 0.0
        assert_in_budget("gradient", whole, base[1] + known / 2, gold[1])
        w.alike(value)


@check
def every_op_backend_dtype_and_cut(w: World) -> None:
    for op, backend, dtype, which in itertools.product(CASES, BACKENDS, DTYPES, (0, 1)):
        with dak.use_backend(backend), w.noting(f"{backend} {dtype} {which}"):
            full = make(9, 101).to("cpu", dtype)
            hold(op, full, *w.cut(101, which), w, {})
            hold(op, full, *w.cut(101, which), w, {"temperature": 0.7, "softcap": 5.0})


@check
def hard_rows(w: World) -> None:
    """Confident, offset and masked rows; wide enough that the vector loops of the kernels run."""
    for op, backend, kind in itertools.product(CASES, BACKENDS, KINDS):
        for dtype in (torch.float32, torch.bfloat16):
            with dak.use_backend(backend), w.noting(f"{kind} {backend} {dtype}"):
                hold(op, make(6, 5003, kind).to("cpu", dtype), *w.cut(5003), w, {})


@check
def fp64_is_exact(w: World) -> None:
    for op in CASES:
        full = make(9, 101).to("cpu", torch.float64)
        a, b = w.cut(101)
        fn = functools.partial(ours, op, full)
        got = values_and_grad(fn, shard_of(full, a, b), process_group=w.group)
        gold = values_and_grad(CASES[op].plain, full)
        with w.noting(op):
            torch.testing.assert_close(got, (gold[0], gold[1][:, a:b]), rtol=0, atol=1e-12)


@check
def models_that_agree(w: World) -> None:
    """A divergence of exactly 0 and a gradient of exactly 0."""
    a, b = w.cut(5003)
    for op, backend in itertools.product([c for c in CASES if "kl" in c], BACKENDS):
        for dtype in DTYPES:
            full = make(6, 5003).to("cpu", dtype)
            r = shard_of(Rows(full.policy, full.policy.clone(), *vectors(full)), a, b)
            with dak.use_backend(backend), w.noting(f"{op} {backend} {dtype}"):
                value, grad = values_and_grad(CASES[op].ours, r, process_group=w.group)
                assert not value.any() and not grad.any()


@check
def targets_outside_of_every_shard(w: World) -> None:
    a, b = w.cut(101)
    full = make(9, 101)
    full.target[:] = torch.tensor([0, 100, 101, -1, -2, IGNORE, 39, 40, 10**12])
    bad = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0, 1], dtype=torch.bool)
    for op, backend in itertools.product(["token_logp", "constrained_loss/ref_logits"], BACKENDS):
        with dak.use_backend(backend), w.noting(f"{op} {backend}"):
            value, grad = values_and_grad(
                CASES[op].ours, shard_of(full, a, b), process_group=w.group
            )
            assert torch.equal(value.isnan(), bad) and torch.equal(grad.isnan().all(-1), bad)
            assert torch.equal(grad.isnan().any(-1), bad) and not grad[5].any() and value[5] == 0
    # An ignore_index that is a column, and one that is a column of another shard only.
    for ignored in (0, 100):
        with w.noting(f"ignore_index {ignored}"):
            logp = dak.token_logp(
                full.policy[:, a:b], full.target.clamp(0, 100).int(), ignore_index=ignored,
                process_group=w.group,
            )  # fmt: skip
            gold = full.policy.double().log_softmax(-1)
            gold = gold.gather(1, full.target.clamp(0, 100)[:, None])[:, 0]
            gold[full.target.clamp(0, 100) == ignored] = 0
            torch.testing.assert_close(logp.double(), gold, rtol=0, atol=1e-5)


@check
def ignored_rows_are_never_used(w: World) -> None:
    full = make(9, 101)
    a, b = w.cut(101)
    out = full.target == IGNORE
    for op, backend in itertools.product(CASES, BACKENDS):
        if op.endswith("ref_logp"):
            continue  # the same kernel as ref_logits; its formula here wants clean rows
        with dak.use_backend(backend), w.noting(f"{op} {backend}"):
            clean = values_and_grad(CASES[op].ours, shard_of(full, a, b), process_group=w.group)
            spoiled = Rows(*(x.clone() for x in (full.policy, full.ref, *vectors(full))))
            for x in (spoiled.policy, spoiled.ref, spoiled.beta, spoiled.grad):
                x[out] = torch.nan
            dirty = values_and_grad(CASES[op].ours, shard_of(spoiled, a, b), process_group=w.group)
            assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
            assert not dirty[0][out].any() and not dirty[1][out].any()


@check
def masked_shards(w: World) -> None:
    """Whole shards of -inf, in one model or both, and whole rows: as the plain op on whole rows."""
    full, size = make(9, 101), w.size
    cuts = [World(r, size).cut(101) for r in range(size)]
    (a, b), (c, d) = cuts[0], cuts[-1]
    full.policy[0, a:b] = full.ref[0, a:b] = -torch.inf  # no mass here for either
    full.policy[1, c:d] = full.ref[1, c:d] = -torch.inf
    full.policy[3, a:b] = -torch.inf  # KL(ref || policy) is infinite
    full.ref[4, a:b] = -torch.inf  # KL(policy || ref) is
    full.policy[6] = -torch.inf
    full.ref[7], full.beta[7] = -torch.inf, 1.0
    full.policy[8, c] = -torch.inf  # one column
    full.target[:5] = torch.tensor([a, c, IGNORE, a, a])
    for op, backend in itertools.product(CASES, BACKENDS):
        if op.endswith("ref_logp"):
            continue
        with dak.use_backend(backend), w.noting(f"{op} {backend}"):
            got = values_and_grad(
                CASES[op].ours, shard_of(full, *w.cut(101)), process_group=w.group
            )
            gold = values_and_grad(CASES[op].ours, full)
            own = slice(*w.cut(101))
            torch.testing.assert_close(got[0], gold[0], rtol=1e-5, atol=1e-5, equal_nan=True)
            torch.testing.assert_close(
                got[1], gold[1][:, own], rtol=1e-5, atol=1e-5, equal_nan=True
            )


@check
def shards_in_another_order(w: World) -> None:
    """vocab_start: the last columns on rank 0. Shards that overlap or leave a gap are seen."""
    full = make(9, 101)
    widths = [World(r, w.size).cut(101) for r in range(w.size)]
    a, b = widths[w.size - 1 - w.rank]
    for op in ("token_logp", "constrained_loss/ref_logits"):
        hold(op, full, a, b, w, {}, vocab_start=a)
    with w.noting("token_stats"):
        got = dak.token_stats(
            full.policy[:, a:b].round(), full.ref[:, a:b].round(), full.target,
            process_group=w.group, vocab_start=a,
        )  # fmt: skip
        top = [x.round().argmax(-1) for x in (full.policy, full.ref)]
        expected = (top[0] == top[1]) & (full.target != IGNORE)
        assert torch.equal(got.top1_agree, expected)
    with w.noting("everyone at 0"):
        r = shard_of(full, 0, 30)
        logp = dak.token_logp(r.policy, r.target, process_group=w.group, vocab_start=0)
        assert logp[full.target != IGNORE].isnan().all()


@check
def stats(w: World) -> None:
    a, b = w.cut(5003)
    for backend, kind in itertools.product(BACKENDS, ("noise", "confident_20", "nearly_equal")):
        full = make(12, 5003, kind)
        full.policy[:6] = full.policy[:6].round()  # ties for the first maximum
        full.ref[:6] = full.policy[:6]
        results = []
        for dtype in (torch.float64, torch.float32):
            f = full.to("cpu", dtype)
            q, p = f.policy.log_softmax(-1), f.ref.log_softmax(-1)
            kl = [
                plain_kl(f.policy, f.ref, f.target, d) for d in ("policy_ref", "ref_policy", "js")
            ]
            entropies = [torch.where(f.target == IGNORE, 0, -(x.exp() * x).sum(-1)) for x in (q, p)]
            logps = [plain_logp(x, f.target) for x in (f.policy, f.ref)]
            results.append([*logps, *kl, *entropies])
        with dak.use_backend(backend), w.noting(f"{backend} {kind}"):
            got = dak.token_stats(
                full.policy[:, a:b], full.ref[:, a:b], full.target, process_group=w.group
            )
            for name, o, g, x in zip(got._fields[:7], got[:7], *results, strict=True):
                assert_in_budget(name, o, x, g)
            same = full.policy.argmax(-1) == full.ref.argmax(-1)
            assert torch.equal(got.top1_agree, same & (full.target != IGNORE))
            w.alike(torch.stack(got[:7]))
            bare = dak.token_stats(
                full.policy[:, a:b], full.ref[:, a:b], js_beta=None, process_group=w.group
            )
            assert bare.logp is None and bare.js is None and (bare.entropy != 0).all()


@check
def reductions(w: World) -> None:
    full = make(9, 101)
    a, b = w.cut(101)
    count = (full.target != IGNORE).sum()
    variants = [
        ({"reduction": "mean"}, 1 / count),
        ({"reduction": "sum"}, 1.0),
        ({"normalizer": 7.0}, 1 / 7),
        ({"normalizer": torch.tensor(5.0)}, 1 / 5),
        ({"objective": "surrogate", "min_weight": 0.3}, 1 / count),
    ]
    for dtype, (o, scale) in itertools.product((torch.float32, torch.bfloat16), variants):
        r = full.to("cpu", dtype)
        results = []
        for wide in (torch.float64, torch.float32):
            leaf = r.policy.detach().to(wide, copy=True).requires_grad_()
            kind = ("surrogate", 0.3) if "objective" in o else ()
            tokens = plain_constrained(leaf, r.ref.to(wide), r.target, r.beta, *kind)
            (grad,) = torch.autograd.grad(tokens.sum() * scale, leaf)
            results.append(((tokens.sum() * scale).detach(), grad[:, a:b]))
        leaf = r.policy[:, a:b].clone().requires_grad_()
        loss, parts = dak.constrained_loss(
            leaf, r.target, ref_logits=r.ref[:, a:b], beta=r.beta, return_parts=True,
            process_group=w.group, **o,
        )  # fmt: skip
        loss.backward()
        with w.noting(f"{dtype} {o}"):
            torch.testing.assert_close(loss.double(), results[0][0].double(), rtol=2e-6, atol=2e-6)
            assert_in_budget("gradient", leaf.grad, results[1][1], results[0][1])
            gold = plain_logp(r.policy.double(), r.target)
            torch.testing.assert_close(parts.logp.double(), gold, rtol=0, atol=1e-5)


@check
def collectives(w: World) -> None:
    """One all-gather where the start is given, one more for the start, one for js; no backward."""
    full = make(9, 101)
    a, b = w.cut(101)
    one = {"token_logp": 2, "constrained_loss/ref_logits": 2, "token_kl/policy_ref": 1}
    for op, expected in (one | {"token_kl/ref_policy": 1, "token_kl/js": 2}).items():
        for start in (None, a):
            r = shard_of(full, a, b)
            leaf = r.policy.clone().requires_grad_()
            rows = Rows(leaf, r.ref, *vectors(full))
            with w.noting(f"{op} {start}"), CommDebugMode() as forward:
                value = ours(op, full, rows, process_group=w.group, vocab_start=start)
            with w.noting(f"{op} {start}"), CommDebugMode() as backward:
                value.sum().backward()
            saved = start is not None and not op.startswith("token_kl")
            with w.noting(f"{op} {start}"):
                assert forward.get_total_counts() == expected - saved, forward.get_comm_counts()
                assert backward.get_total_counts() == 0, backward.get_comm_counts()
    with CommDebugMode() as mode:
        dak.token_stats(full.policy[:, a:b], full.ref[:, a:b], full.target, process_group=w.group)
    with w.noting("token_stats"):
        assert mode.get_total_counts() <= 3, mode.get_comm_counts()
    p = local(linear_cases.make(), *w.cut(67))
    for name, case in linear_cases.CASES.items():
        if name.endswith("ref_logp"):
            continue
        if name.endswith("ref_logp"):
            continue  # the formula in its case wants the whole vocabulary
        q = p.leaves()
        with CommDebugMode() as forward:
            value = case.ours(q, process_group=w.group)
        with CommDebugMode() as backward:
            value.sum().backward()
        with w.noting(name):
            assert 1 <= forward.get_total_counts() <= 3, forward.get_comm_counts()
            assert backward.get_total_counts() == 2  # of hidden and of lora_a


@check
def a_group_of_one(w: World) -> None:
    groups = [dist.new_group([r]) for r in range(w.size)]
    alone = groups[w.rank]
    full = make(9, 101)
    for op in (op for op in CASES if not op.endswith("ref_logp")):
        got = values_and_grad(CASES[op].ours, full, process_group=alone)
        gold = values_and_grad(CASES[op].ours, full)
        with w.noting(op):
            assert all(torch.equal(x, y) for x, y in zip(got, gold, strict=True))
    with w.noting("vocab_start"):
        logp = dak.token_logp(full.policy, full.target + 7, ignore_index=IGNORE + 7,
            process_group=alone, vocab_start=7)  # fmt: skip
        torch.testing.assert_close(logp, dak.token_logp(full.policy, full.target))
    for other in groups[: w.rank] + groups[w.rank + 1 :]:
        with w.refused("process_group: this rank is not in"):
            dak.token_kl(full.policy, full.ref, process_group=other)


@check
def bad_input(w: World) -> None:
    full = make(9, 101)
    a, b = w.cut(101)
    x, t = full.policy[:, a:b], full.target
    with w.refused("process_group: expected a torch.distributed.ProcessGroup"):
        dak.token_logp(x, t, process_group="tp")
    with w.refused("vocab_start: expected None or an int >= 0, got -1"):
        dak.token_logp(x, t, process_group=w.group, vocab_start=-1)
    with w.refused("vocab_start: belongs to process_group"):
        dak.token_stats(x, x, t, vocab_start=3)
    with dak.checked():
        with w.refused("process_group: expected the same rows on all ranks"):
            n = 9 - (w.rank == 0)
            dak.token_logp(x[:n], t[:n], process_group=w.group)
        with w.refused("target: expected the same values on every rank"):
            dak.token_logp(x, t.clamp(0, 90) + (w.rank == 0), process_group=w.group)
        with w.refused(r"target: expected 0..100 or ignore_index -100, got 101 at position \[4\]"):
            wrong = t.clone()
            wrong[4] = 101
            dak.token_logp(x, wrong, process_group=w.group)
        dak.token_kl(x, x, process_group=w.group)
        dak.token_logp(x, t, process_group=w.group)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (w.size,))
    sharded = DTensor.from_local(x, mesh, [Shard(-1)], run_check=False)
    with w.refused("logits: is a DTensor"):
        dak.token_logp(sharded, t, process_group=w.group)
    hidden = torch.randn(9, 4)
    head = DTensor.from_local(torch.randn(b - a, 4), mesh, [Shard(0)], run_check=False)
    with w.refused("weight: is a DTensor"):
        dak.linear_token_logp(hidden, head, t, process_group=w.group)


def vectors(full: Rows) -> tuple[Tensor, Tensor, Tensor]:
    return full.target, full.beta, full.grad


# Linear ops

SHARDED = ("weight", "bias", "lora_b", "ref_weight", "ref_bias")


def local(p: linear_cases.Problem, a: int, b: int) -> linear_cases.Problem:
    cut = {k: x[a:b] for k in SHARDED if (x := getattr(p, k)) is not None}
    return dataclasses.replace(p, **cut)


def hold_linear(name: str, p: linear_cases.Problem, w: World, reduction: str, **kw: Any) -> None:
    a, b = w.cut(len(p.weight))
    mine = local(p, a, b).leaves()
    if name.endswith("ref_logp"):  # its formula takes it from the whole vocabulary
        wide = torch.float64 if p.hidden.dtype == torch.float64 else torch.float32
        gold = linear_cases.plain_logits(p.leaves(torch.float64, ()))[1]
        ref_logp = plain_logp(gold, p.target, **linear_cases._scores(p)).to(wide)
        value = dak.linear_constrained_loss(
            mine.hidden, mine.weight, mine.target, beta=mine.beta, ref_logp=ref_logp,
            reduction=reduction, process_group=w.group, **linear_cases._head(mine), **kw,
        )  # fmt: skip
        got = linear_cases._results(mine, value, reduction)
    else:
        got = linear_cases.run_ours(name, mine, reduction, process_group=w.group, **kw)
    base = linear_cases.run_plain(name, p.leaves(), reduction)
    gold = linear_cases.run_plain(name, p.leaves(torch.float64), reduction)
    with w.noting(f"{name} {reduction} {kw}"):
        w.alike(got["value"], got["hidden"], *([got["lora_a"]] if "lora_a" in got else []))
        for key, x in got.items():
            whole = x
            if key in SHARDED:
                whole = gold[key].to(x.dtype)
                whole[a:b] = x
            if key == "value" and reduction != "none":
                tokens = (
                    linear_cases.CASES[name].plain(p.leaves(d, ())).double()
                    for d in (None, torch.float64)
                )
                lost = torch.sub(*tokens).abs().sum()
                lost = lost / (p.target != IGNORE).sum() if reduction == "mean" else lost
                base["value"] = gold["value"] + lost
            assert_in_budget(key, whole, base[key], gold[key])


@check
def linear_ops(w: World) -> None:
    for name, backend in itertools.product(linear_cases.CASES, BACKENDS):
        for dtype, full in itertools.product(DTYPES, (True, False)):
            with dak.use_backend(backend), w.noting(f"{backend} {dtype} {full}"):
                p = linear_cases.make(dtype=dtype, full=full)
                hold_linear(name, p, w, "none")
        with dak.use_backend(backend), w.noting(backend):
            p = linear_cases.make()
            for reduction in linear_cases.reductions(name)[1:]:
                hold_linear(name, p, w, reduction)
            hold_linear(name, p, w, "none", compact=False)
            # Chunks as small as can be: shards of different widths make different numbers of them.
            hold_linear(name, p, w, "none", max_workspace_bytes=24_000)


@check
def linear_stats(w: World) -> None:
    p = linear_cases.make()
    q = local(p, *w.cut(67))
    for backend in BACKENDS:
        with dak.use_backend(backend), w.noting(backend):
            results = []
            for x, o in ((q, {"process_group": w.group}), (p, {})):
                results.append(
                    dak.linear_token_stats(
                        x.hidden, x.weight, x.ref_hidden, x.ref_weight, x.target,
                        ref_bias=x.ref_bias, **linear_cases._head(x), **o,
                    )
                )  # fmt: skip
            for name, x, y in zip(results[0]._fields, *results, strict=True):
                torch.testing.assert_close(x, y, rtol=2e-6, atol=5e-6, msg=lambda m, n=name: n + m)


@check
def frozen_head_and_no_grad(w: World) -> None:
    p = linear_cases.make()
    q = local(p, *w.cut(67))
    with w.noting("frozen"):
        mine, whole = q.leaves(None, ("hidden",)), p.leaves(None, ("hidden",))
        got = linear_cases.run_ours("linear_token_logp", mine, "none", process_group=w.group)
        gold = linear_cases.run_plain("linear_token_logp", whole, "none")
        torch.testing.assert_close(got, gold, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), w.noting("no_grad"):
        loss = linear_cases.CASES["linear_constrained_loss/kl"].ours(q, process_group=w.group)
        assert not loss.requires_grad


@check
def compiled(w: World) -> None:
    """One graph, collectives included, for every length."""
    from torch._dynamo.testing import CompileCounterWithBackend

    a, b = w.cut(65)
    for op in ("token_logp", "token_kl/policy_ref", "token_kl/js", "constrained_loss/ref_logits"):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")

        def loss(policy, ref, target, beta, op=op):
            r = Rows(policy, ref, target, beta, beta)
            return CASES[op].ours(r, process_group=w.group).square().sum()

        fast = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
        frames = 0
        for T in (5, 9, 17):
            r = shard_of(make(T, 65), a, b)
            grads = []
            for fn in (loss, fast):
                leaf = r.policy.clone().requires_grad_()
                value = fn(leaf, r.ref.contiguous(), r.target, r.beta)
                grads.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
            frames = frames or counter.frame_count
            with w.noting(op):
                torch.testing.assert_close(*grads)
        with w.noting(op):
            assert counter.frame_count == frames


def run(rank: int, size: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    world = World(rank, size)
    for name, fn in CHECKS.items():
        said = ""
        try:
            world.wrong.clear()
            fn(world)
            said = "\n".join(world.wrong)
        except Exception:
            said = traceback.format_exc(limit=-4)
        with open(f"{folder}/rank{rank}.jsonl", "a") as file:
            file.write(json.dumps([name, said]) + "\n")
        dist.barrier()
    dist.destroy_process_group()
