"""What every rank of a small gloo group does with its shard of the vocabulary: the checks behind
`test_vocab_parallel.py`, which holds no process of its own.

A check is a function of `World`; it raises on the rank that sees something wrong. Each rank makes
the same whole rows from one seed, keeps the columns of its shard, and compares with independent
formulas over the whole vocabulary.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from cases import CASES, DTYPES, IGNORE, KINDS, Rows, make, plain_kl, plain_logp, values_and_grad
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import deepalign_kernels as dak
from deepalign_kernels.testing import assert_in_budget

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
        """Note a failed assertion and go on: the other ranks wait for this one's next collective."""
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
    """Value and gradient of the shard within the budget of the whole rows."""
    value, grad = values_and_grad(
        lambda r, **kw: ours(op, full, r, **kw),
        shard_of(full, a, b), process_group=w.group, **scores, **o,
    )  # fmt: skip
    gold = values_and_grad(CASES[op].plain, full.to("cpu", torch.float64), **scores)
    base = values_and_grad(CASES[op].plain, full.to("cpu", torch.float32), **scores)
    whole = gold[1].to(grad.dtype)
    whole[..., a:b] = grad
    everyone = [torch.empty_like(value) for _ in range(w.size)]
    dist.all_gather(everyone, value)
    with w.noting(f"{op} {scores}"):
        assert_in_budget("value", value, base[0], gold[0])
        assert_in_budget("gradient", whole, base[1], gold[1])
        assert all(torch.equal(x.nan_to_num(7.0), value.nan_to_num(7.0)) for x in everyone)


@check
def every_op_backend_dtype_and_cut(w: World) -> None:
    for op, backend, dtype, which in itertools.product(CASES, BACKENDS, DTYPES, (0, 1)):
        with dak.use_backend(backend):
            full = make(9, 101).to("cpu", dtype)
            hold(op, full, *w.cut(101, which), w, {})
            hold(op, full, *w.cut(101, which), w, {"temperature": 0.7, "softcap": 5.0})


@check
def hard_rows(w: World) -> None:
    """Confident, offset and masked rows; wide enough that the vector loops of the kernels run."""
    for op, backend, kind in itertools.product(CASES, BACKENDS, KINDS):
        with dak.use_backend(backend):
            for dtype in (torch.float32, torch.bfloat16):
                full = make(6, 5003, kind).to("cpu", dtype)
                with w.noting(f"{kind} {backend} {dtype}"):
                    hold(op, full, *w.cut(5003), w, {})


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
