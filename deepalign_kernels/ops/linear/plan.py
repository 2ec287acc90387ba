"""How many tokens go through the head at once, and what that costs in bytes.

Scores are made for a chunk of tokens. Their gradient is multiplied with the head and the hidden
states for a group of chunks: on a CPU a group is one chunk, on a GPU it may be all tokens.

The engine allocates what `ChunkPlan` says and `estimate_memory` reports it: one rule for both.
"""

from __future__ import annotations

import enum
import math
from typing import NamedTuple

import torch

from deepalign_kernels.ops.linear import gemm

# GEMM rate by rows per chunk, as a share of that at 2048 rows (H = 2048, fp32, 2 cores): 32: 0.27,
# 128: 0.54, 256: 0.70, 512: 0.84, 1024: 0.90. On a GPU 1024 rows times any vocabulary fill it.
DEFAULT_CHUNK = 1024


class Granularity(NamedTuple):
    """What a kind of device makes of a number of rows."""

    step: int = 1  # chunks and groups are multiples of it, the height of a GEMM's tile
    groups: bool = False  # whether a group may be more than one chunk


# Each product of a group with the hidden states reads and writes the whole gradient of the head in
# fp32: at H = 4096 and V = 128256 4.2 GB, on an H100 as long as the GEMM of 1000 rows takes.
GRANULARITY = {"cpu": Granularity(), "cuda": Granularity(step=128, groups=True)}


def granularity_of(device: str) -> Granularity:
    return GRANULARITY.get(device, GRANULARITY["cuda"])


# Eager row functions take this many scores at a time: their temporaries then stay in the cache, and
# are small beside the chunk.
EAGER_BLOCK = 1 << 18
# Tiles of the vocabulary in a backward. Each reads and writes the fp32 gradient of hidden: on an
# H100 that costs 4 % of its GEMMs' time at 4096 columns and 8 % at 2048. 2^25 scores are 8192 rows
# of 4096, 134 MB in fp32.
TILE_SCORES, LEAST_TILE, TILE_STEP = 1 << 25, 2048, 256
VECTORS = 128  # bytes per row for what a chunk cuts out of [N] inputs and gets from row functions


class Phase(enum.IntEnum):
    """What a run does with the gradient of the scores."""

    CHUNKS = 0  # makes it chunk by chunk, if at all, and forgets it
    SAVE = 1  # makes it for all rows, in one group, and leaves it to the backward
    SAVED = 2  # is that backward: it makes no scores
    TILES = 3  # makes it for all rows, for a tile of the vocabulary at a time: `vocab` is its width


