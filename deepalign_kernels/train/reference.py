"""What the reference says about the trained tokens: computed once, or asked batch by batch."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepalign_kernels.data.columns import Batch, TokenTable
from deepalign_kernels.data.examples import IGNORE
from deepalign_kernels.data.packing import Limits
from deepalign_kernels.data.source import Source
from deepalign_kernels.fingerprint import model_hash
from deepalign_kernels.modes import evaluating
from deepalign_kernels.train.config import TrainConfig
from deepalign_kernels.train.folder import read, write_atomically
from deepalign_kernels.train.forwards import forwards
from deepalign_kernels.train.objective import BatchObjective
from deepalign_kernels.train.ranks import ALONE, Ranks

BLOCK = 64  # forwards whose rows are chosen together
LogpOf = Callable[[nn.Module, Batch], Tensor]


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that never trains."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def reference_logp(
    model: nn.Module,
    table: TokenTable,
    logp_of: LogpOf,
    device: torch.device,
    limits: Limits,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Log-probability of every target under `model`: a fp32 column of the table, else 0.

    Each process computes its share; the column is whole in all of them.
    """
    out = torch.zeros(table.ids.shape, dtype=torch.float32)
    order = sorted(range(len(table)), key=lambda row: -table.lengths[row])
    block, packed = BLOCK * limits.batch_size * ranks.count, limits.packed
    with evaluating(model):
        for at in range(0, len(order), block):
            for rows, own in forwards(ranks, order[at : at + block], table.lengths, limits):
                batch = table.batch(rows, device, table.count(rows), packed)
                logp = logp_of(model, batch).float().cpu()
                if own:  # padding: every write to its slot is a 0
                    out[table.slots(rows, packed)] = logp
    return ranks.sum(out)


class Reference:
    """What the policy is compared with: a column of the data, or a model in memory.

    Attributes:
        keys: what a checkpoint keeps, so that a resume finds the very same again.
        model: the frozen one that runs along, else None.
    """

    def __init__(
        self, config: TrainConfig, objective: BatchObjective, source: Source, ranks: Ranks
    ) -> None:
        self.keys: list[str] = []
        self.model: nn.Module | None = None
        self._config, self._objective, self._source = config, objective, source
        self._ranks, self._hash = ranks, ""

    def begin(self, policy: nn.Module, given: nn.Module | None, resumed: bool) -> None:
        """Before the policy is sharded or moves: its copy and its hash, where they are needed."""
        model = policy if given is None else given
        if self._config.reference == "frozen":
            self.model = frozen_copy(model) if given is None else model.eval()
        if self.model is not None or not resumed:
            self._hash = model_hash(model)

    def like(self, other: Reference) -> None:
        """That of other data: the model is the same."""
        self.model, self._hash = other.model, other._hash

    def must_be(self, keys: list[str]) -> None:
        """Raises ValueError: a frozen model is not the one of a checkpoint, which has `keys`."""
        if self.model is not None and keys != [self._hash]:
            raise ValueError(
                "resume: the frozen reference is not the one this run began with; pass that as"
                " ref_model, or the model as it was before training"
            )

    def take(
        self,
        model: nn.Module,
        epochs: range,
        device: torch.device,
        folder: Path,
        keys: list[str] | None,
    ) -> None:
        """Fill the columns of the epochs' tables; `keys`: those of a checkpoint."""
        if self.model is not None:
            self.keys = [self._hash]
            return
        cache, self.keys, ranks = ReferenceCache(folder), [], self._ranks
        for epoch in epochs:
            table = self._source.table(epoch)
            config = self._config
            key = keys[epoch] if keys is not None else ""
            if not key:
                about = (config.autocast_dtype, config.head, config.temperature)
                key = cache.key(self._hash, table, *about)
                there = ranks.first(lambda k=key, t=table: cache.load_or_none(k, t) is not None)
                if not there:
                    logp_of = self._objective.logp
                    logp = reference_logp(model, table, logp_of, device, config.limits, ranks)
                    ranks.first(lambda k=key, t=table, x=logp: cache.save(k, t, x))
            table.ref_logp = cache.load(key, table)
            self.keys.append(key)


class ReferenceCache:
    """Reference log-probabilities on disk: 4 bytes per trained token, `reference-<key>.pt` in the
    output folder.

    The key is a hash of the reference's weights and of the tokens, so a file never fits another
    model or other data. A run that resumes reads the file that its checkpoint names: by then the
    policy is not the reference any more, and computing it again would silently lift the constraint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def key(reference: str, table: TokenTable, *details: object) -> str:
        """`reference`: the hash of the model."""
        text = repr((reference, table.tokens_hash(), details))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def path(self, key: str) -> Path:
        return self.folder / f"reference-{key}.pt"

    def load(self, key: str, table: TokenTable) -> Tensor:
        """The column of `table`.

        Raises:
            ValueError: the file is missing, cannot be read, or was made from other tokens.
        """
        path = self.path(key)
        if not path.is_file():
            raise ValueError(
                f"resume: {path} is missing; it holds the reference of this run, which"
                " cannot be computed again from a policy that has moved"
            )
        saved: dict[str, Any] = read(path)
        logp, data = saved["ref_logp"], saved["data"]
        trained = table.targets != IGNORE
        if data != table.tokens_hash() or logp.numel() != int(trained.sum()):
            raise ValueError(f"{path}: made from other tokens than data gives now")
        column = torch.zeros(table.targets.shape, dtype=torch.float32)
        column[trained] = logp
        return column

    def load_or_none(self, key: str, table: TokenTable) -> Tensor | None:
        """As `load`, for a reference that can be computed again: None if that is to be done."""
        if not self.path(key).is_file():
            return None
        try:
            return self.load(key, table)
        except ValueError as error:
            warnings.warn(f"{error}; computing the reference again", stacklevel=2)
            return None

    def save(self, key: str, table: TokenTable, column: Tensor) -> None:
        logp = column[table.targets != IGNORE]
        write_atomically(self.path(key), {"ref_logp": logp, "data": table.tokens_hash()})
