"""Small gloo groups in which every rank holds a shard of the vocabulary, and checks in them.

A check is a function of `World`, in `vocab_logits.py` or `vocab_linear.py`. Each rank makes the
same whole rows from one seed, keeps the columns of its shard, and compares with independent
formulas over the whole vocabulary. Starting processes costs more than the checks do, so they are
started once for all groups, and `test_vocab_parallel.py` reads what they say.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from deepalign_kernels import backends

# Shares of the columns per world size: uneven, one shard of a single column, first, middle or last.
CUTS = {2: ((40, 61), (100, 1)), 3: ((40, 1, 60), (1, 67, 33))}
BACKENDS = [b for b in ("eager", "native") if not backends.unavailable(b, "token_kl_fwd", "cpu")]
LIMIT = 400.0  # seconds


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    group: Any  # ProcessGroup: the first `size` ranks
    alone: list[Any]  # a group of its own for every rank
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
            dist.all_gather(everyone, x, group=self.group)
            assert all(torch.equal(x, y) for y in everyone), "ranks differ"

    def cut(self, V: int, which: int = 0, rank: int | None = None) -> tuple[int, int]:
        """First column of a rank's shard (this one's), and the one after its last."""
        shares = CUTS[self.size][which]
        narrow = shares.count(1)
        widths = [s if s == 1 else s * (V - narrow) // (sum(shares) - narrow) for s in shares]
        widths[widths.index(max(widths))] += V - sum(widths)
        ends = list(itertools.accumulate(widths))
        at = self.rank if rank is None else rank
        return ends[at] - widths[at], ends[at]


CHECKS: dict[str, tuple[Callable[[World], None], tuple[int, ...]]] = {}


def check(*sizes: int) -> Callable[[Callable[[World], None]], Callable[[World], None]]:
    """Run the function in groups of these sizes, all of CUTS by default."""

    def add(fn: Callable[[World], None]) -> Callable[[World], None]:
        CHECKS[fn.__name__] = fn, sizes or tuple(CUTS)
        return fn

    return add


def work(rank: int, folder: str) -> None:
    import vocab_linear  # noqa: F401
    import vocab_logits  # noqa: F401

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=max(CUTS),
        timeout=datetime.timedelta(seconds=LIMIT),
    )
    alone = [dist.new_group([r]) for r in range(max(CUTS))]
    for size in CUTS:
        group = dist.new_group(list(range(size)))
        if rank < size:
            run(World(rank, size, group, alone), f"{folder}/size{size}-rank{rank}.jsonl")
        dist.barrier()
    dist.destroy_process_group()


def run(world: World, path: str) -> None:
    for name, (fn, sizes) in CHECKS.items():
        if world.size not in sizes:
            continue
        try:
            world.wrong.clear()
            fn(world)
            said = "\n".join(world.wrong)
        except Exception:
            said = traceback.format_exc(limit=-4)
        with open(path, "a") as file:
            file.write(json.dumps([name, said]) + "\n")
        dist.barrier(world.group)


def spawn() -> dict[int, dict[str, list[str]]]:
    """{group size: {check: what each rank has to complain about, "" for nothing}}; a check that
    hangs is missing, and so are those after it."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(work, (folder,), nprocs=max(CUTS), join=False)
        deadline = time.monotonic() + LIMIT
        try:
            while time.monotonic() < deadline and not context.join(timeout=5):
                pass
        except Exception as error:
            print(f"a rank ended early: {error}")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        said: dict[int, dict[str, list[str]]] = {size: {} for size in CUTS}
        for size, rank in [(n, r) for n in CUTS for r in range(n)]:
            path = f"{folder}/size{size}-rank{rank}.jsonl"
            with contextlib.suppress(FileNotFoundError), open(path) as file:
                for name, line in map(json.loads, file):
                    said[size].setdefault(name, []).append(line)
        return said
