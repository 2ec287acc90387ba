"""What the reference says about datasets, kept in the files of `deepalign_kernels.train.cache`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepalign_kernels import hf
from deepalign_kernels.data.columns import Anchors, TokenTable
from deepalign_kernels.data.examples import IGNORE, Example
from deepalign_kernels.data.packing import Limits
from deepalign_kernels.hf.gathered import gathered, is_shared_out
from deepalign_kernels.train.cache import ABOUT, Entry, Part, ReferenceCache, key_of
from deepalign_kernels.train.forwards import forwards
from deepalign_kernels.train.ranks import ALONE, Ranks
from deepalign_kernels.train.reference import AnchorRows, anchor_rows
from deepalign_kernels.trl.config import ConstrainedSFTConfig

# One batch of rows by their numbers -> (model inputs, response positions).
BatchOf = Callable[[list[int]], tuple[dict[str, Any], Tensor]]


def anchored(args: ConstrainedSFTConfig, labels: Tensor, positions: Tensor) -> Tensor:
    """bool [B, T - 1]: the targets with a divergence."""
    trained, at = labels[:, 1:] != IGNORE, positions[:, 1:]
    n = args.kl_positions
    return trained if n is None else trained & (at >= 1) & (at <= n)


def table_of(dataset: Any) -> TokenTable:
    """The rows of `dataset` as one table; of packed ones, no first token has a target before it."""

    def examples() -> Iterator[Example]:
        for row in dataset:
            labels, at = list(row["labels"]), 0
            for length in row.get("seq_lengths") or ():
                labels[at], at = IGNORE, at + length
            yield Example(tuple(row["input_ids"]), tuple(labels), tuple(row["response_positions"]))

    return TokenTable(examples())


class KeptReference:
    """Columns of datasets, from the model as it is before training.

    Args:
        args: of the run.
        model: a hash of the reference's weights.
        policy: attached; asked about what is not known yet.
        device: of the policy.
    """

    def __init__(
        self, args: ConstrainedSFTConfig, model: str, policy: Any, device: torch.device
    ) -> None:
        self._args, self._model, self._policy, self._device = args, model, policy, device
        # Only where each process has a share of the weights do they compute together.
        self._ranks = Ranks.here(device) if is_shared_out(policy) else ALONE
        self._sets: list[tuple[int, AnchorRows]] = []  # of each dataset the number of its first row
        self._heads: list[Tensor] = []
        self._rows = 0

    def added(self, dataset: Any, batch_of: BatchOf, size: int) -> Any:
        """`dataset` with its columns ref_logp and, with kl_coef, ref_row.

        Args:
            dataset: with columns input_ids, labels and response_positions.
            batch_of: makes a batch of some of its rows.
            size: of a batch.

        Raises:
            ValueError: the folder holds the reference of these data under other weights.
        """
        args, table = self._args, table_of(dataset)
        folder = Path(args.reference_cache or args.output_dir or ".")
        ranks = self._ranks
        cache, about = ReferenceCache(folder, ranks), self._about(table, dataset)
        key = key_of(about)
        if args.reference_cache is None:
            ranks.first(lambda: _refuse_other_weights(folder, about))

        def there() -> bool:
            return ranks.first(lambda: cache.whole(key, table, about))

        if not there():
            with cache.locked(key):
                if not there():
                    layout = {"size": size, "packed": args.packing, "processes": ranks.count}
                    part = cache.part(key, table, about, layout)
                    self._compute(part, table, batch_of, size)
        return self._with_columns(dataset, table, cache.load(key, table, about))

    def take(self, rows: list[int]) -> Anchors:
        """Of the rows of a batch, by their numbers in ref_row."""
        first, anchors = next(x for x in reversed(self._sets) if x[0] <= rows[0])
        return anchors.take([row - first for row in rows], self._device)

    def _about(self, table: TokenTable, dataset: Any) -> dict[str, Any]:
        args, anchors = self._args, None
        if args.kl_coef > 0:
            anchors = {"positions": args.kl_positions, "dtype": args.reference_dtype}
        digest = hashlib.blake2b(table.positions.contiguous().numpy().tobytes(), digest_size=8)
        if "seq_lengths" in dataset.column_names:  # tokens of other conversations stand before
            digest.update(repr(list(dataset["seq_lengths"])).encode())
        return {
            "model": self._model,
            "data": table.tokens_hash() + digest.hexdigest(),
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "",
            "temperature": args.temperature,
            "anchors": anchors,
        }

    @torch.no_grad()
    def _compute(self, part: Part, table: TokenTable, batch_of: BatchOf, size: int) -> None:
        args, ranks = self._args, self._ranks
        rounds = forwards(ranks, range(len(table)), table.lengths, Limits(size, None, False))
        done = part.done([each.rows if each.own else [] for each in rounds])
        with gathered(self._policy):
            for number, (rows, own) in enumerate(rounds):
                if number in done:
                    continue
                inputs, positions = batch_of(rows)
                seen = hf.reference_pass(
                    self._policy,
                    only=anchored(args, inputs["labels"], positions),
                    logp=True,
                    temperature=args.temperature,
                    copy_head=ranks.count > 1,
                    **inputs,
                )
                assert seen.logp is not None
                logp, hidden = seen.logp[inputs["labels"][:, 1:] != IGNORE], seen.rows.hidden
                if args.kl_coef > 0:
                    part.begin_hidden(hidden.shape[1], hidden.dtype, seen.weight, seen.bias)
                part.put(number, *((rows, logp, hidden) if own else ([], logp[:0], hidden[:0])))
        part.finish()

    def _with_columns(self, dataset: Any, table: TokenTable, entry: Entry) -> Any:
        """ref_logp stands beside the label that it is about, one place behind the table's."""
        rows = entry.logp[:-1].split(list(table.lengths))
        dataset = dataset.add_column("ref_logp", [[0.0, *row[:-1].tolist()] for row in rows])
        anchors = anchor_rows(entry, self._policy, self._device, self._heads)
        if anchors is not None:
            first = self._rows
            self._sets.append((first, anchors))
            dataset = dataset.add_column("ref_row", list(range(first, first + len(table))))
        self._rows += len(table)
        return dataset


def _refuse_other_weights(folder: Path, about: dict[str, Any]) -> None:
    for file in folder.glob(f"reference-*/{ABOUT}"):
        kept = json.loads(file.read_text())["about"]
        if kept | {"model": None} == about | {"model": None} and kept["model"] != about["model"]:
            raise ValueError(
                f"model: {file.parent} holds the reference of these data under other weights. A run"
                " that goes on must start from the model it began with (its checkpoint is loaded by"
                " train(resume_from_checkpoint=...)); for a new reference remove the folder"
            )
