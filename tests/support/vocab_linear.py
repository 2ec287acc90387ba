"""Checks of the linear ops over a process group (see `vocab_world.py`)."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import linear_cases as lc
import torch
from cases import DTYPES, IGNORE, plain_logp
from linear_cases import Problem
from torch.distributed.tensor.debug import CommDebugMode
from vocab_world import BACKENDS, World, check

import deepalign_kernels as dak
from deepalign_kernels.testing import assert_in_budget

SHARDED = ("weight", "bias", "lora_b", "ref_weight", "ref_bias")


def local(p: Problem, a: int, b: int) -> Problem:
    cut = {k: x[a:b] for k in SHARDED if (x := getattr(p, k)) is not None}
    return dataclasses.replace(p, **cut)


def hold_linear(name: str, p: Problem, w: World, reduction: str, **kw: Any) -> None:
    a, b = w.cut(len(p.weight))
    mine = local(p, a, b).leaves()
    if name.endswith("ref_logp"):  # its formula takes it from the whole vocabulary
        wide = torch.float64 if p.hidden.dtype == torch.float64 else torch.float32
        gold = lc.plain_logits(p.leaves(torch.float64, ()))[1]
        ref_logp = plain_logp(gold, p.target, **lc._scores(p)).to(wide)
        value = dak.linear_constrained_loss(
            mine.hidden, mine.weight, mine.target, beta=mine.beta, ref_logp=ref_logp,
            reduction=reduction, process_group=w.group, **lc._head(mine), **kw,
        )  # fmt: skip
        got = lc._results(mine, value, reduction)
    else:
        got = lc.run_ours(name, mine, reduction, process_group=w.group, **kw)
    base = lc.run_plain(name, p.leaves(), reduction)
    gold = lc.run_plain(name, p.leaves(torch.float64), reduction)
    with w.noting(f"{name} {reduction} {kw}"):
        w.alike(got["value"], got["hidden"], *([got["lora_a"]] if "lora_a" in got else []))
        for key, x in got.items():
            whole = x
            if key in SHARDED:
                whole = gold[key].to(x.dtype)
                whole[a:b] = x
            if key == "value" and reduction != "none":
                tokens = (
                    lc.CASES[name].plain(p.leaves(d, ())).double() for d in (None, torch.float64)
                )
                lost = torch.sub(*tokens).abs().sum()
                lost = lost / (p.target != IGNORE).sum() if reduction == "mean" else lost
                base["value"] = gold["value"] + lost
            assert_in_budget(key, whole, base[key], gold[key])


@check(2, 3)
def linear_ops(w: World) -> None:
    for name, backend in itertools.product(lc.CASES, BACKENDS):
        kinds = [(torch.float32, False), *((dtype, True) for dtype in DTYPES)]
        for dtype, full in kinds if backend == BACKENDS[-1] else kinds[:2]:
            with dak.use_backend(backend), w.noting(f"{backend} {dtype} {full}"):
                p = lc.make(dtype=dtype, full=full)
                hold_linear(name, p, w, "none")
        with dak.use_backend(backend), w.noting(backend):
            p = lc.make()
            for reduction in lc.reductions(name)[1:]:
                hold_linear(name, p, w, reduction)
            hold_linear(name, p, w, "none", compact=False)
            # Chunks as small as can be: shards of different widths make different numbers of them.
            hold_linear(name, p, w, "none", max_workspace_bytes=24_000)


@check()
def linear_stats(w: World) -> None:
    p = lc.make()
    q = local(p, *w.cut(67))
    for backend in BACKENDS:
        with dak.use_backend(backend), w.noting(backend):
            results = []
            for x, o in ((q, {"process_group": w.group}), (p, {})):
                results.append(
                    dak.linear_token_stats(
                        x.hidden, x.weight, x.ref_hidden, x.ref_weight, x.target,
                        ref_bias=x.ref_bias, **lc._head(x), **o,
                    )
                )  # fmt: skip
            for name, x, y in zip(results[0]._fields, *results, strict=True):
                torch.testing.assert_close(x, y, rtol=2e-6, atol=5e-6, msg=lambda m, n=name: n + m)


@check()
def frozen_head_and_no_grad(w: World) -> None:
    p = lc.make()
    q = local(p, *w.cut(67))
    with w.noting("frozen"):
        mine, whole = q.leaves(None, ("hidden",)), p.leaves(None, ("hidden",))
        got = lc.run_ours("linear_token_logp", mine, "none", process_group=w.group)
        gold = lc.run_plain("linear_token_logp", whole, "none")
        torch.testing.assert_close(got, gold, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), w.noting("no_grad"):
        loss = lc.CASES["linear_constrained_loss/kl"].ours(q, process_group=w.group)
        assert not loss.requires_grad


@check()
def linear_collectives(w: World) -> None:
    """Per call and not per chunk; backward those of hidden and lora_a."""
    p = local(lc.make(), *w.cut(67))
    for name, case in lc.CASES.items():
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
