"""What the reference says about the trained tokens: computed once, or asked batch by batch."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepalign_kernels.data.columns import Anchors, TokenTable
from deepalign_kernels.data.examples import IGNORE
from deepalign_kernels.data.source import Source
from deepalign_kernels.fingerprint import model_hash
from deepalign_kernels.modes import evaluating
from deepalign_kernels.train.adapters import WithoutAdapters
from deepalign_kernels.train.cache import Entry, Part, ReferenceCache, key_of
from deepalign_kernels.train.config import TrainConfig
from deepalign_kernels.train.forwards import forwards
from deepalign_kernels.train.log import Progress
from deepalign_kernels.train.objective import BatchObjective
from deepalign_kernels.train.ranks import Ranks
from deepalign_kernels.train.rowfile import RowFile

BLOCK = 64  # forwards whose rows are chosen together


@dataclass(frozen=True)
class Kept:
    """What is on the disk of a reference.

    Attributes:
        path: the folder; its name holds the hash of what it was made from.
        tokens: trained ones, each with a log-probability.
        bytes: of its files.
        seconds: that the pass took now, 0 if there was none.
    """

    path: Path
    tokens: int
    bytes: int
    seconds: float


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that never trains."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def compute(
    model: nn.Module,
    table: TokenTable,
    objective: BatchObjective,
    device: torch.device,
    config: TrainConfig,
    ranks: Ranks,
    part: Part,
) -> None:
    """Ask `model` about every trained token of `table`, but for what `part` has already.

    Each process computes its share and writes it.
    """
    order = sorted(range(len(table)), key=lambda row: -table.lengths[row])
    limits = config.limits
    block, packed = BLOCK * limits.batch_size * ranks.count, limits.packed
    rounds = [
        each
        for at in range(0, len(order), block)
        for each in forwards(ranks, order[at : at + block], table.lengths, limits)
    ]
    done = part.done([each.rows if each.own else [] for each in rounds])
    tokens = [sum(table.lengths[row] for row in each.rows) for each in rounds]
    before = sum(tokens[number] for number in done)
    show = config.progress and ranks.main
    progress = Progress(sum(tokens), before, show, "reference", "token")
    with contextlib.closing(progress), evaluating(model):
        for number, (rows, own) in enumerate(rounds):
            if number in done:
                continue
            batch = table.batch(rows, device, table.count(rows), packed)
            logp, anchors = objective.reference(model, batch)
            if anchors is not None:
                width, dtype = anchors.hidden.shape[1], anchors.hidden.dtype
                part.begin_hidden(width, dtype, anchors.weight, anchors.bias)
            hidden = None if anchors is None else anchors.hidden
            if own:
                part.put(number, rows, logp[batch.targets != IGNORE], hidden)
            else:
                part.put(number, [], logp.new_empty(0), None if hidden is None else hidden[:0])
            progress.step(tokens[number])
            progress.say({})
    part.finish()


class AnchorRows:
    """The anchors of a table's examples: hidden states from a file, the head from memory."""

    def __init__(
        self, file: RowFile, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        self._file, self._weight, self._bias, self._dtype = file, weight, bias, dtype

    def take(self, rows: Any, device: torch.device) -> Anchors:
        hidden = self._file.get(rows).to(device).to(self._dtype)
        return Anchors(hidden, self._weight, self._bias)


def anchor_rows(
    entry: Entry, policy: nn.Module, device: torch.device, heads: list[Tensor]
) -> AnchorRows | None:
    """Those of an entry of the cache, None if it has none.

    A frozen head of the policy with the same numbers is used in the place of the kept one: one
    tensor for both, and one product for both models' rows. Else one of `heads`, in which those of
    other entries are: each head is in memory once.
    """
    if entry.hidden is None:
        return None
    weight, bias, dtype = entry.weight, entry.bias, entry.dtype
    assert weight is not None and dtype is not None
    weight = weight.to(device)
    same = (
        p.detach()
        for p in policy.parameters()
        if type(p) is nn.Parameter
        and not p.requires_grad
        and (p.shape, p.dtype) == (weight.shape, weight.dtype)
        and torch.equal(p, weight)
    )
    weight = next(same, weight.to(dtype))
    weight = next((each for each in heads if _equal(each, weight)), weight)
    if not any(each is weight for each in heads):
        heads.append(weight)
    return AnchorRows(entry.hidden, weight, None if bias is None else bias.to(device), dtype)


def _equal(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)


class Reference:
    """What the policy is compared with: columns of the data, or a model in memory.

    Attributes:
        keys: what a checkpoint keeps, so that a resume finds the very same again.
        model: the one that runs along, else None.
        kept: what `take` found or made on the disk, an entry for each epoch with a table of its
            own.
    """

    def __init__(
        self, config: TrainConfig, objective: BatchObjective, source: Source, ranks: Ranks
    ) -> None:
        self.keys: list[str] = []
        self.kept: list[Kept] = []
        self.model: Any = None
        self._config, self._objective, self._source = config, objective, source
        self._ranks = ranks
        self._hash: str | None = None  # None: it cannot be known any more
        self._heads: list[Tensor] = []

    def begin(self, policy: nn.Module, given: nn.Module | None, resumed: bool) -> None:
        """Before the policy is sharded or moves: its copy and its hash, where they are needed."""
        self.model, self._hash, self._heads = None, None, []
        model, how = (policy if given is None else given), self._config.reference
        if how == "adapter_off":
            self.model = WithoutAdapters(policy)
            return
        if how in ("frozen", "model"):
            self.model = frozen_copy(model) if given is None else model.eval()
        if self.model is not None or given is not None or not resumed:
            self._hash = model_hash(model)

    def like(self, other: Reference) -> None:
        """That of other data: the model is the same."""
        self.model, self._hash, self._heads = other.model, other._hash, other._heads

    def must_be(self, keys: list[str]) -> None:
        """Raises ValueError: a frozen model is not the one of a checkpoint, which has `keys`."""
        if self.model is not None and keys != self._live_keys():
            raise ValueError(
                "resume: the frozen reference is not the one this run began with; pass that as"
                " ref_model, or the model as it was before training"
            )

    def _live_keys(self) -> list[str]:
        """The parameters below adapters are part of a run's identity anyway."""
        return [self._hash or "adapter_off"]

    def take(
        self,
        model: nn.Module,
        epochs: range,
        device: torch.device,
        folder: Path,
        keys: list[str] | None,
    ) -> None:
        """Fill the columns of the epochs' tables.

        Args:
            model: to ask where nothing is known yet.
            epochs: with a table of their own.
            device: of the model.
            folder: of the cache.
            keys: those of a checkpoint, whose entries must be there; None: what is not there is
                computed.
        """
        if self.model is not None:
            self.keys = self._live_keys()
            return
        if keys is not None and len(keys) < len(epochs):
            raise ValueError(
                f"epochs: this run began with {len(keys)}; its data change with the epoch, and what"
                " the reference says about later ones cannot be known from a policy that has moved"
            )
        cache, self.keys, self.kept = ReferenceCache(folder, self._ranks), [], []
        for epoch in epochs:
            table = self._source.table(epoch)
            about = self._about(table)
            key = key_of(about) if keys is None else keys[epoch]
            seconds = 0.0
            if keys is None:
                seconds = self._make(cache, key, table, about, model, device)
            entry = cache.load(key, table, about)
            table.ref_logp = entry.logp
            table.anchors = anchor_rows(entry, model, device, self._heads)
            self.keys.append(key)
            path = cache.path(key)
            size = sum(file.stat().st_size for file in path.iterdir())
            self.kept.append(Kept(path, sum(table.trained), size, seconds))

    def _about(self, table: TokenTable) -> dict[str, Any]:
        config, anchors = self._config, None
        if self._objective.anchors:
            where = table.positions.contiguous().numpy().tobytes()
            anchors = {
                "positions": config.kl_positions,
                "dtype": config.reference_dtype,
                "at": config.kl_positions and hashlib.blake2b(where, digest_size=8).hexdigest(),
            }
        return {
            "model": self._hash,
            "data": table.tokens_hash(),
            "autocast_dtype": str(config.autocast_dtype),
            "head": config.head,
            "temperature": config.temperature,
            "anchors": anchors,
        }

    def _make(
        self,
        cache: ReferenceCache,
        key: str,
        table: TokenTable,
        about: dict[str, Any],
        model: nn.Module,
        device: torch.device,
    ) -> float:
        """If it is not there: also if another run, or one that was killed, has begun it. Returns
        the seconds of the pass, 0 without one."""
        config, ranks = self._config, self._ranks

        def there() -> bool:
            return ranks.first(lambda: cache.whole(key, table, about))

        if there():
            return 0.0
        with cache.locked(key):
            if there():
                return 0.0
            begun = time.perf_counter()
            layout = {"limits": list(config.limits), "processes": ranks.count, "block": BLOCK}
            part = cache.part(key, table, about, layout)
            compute(model, table, self._objective, device, config, ranks, part)
            return time.perf_counter() - begun