class Sizes(NamedTuple):
    """What the memory of one call depends on."""

    rows: int  # that go through the head
    tokens: int  # all of them; more than `rows` where ignored ones are dropped
    hidden: int
    vocab: int
    device: str  # "cpu" or "cuda"
    compute: torch.dtype  # of the head's operands
    logits: torch.dtype
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype
    accumulate: torch.dtype = torch.float32  # of the head's gradient over chunks
    ref_hidden: int = 0  # 0: no reference head
    ref_compute: torch.dtype = torch.float32
    ref_dtypes: tuple[torch.dtype, torch.dtype] | None = None  # of its hidden and weight, as given
    shared_head: bool = False
    rank: int = 0
    values: int = 1  # results per token
    gradients: bool = False
    wanted: tuple[bool, ...] = (False,) * 5  # gradients of hidden, weight, bias, lora_a, lora_b
    eager_copies: float = 0.0  # wide copies of a block in eager row functions; 0 for fused ones
    phase: Phase = Phase.CHUNKS

    @property
    def grad_dtype(self) -> torch.dtype:
        return gemm.gradient_dtype(self.device, self.compute)

    @property
    def separate_gradient(self) -> bool:
        """The gradient of the scores needs memory of its own: another dtype than the scores'."""
        made = self.gradients and self.phase != Phase.SAVED
        return made and self.grad_dtype != self.logits

    @property
    def grouped(self) -> bool:
        """The gradient of the scores stays for more rows than the scores do.

        That of fp32 operands takes as much memory as the scores, and the gradient of a head in fp32
        is its own accumulator: there one chunk is a group.
        """
        if not granularity_of(self.device).groups or self.phase in (Phase.SAVED, Phase.TILES):
            return False
        summed = self.gradients and self.wanted[1] and self.grad_dtype.itemsize == 2
        return self.phase == Phase.SAVE or (summed and self.rows > DEFAULT_CHUNK)

    @property
    def ref_apart(self) -> bool:
        """The reference's scores have a buffer of their own, not the one that holds the policy's
        and may become the gradient that stays."""
        return self.ref_hidden > 0 and (self.phase == Phase.SAVE or self.grouped)

    @property
    def joined(self) -> bool:
        """Both models' rows go through the head in one product."""
        return self.shared_head and self.phase == Phase.CHUNKS and not self.ref_apart

    @property
    def dropped(self) -> bool:
        return self.rows < self.tokens

    @property
    def gathered(self) -> bool:
        """Rows of hidden are copied group by group instead of read in place."""
        changed = self.joined or self.phase == Phase.SAVED  # there they get the upstream gradient
        return self.dropped or self.hidden_dtype != self.compute or changed

    @property
    def widened(self) -> bool:
        """Rows get their upstream gradient in a wide copy, to be rounded once."""
        return self.phase == Phase.SAVED and self.compute.itemsize == 2

    @property
    def scattered(self) -> bool:
        """Gradient rows are copied group by group instead of written in place."""
        moved = self.dropped or self.hidden_dtype != self.compute
        return self.gradients and self.wanted[0] and moved and self.phase != Phase.TILES

    @property
    def ref_gathered(self) -> bool:
        if not self.ref_hidden or self.joined:
            return False
        assert self.ref_dtypes is not None
        return self.dropped or self.ref_dtypes[0] != self.ref_compute


class ChunkPlan(NamedTuple):
    """Chunks and groups of one call, and the bytes of every part of its workspace."""

    chunk: int  # rows per chunk; the last one of a group may have fewer
    chunks: int
    group: int  # rows per group; the last one may have fewer
    groups: int
    block: int  # rows per call of the row function
    scores: int
    grad_scores: int
    gathered: int
    scratch_rows: int
    vectors: int
    scratch_tile: int
    row_function: int

    @property
    def workspace(self) -> int:
        return sum(self[5:])


