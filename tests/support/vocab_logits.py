"""Checks of the logits-level ops over a process group (see `vocab_world.py`)."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from cases import (
    COMPLETE as CASES,
)
from cases import (
    DTYPES,
    IGNORE,
    KINDS,
    Rows,
    make,
    plain_constrained,
    plain_kl,
    plain_logp,
    truth,
    values_and_grad,
)
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from vocab_world import BACKENDS, World, check

import deepalign_kernels as dak
from deepalign_kernels.testing import EPS32, assert_in_budget


def vectors(full: Rows) -> tuple[Tensor, Tensor, Tensor]:
    return full.target, full.beta, full.grad


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
    fn = functools.partial(ours, op, full)
    value, grad = values_and_grad(fn, shard_of(full, a, b), process_group=w.group, **scores, **o)
    gold, base = truth(op, full, **scores)
    whole = gold[1].to(grad.dtype, copy=True)
    whole[..., a:b] = grad
    with w.noting(f"{op} {scores}"):
        w.alike(value)  # first: where an assertion fails, the rest of the block is left out
        assert_in_budget("value", value, base[0], gold[0])
        # One rounding more than plain torch: each shard's divergence is an fp32 number by the time
        # the ranks meet, and the gradient of policy_ref subtracts it.
        rounding = 2 * EPS32 * full.grad.abs().max() * gold[0].max()
        known = rounding if op == "token_kl/policy_ref" else 0.0
        assert_in_budget("gradient", whole, base[1] + known / 2, gold[1])


@check()
def every_op_backend_dtype_and_cut(w: World) -> None:
    for op, dtype, backend, which in itertools.product(CASES, DTYPES, BACKENDS, (0, 1)):
        with dak.use_backend(backend), w.noting(f"{backend} {dtype} {which}"):
            full = make(9, 101).to("cpu", dtype)
            for scores in ({}, {"temperature": 0.7, "softcap": 5.0})[: 2 - which]:
                hold(op, full, *w.cut(101, which), w, scores)


@check(2)
def hard_rows(w: World) -> None:
    """Confident, offset and masked rows; wide enough that the vector loops of the kernels run."""
    for (op, kind), backend in itertools.product(itertools.product(CASES, KINDS), BACKENDS):
        for dtype in (torch.float32, torch.bfloat16)[: 2 if kind.startswith("confident") else 1]:
            with dak.use_backend(backend), w.noting(f"{kind} {backend} {dtype}"):
                hold(op, make(6, 2003, kind).to("cpu", dtype), *w.cut(2003), w, {})


@check()
def fp64_is_exact(w: World) -> None:
    for op in CASES:
        full = make(9, 101).to("cpu", torch.float64)
        a, b = w.cut(101)
        fn = functools.partial(ours, op, full)
        got = values_and_grad(fn, shard_of(full, a, b), process_group=w.group)
        gold = values_and_grad(CASES[op].plain, full)
        with w.noting(op):
            torch.testing.assert_close(got, (gold[0], gold[1][:, a:b]), rtol=0, atol=1e-12)


@check()
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


@check()
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


@check()
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


@check()
def masked_shards(w: World) -> None:
    """Whole shards of -inf, in one model or both, and whole rows: as the plain op on whole rows."""
    full = make(9, 101)
    cuts = [w.cut(101, rank=r) for r in range(w.size)]
    (a, b), (c, d) = cuts[0], cuts[-1]
    full.policy[0, a:b] = full.ref[0, a:b] = -torch.inf  # no mass here for either
    full.policy[1, c:d] = full.ref[1, c:d] = -torch.inf
    full.policy[3, a:b] = -torch.inf  # KL(ref || policy) is infinite
    full.ref[4, a:b] = -torch.inf  # KL(policy || ref) is
    full.policy[6] = -torch.inf
    full.ref[7], full.beta[7] = -torch.inf, 0.0  # beta = 0 does not leave the reference out
    full.policy[8, c] = -torch.inf  # one column
    full.target[:5] = torch.tensor([a, c, IGNORE, a, a])
    for op, backend in itertools.product(CASES, BACKENDS):
        if op.endswith("ref_logp"):
            continue
        with dak.use_backend(backend), w.noting(f"{op} {backend}"):
            first, end = w.cut(101)
            r = shard_of(full, first, end)
            got = values_and_grad(CASES[op].ours, r, process_group=w.group)
            gold = values_and_grad(CASES[op].ours, full)
            gold = gold[0], gold[1][:, first:end]
            torch.testing.assert_close(got, gold, rtol=1e-5, atol=1e-5, equal_nan=True)


@check()
def shards_in_another_order(w: World) -> None:
    """vocab_start: the last columns on rank 0. Shards that overlap or leave a gap are seen."""
    full = make(9, 101)
    widths = [w.cut(101, rank=r) for r in range(w.size)]
    a, b = widths[w.size - 1 - w.rank]
    for op in ("token_logp", "constrained_loss/ref_logits"):
        hold(op, full, a, b, w, {}, vocab_start=a)
    full.policy[:, 5] = full.policy[:, 95] = full.ref[::3, 5] = full.ref[1::3, 95] = 100.0
    with w.noting("the first of two maxima"):
        q, p = full.policy[:, a:b], full.ref[:, a:b]
        got = dak.token_stats(q, p, process_group=w.group, vocab_start=a).top1_agree
        assert torch.equal(got, torch.arange(9) % 3 == 0)
    with w.noting("everyone at 0"):
        r = shard_of(full, 0, 30)
        logp = dak.token_logp(r.policy, r.target, process_group=w.group, vocab_start=0)
        assert logp[full.target != IGNORE].isnan().all()


@check()
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
            directions = "policy_ref", "ref_policy", "js"
            kl = [plain_kl(f.policy, f.ref, f.target, d) for d in directions]
            entropies = [torch.where(f.target == IGNORE, 0, -(x.exp() * x).sum(-1)) for x in (q, p)]
            logps = [plain_logp(x, f.target) for x in (f.policy, f.ref)]
            results.append([*logps, *kl, *entropies])
        with dak.use_backend(backend), w.noting(f"{backend} {kind}"):
            got = dak.token_stats(
                full.policy[:, a:b], full.ref[:, a:b], full.target, process_group=w.group
            )
            w.alike(torch.stack(got[:7]))
            for name, o, g, x in zip(got._fields[:7], got[:7], *results, strict=True):
                assert_in_budget(name, o, x, g)
            same = full.policy.argmax(-1) == full.ref.argmax(-1)
            assert torch.equal(got.top1_agree, same & (full.target != IGNORE))
        with dak.use_backend(backend), w.noting(f"{backend} {kind} bare"):
            bare = dak.token_stats(
                full.policy[:, a:b], full.ref[:, a:b], js_beta=None, process_group=w.group
            )
            assert bare.logp is None and bare.js is None and (bare.entropy != 0).all()


@check()
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


@check()
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


@check()
def a_group_of_one(w: World) -> None:
    alone = w.alone[w.rank]
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
    for other in w.alone[: w.rank] + w.alone[w.rank + 1 :]:
        with w.refused("process_group: this rank is not in"):
            dak.token_kl(full.policy, full.ref, process_group=other)


@check()
def no_rows(w: World) -> None:
    full = make(9, 101)
    a, b = w.cut(101)
    for op in (op for op in CASES if not op.endswith("ref_logp")):
        r = shard_of(Rows(full.policy[:0], full.ref[:0], *(x[:0] for x in vectors(full))), a, b)
        value, grad = values_and_grad(CASES[op].ours, r, process_group=w.group)
        with w.noting(op):
            assert value.shape == (0,) and grad.shape == (0, b - a)
    nothing = torch.full_like(full.target, IGNORE)
    leaf = full.policy[:, a:b].clone().requires_grad_()
    loss = dak.constrained_loss(
        leaf, nothing, beta=1.0, ref_logits=full.ref[:, a:b], process_group=w.group
    )
    loss.backward()
    with w.noting("all ignored"):
        assert loss == 0 and leaf.grad is not None and not leaf.grad.any()


@check()
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
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(w.group, "cpu")
    sharded = DTensor.from_local(x, mesh, [Shard(-1)], run_check=False)
    with w.refused("logits: is a DTensor"):
        dak.token_logp(sharded, t, process_group=w.group)
    hidden = torch.randn(9, 4)
    head = DTensor.from_local(torch.randn(b - a, 4), mesh, [Shard(0)], run_check=False)
    with w.refused("weight: is a DTensor"):
        dak.linear_token_logp(hidden, head, t, process_group=w.group)


@check(2)
def compiled(w: World) -> None:
    """One graph, collectives included, for every length."""
    from torch._dynamo.testing import CompileCounterWithBackend

    a, b = w.cut(65)
    for op in ("token_kl/js", "constrained_loss/ref_logits"):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")

        def loss(policy, ref, target, beta, op=op):
            r = Rows(policy, ref, target, beta, beta)
            return CASES[op].ours(r, process_group=w.group).square().sum()

        fast = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
        frames = 0
        for T in (5, 9):
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
