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
from deepalign_kernels.data.packing import micro_batches
from deepalign_kernels.fingerprint import model_hash
from deepalign_kernels.modes import evaluating
from deepalign_kernels.train.folder import read, write_atomically

LogpOf = Callable[[nn.Module, Batch], Tensor]


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that never trains."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def reference_logp(
    model: nn.Module, table: TokenTable, logp_of: LogpOf, device: torch.device, batch_size: int
) -> Tensor:
    """Log-probability of every target under `model`: a fp32 column of the table, else 0."""
    out = torch.zeros(table.targets.shape, dtype=torch.float32)
    with evaluating(model):
        for rows in micro_batches(range(len(table)), table.lengths, batch_size):
            batch = table.batch(rows, device, table.count(rows))
            logp = logp_of(model, batch).float().cpu()
            out[table.slots(rows)] = logp  # padding: every write to its slot is a 0
    return out


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
    def key(reference: nn.Module, table: TokenTable, *details: object) -> str:
        text = repr((model_hash(reference), table.content_hash(), details))
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
        if data != table.content_hash() or logp.numel() != int(trained.sum()):
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
        write_atomically(self.path(key), {"ref_logp": logp, "data": table.content_hash()})