def make_plan(s: Sizes, budget: int | None) -> ChunkPlan:
    """The chunks for `s` within `budget` bytes of workspace.

    None: equal chunks of 1024 to 2047 rows; fewer rows are one chunk. Where the sizes are
    `grouped`: equal groups of up to 2 H rows (which then take no more than an fp32 accumulator of
    the head's gradient), in equal chunks of up to 1024. A budget: equal groups as large as it
    allows.

    Raises:
        ValueError: a budget that holds no single row.
    """
    room = _room(s, budget)
    if not room.rows:
        raise ValueError(
            f"max_workspace_bytes: {budget} bytes hold no row of {s.vocab} scores and its "
            f"buffers, which take {room.least}; pass at least that, or None for "
            f"chunks of {DEFAULT_CHUNK} rows"
        )
    if not s.rows:
        return ChunkPlan(*(0,) * len(ChunkPlan._fields))
    unbounded = budget is None and not s.grouped
    if s.phase != Phase.CHUNKS:
        groups = 1  # see `keeps`
    elif unbounded:
        groups = max(1, s.rows // DEFAULT_CHUNK)
    else:
        groups = math.ceil(s.rows / room.rows)
    step = granularity_of(s.device).step
    group = chunk = _piece(s.rows, groups, step, s.rows if unbounded else room.rows)
    if s.grouped:
        chunk = _piece(group, math.ceil(group / DEFAULT_CHUNK), step, DEFAULT_CHUNK)
    copied = _copied(s)
    block = min(room.block, chunk) if copied else chunk
    sizes = {
        name: by_chunk * chunk + by_group * group
        for name, (by_chunk, by_group) in _per_row(s).items()
    }
    whole, rest = divmod(s.rows, group)
    return ChunkPlan(
        chunk=chunk,
        chunks=whole * math.ceil(group / chunk) + math.ceil(rest / chunk),
        group=group,
        groups=math.ceil(s.rows / group),
        block=block,
        **sizes,
        scratch_tile=room.tile,
        row_function=copied * block if copied else 0,
    )


def _piece(rows: int, pieces: int, step: int, most: int) -> int:
    """Rows of each of some equal pieces."""
    if pieces == 1:
        return rows
    each = math.ceil(rows / pieces)
    return min(math.ceil(each / step) * step, max(each, most))


def released(s: Sizes, p: ChunkPlan) -> int:
    """Bytes of the scores that a run gives back before the products of its last group."""
    return _per_row(s)["scores"][0] * p.chunk if s.separate_gradient or s.ref_apart else 0


def keeps(s: Sizes, budget: int | None) -> bool:
    """Whether a forward with gradients keeps the gradient of the scores of all tokens: where they
    are one group within `budget`, by default where they are fewer than two chunks.

    From shapes alone: nothing waits for the number of rows that are dropped, and a traced length
    makes one guard.
    """
    if budget is None:
        return s.tokens < 2 * DEFAULT_CHUNK
    # As if rows were dropped and every gradient wanted: then no call needs more than this.
    worst = s._replace(rows=s.tokens, tokens=s.tokens + 1, gradients=True, wanted=(True,) * 5)
    keep = worst._replace(phase=Phase.SAVE)
    return all(s.tokens <= _room(x, budget).rows for x in (keep, backward_of(keep)))


def refuse_late(s: Sizes, budget: int | None) -> None:
    """What the backward of `s` that makes the scores again would raise, if rows were dropped and
    every gradient wanted: for the forward, which needs less.

    Raises:
        ValueError: a budget that holds no single row.
    """
    if budget is not None:
        made = s._replace(phase=Phase.CHUNKS, gradients=True, wanted=(True,) * 5)
        make_plan(made._replace(tokens=made.rows + 1), budget)


def backward_of(s: Sizes) -> Sizes:
    """The backward of a forward that saved the gradient of the scores: it needs no reference and
    calls no row function."""
    return s._replace(phase=Phase.SAVED, ref_hidden=0, shared_head=False, eager_copies=0.0)


def by_tiles(s: Sizes, budget: int | None) -> bool:
    """Whether a backward that makes the scores again goes over tiles of the vocabulary, where the
    normalisers are known: on a GPU, for a head that is trained, if the budget holds the least tile.
    """
    if not granularity_of(s.device).groups or not s.wanted[1] or any(_tiled(s)):
        return False
    if budget is None:
        return True
    worst = s._replace(tokens=s.rows + 1, gradients=True, wanted=(True,) * 5)
    return s.rows * _tile_row(worst, min(TILE_STEP, s.vocab)) + _copied(s) <= budget


def tile_columns(s: Sizes, budget: int | None) -> int:
    """Columns of a tile, about TILE_SCORES scores of each model."""
    rows = max(1, s.rows)
    columns = max(LEAST_TILE, TILE_SCORES // rows)
    if budget is not None:
        fixed, both = _tile_row(s, 0), _tile_row(s, 1)
        columns = min(columns, ((budget - _copied(s)) // rows - fixed) // (both - fixed))
    if columns >= s.vocab:
        return s.vocab
    return max(TILE_STEP, columns // TILE_STEP * TILE_STEP)


def _tile_row(s: Sizes, columns: int) -> int:
    """Bytes of workspace per row."""
    parts = _per_row(s._replace(phase=Phase.TILES, vocab=columns))
    return sum(map(sum, parts.values()))


class _Room(NamedTuple):
    """What a budget allows."""

    rows: int  # in one chunk; 0: not even one
    tile: int  # bytes of the head's tile
    block: int  # rows per call of the row function
    least: int  # bytes that one row needs


def _room(s: Sizes, budget: int | None) -> _Room:
    by_chunk, by_group = (sum(part) for part in zip(*_per_row(s).values(), strict=True))
    each, columns, copied = by_chunk + by_group, _tile_columns(s), _copied(s)
    tile = min(gemm.TILE_BYTES, s.vocab * columns * 8)
    block = max(1, EAGER_BLOCK // s.vocab)
    if budget is None:
        grouped = s.phase == Phase.CHUNKS and s.grouped
        rows = max(DEFAULT_CHUNK, 2 * s.hidden) if grouped else 2 * DEFAULT_CHUNK - 1
        return _Room(rows, tile, block, 0)
    least = columns * 8
    tile = max(least, min(tile, budget // 8))
    block = max(1, min(block, budget // 4 // copied)) if copied else block
    if budget - tile - copied * block < each * (s.rows if s.phase == Phase.TILES else 1):
        tile, block = least, 1
    left = budget - tile - copied * block
    rows = max(0, left // each)
    if rows > DEFAULT_CHUNK and s.grouped:
        rows = (left - by_chunk * DEFAULT_CHUNK) // by_group
    return _Room(rows, tile, block, each + tile + copied)


def _copied(s: Sizes) -> int:
    """Bytes that an eager row function holds for one row."""
    return math.ceil(s.eager_copies * max(4, s.logits.itemsize) * s.vocab)


def _per_row(s: Sizes) -> dict[str, tuple[int, int]]:
    """Bytes of each part of the workspace per row of a chunk and per row of a group."""
    own, saved = s.compute.itemsize, s.phase == Phase.SAVED
    one = s.vocab * s.logits.itemsize  # row of scores; in place, that of their gradient
    refs = one * (s.ref_hidden > 0)
    scores = (one + refs, 0) if s.separate_gradient else (refs, one)
    gathered = own * s.hidden * (s.gathered + s.scattered) + 4 * s.hidden * s.widened
    gathered += own * s.rank * (3 if s.gradients and not saved else 2)
    ref_gathered = (
        own * s.hidden * s.joined + s.ref_compute.itemsize * s.ref_hidden * s.ref_gathered
    )
    vectors = (VECTORS + s.values * s.logits.itemsize, s.grad_dtype.itemsize * s.grouped)
    if saved:  # the upstream gradient alone; for fp16 also its share of the largest
        vectors = (0, max(4, s.logits.itemsize) * (1 + (s.compute == torch.float16)))
    has_gradient = s.separate_gradient or saved
    return {
        "scores": (0, 0) if saved else scores,
        "grad_scores": (0, s.vocab * s.grad_dtype.itemsize * has_gradient),
        "gathered": (ref_gathered, gathered),
        "scratch_rows": (0, 4 * _widened_columns(s)),
        "vectors": vectors,
    }


def _tiled(s: Sizes) -> tuple[bool, bool]:
    """Whether (policy, reference) products go through tiles of the head."""
    ref = s.ref_hidden > 0 and gemm.tiled(s.device, s.ref_compute, s.logits)
    return gemm.tiled(s.device, s.compute, torch.float32), ref


def _tile_columns(s: Sizes) -> int:
    own, ref = _tiled(s)
    return max(own * max(s.hidden, s.rank), ref * s.ref_hidden)


def _widened_columns(s: Sizes) -> int:
    """Columns of the row buffer that tiled products need."""
    own, ref = _tiled(s)
    scores = s.phase != Phase.SAVED and gemm.tiled(s.device, s.compute, s.logits)
    own = own and (scores or (s.gradients and s.grad_dtype != s.compute))
    return max(own * max(s.hidden * (2 if s.joined else 1), s.rank), ref * s.ref_hidden)
