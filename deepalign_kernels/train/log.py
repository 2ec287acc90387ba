"""What a run says about itself: sums per position group, a JSONL log, a line on the terminal."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepalign_kernels.data.examples import IGNORE
from deepalign_kernels.train.objective import TokenParts
from deepalign_kernels.train.ranks import ALONE, Ranks
from deepalign_kernels.train.trackers import Trackers

GROUPS = ("first", "prefix", "rest")  # position 1; 2..prefix_length; all other trained tokens
FILE = "train_log.jsonl"


class Meter:
    """Sums over the steps since the last line of the log, kept on the device until somebody reads
    them.

    `sums` [7, 3] fp64: per position group the number of tokens and the sums of log-probability,
    weight, log-ratio and divergence, and the number of tokens that have one; the last row holds the
    objective, the largest gradient norm and the number of steps.
    """

    def __init__(self, device: torch.device, prefix_length: int) -> None:
        self.bounds = torch.tensor([1, max(prefix_length, 1)], dtype=torch.int32, device=device)
        self._columns = torch.arange(3, device=device)
        self.sums = torch.zeros(7, 3, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, parts: TokenParts, targets: Tensor, positions: Tensor) -> None:
        """One micro-batch; `loss` as it is to be logged."""
        valid = (targets != IGNORE).reshape(-1)
        at = positions.reshape(-1)
        # Position 0 that is trained (what a chat template puts before the content) counts as
        # "rest".
        group = torch.where(at > 0, torch.bucketize(at, self.bounds), 2)
        groups = (group[:, None] == self._columns).double()
        logp, ref_logp, weight = (x.reshape(-1) for x in parts[:3])
        kl = torch.zeros_like(logp) if parts.kl is None else parts.kl.reshape(-1)
        anchored = valid if parts.anchored is None else parts.anchored.reshape(-1)
        counted, anchored = valid.to(logp.dtype), anchored.to(logp.dtype)
        columns = torch.stack([counted, logp, weight, logp - ref_logp, kl, anchored])
        self.sums[:-1] += columns.double() @ groups
        self.sums[-1, 0] += loss.detach()

    def add_step(
        self, batches: list[tuple[Tensor, TokenParts, Tensor, Tensor]], norm: Tensor
    ) -> None:
        """One optimizer step: (loss, parts, targets, positions) of its micro-batches."""
        for batch in batches:
            self.add(*batch)
        # A NaN, too, is the largest: none between two lines of the log goes unseen.
        self.sums[-1, 1] = torch.maximum(self.sums[-1, 1], norm.double())
        self.sums[-1, 2] += 1

    def total(self, ranks: Ranks) -> Tensor:
        """`sums` of all processes, in all of them."""
        own = self.sums[-1, 1:].clone()  # the same everywhere
        sums = ranks.sum(self.sums.clone())
        sums[-1, 1:] = own
        return sums

    def go_on_from(self, sums: Tensor, main: bool) -> None:
        """Take up what `total` gave; the first process has all of it."""
        self.sums.copy_(sums)
        if not main:
            self.sums[:-1], self.sums[-1, 0] = 0.0, 0.0

    def read(
        self, with_reference: bool, with_kl: bool = False, ranks: Ranks = ALONE
    ) -> dict[str, float | int | None]:
        """Means since the last call, in nats; the one place where the loop waits for the device."""
        *columns, (objective, norm, steps) = self.total(ranks).tolist()
        count, logp, weight, ratio, kl, anchored = columns
        self.sums.zero_()
        out: dict[str, float | int | None] = {
            "objective": objective / max(steps, 1),
            "nll": _mean(-sum(logp), sum(count)),
            "grad_norm": norm,
            "trained_tokens": int(sum(count)),
        }
        for index, name in enumerate(GROUPS):
            out[f"nll_{name}"] = _mean(-logp[index], count[index])
            if with_reference:
                out[f"weight_{name}"] = _mean(weight[index], count[index])
                out[f"log_ratio_{name}"] = _mean(ratio[index], count[index])
            if with_kl:
                out[f"kl_{name}"] = _mean(kl[index], anchored[index])
        return out


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


class Speed:
    """Tokens per second since `restart`."""

    def __init__(self) -> None:
        self._since, self._tokens = time.perf_counter(), 0

    def restart(self) -> None:
        self._since, self._tokens = time.perf_counter(), 0

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def tokens_per_s(self) -> float:
        return self._tokens / max(time.perf_counter() - self._since, 1e-9)


class RunLog:
    """`train_log.jsonl`: one object per line, each complete on disk as soon as it is written.

    A run that resumes keeps the lines up to its checkpoint and drops what the interrupted run wrote
    after it. The log of another run that is there is kept as `train_log-<number>.jsonl`. Without
    `write`, as in all processes but the first, nothing is written. `trackers` get each line too.
    """

    def __init__(
        self,
        folder: Path,
        resume_at: int | None,
        write: bool = True,
        trackers: Trackers | None = None,
    ) -> None:
        self.path = folder / FILE
        self._file, self._trackers = None, trackers
        if not write:
            return
        if resume_at is None and self.path.exists():
            _put_aside(self.path)
        kept = []
        if resume_at is not None and self.path.exists():
            for line in self.path.read_bytes().splitlines():
                if _belongs(line, resume_at):
                    kept.append(line.decode() + "\n")
        part = self.path.with_name(f".{FILE}.{os.getpid()}")
        part.write_text("".join(kept), encoding="utf-8")
        os.replace(part, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, event: str, **values: Any) -> dict[str, Any]:
        record = {"event": event, **values}
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._trackers is not None:
            self._trackers.send(record)
        return record

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._trackers is not None:
            self._trackers.close()


def _put_aside(path: Path) -> None:
    numbers = itertools.count(1)
    names = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in numbers)
    os.replace(path, next(name for name in names if not name.exists()))


def _belongs(line: bytes, resume_at: int) -> bool:
    """Whether a run that goes on at that step keeps the line: not one that a killed run left half
    written, or that is damaged."""
    try:
        record = json.loads(line)
        return record["event"] != "end" and record.get("step", 0) <= resume_at
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


class Progress:
    """One bar on a terminal; elsewhere, or without tqdm, a plain line every 30 seconds.

    Args:
        total: how much there is to do.
        done: of that, what was there before.
        show: False: nothing is printed.
        title: what is done.
        unit: of `total`.
    """

    EVERY = 30.0

    def __init__(
        self, total: int, done: int, show: bool, title: str = "train", unit: str = "step"
    ) -> None:
        self.total, self.done, self.show, self._bar = total, done, show, None
        self._title, self._unit = title, unit
        self._begun_at, self._begun = done, time.monotonic()
        self._shown = self._begun
        if show and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=title,
                unit=unit,
                unit_scale=unit != "step",
                dynamic_ncols=True,
            )

    def step(self, count: int = 1) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.update(count)

    def say(self, record: dict[str, Any]) -> None:
        """Show how far it is, and what was logged last."""
        if not self.show:
            return
        told = ("objective", "nll", "lr", "tokens_per_s")
        shown = {k: record[k] for k in told if record.get(k) is not None}
        text = ", ".join(f"{k} {v:.3g}" for k, v in shown.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
        elif time.monotonic() - self._shown > self.EVERY or self.done == self.total:
            self._shown = time.monotonic()
            about = f"{self._title}: {self._unit} {self.done}/{self.total}{self._left()}"
            print(f"{about}{text and ': '}{text}", file=sys.stderr, flush=True)

    def _left(self) -> str:
        """How long it will take, at the mean pace so far."""
        made = self.done - self._begun_at
        if not made or self.done == self.total:
            return ""
        seconds = (time.monotonic() - self._begun) / made * (self.total - self.done)
        return f", {datetime.timedelta(seconds=round(seconds))} left"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
