"""How many bytes an op has to move: the yardstick of the benchmarks and of
tests/triton/test_triton_traffic.py.

Counted in passes over one tensor [rows, V], the vectors [rows] left out (they are a 1/V of it).
`reads` is what a kernel asks for; where it sweeps a row twice, the second sweep can come out of
cache, so a measured time may beat the figure: `dram_reads` is what no cache can save.
"""

from __future__ import annotations

from typing import NamedTuple


class Traffic(NamedTuple):
    """Passes over [rows, V]: asked for, written, and read from memory even with a perfect cache."""

    reads: int
    writes: int
    dram_reads: int


IDEAL: dict[str, Traffic] = {
    "token_logp_fwd": Traffic(1, 0, 1),
    "token_logp_bwd": Traffic(1, 1, 1),
    "token_logp_fused": Traffic(2, 1, 1),  # value and gradient in one call
    "token_kl_fwd": Traffic(2, 0, 2),  # both KL directions
    "token_kl_fwd_js": Traffic(4, 0, 2),  # the mixture needs both normalisers first
    "token_kl_bwd": Traffic(2, 1, 2),  # any direction
    "token_kl_fused": Traffic(4, 1, 2),
    "token_kl_fused_js": Traffic(6, 1, 2),
    "constrained_loss_fwd": Traffic(1, 0, 1),  # ref_logp given
    "constrained_loss_fwd_ref_logits": Traffic(2, 0, 2),
    "constrained_loss_fused": Traffic(2, 1, 1),  # loss and gradient in one launch
    "constrained_loss_fused_ref_logits": Traffic(3, 1, 2),
    "token_stats_fwd": Traffic(2, 0, 2),
    "token_stats_fwd_js": Traffic(4, 0, 2),
    "token_entropy_fwd": Traffic(1, 0, 1),
    "token_entropy_bwd": Traffic(1, 1, 1),
    "scale_grad": Traffic(1, 1, 1),  # nothing where the factor is 1
}


def ideal_bytes(
    op: str,
    rows: int,
    V: int,
    itemsize: int,
    *,
    ignored: int = 0,
    out_itemsize: int | None = None,
    perfect_cache: bool = False,
) -> tuple[int, int]:
    """(bytes read, bytes written) that `op`, a key of IDEAL, needs.

    Args:
        op: a key of IDEAL.
        rows: rows of V columns, those left out included.
        V: columns.
        itemsize: bytes per logit.
        ignored: how many of the rows are left out: they are not read, and their gradient is
            written as 0.
        out_itemsize: bytes per element of the gradient; None: as itemsize.
        perfect_cache: count a second sweep over a row as free.
    """
    t = IDEAL[op]
    reads = t.dram_reads if perfect_cache else t.reads
    return reads * (rows - ignored) * V * itemsize, t.writes * rows * V * (out_itemsize or itemsize)
