"""The ops over gloo groups of 2 and 3 ranks with uneven shards of the vocabulary."""

import pytest
import torch.distributed as dist
import vocab_linear  # noqa: F401
import vocab_logits  # noqa: F401
from vocab_world import CHECKS, CUTS, spawn

RUNS = [(size, name) for size in CUTS for name, (_, sizes) in CHECKS.items() if size in sizes]


@pytest.mark.slow
@pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)
def test_vocabulary_shards():
    """All checks in one test: pytest-xdist would start the ranks in each of its processes."""
    said, wrong = spawn(), []
    for size, name in RUNS:
        lines = said[size].get(name, [])
        if len(lines) < size:
            wrong.append(f"{name}: {size - len(lines)} ranks of {size} did not come to its end")
        wrong += [f"{name}, rank {r} of {size}: {line}" for r, line in enumerate(lines) if line]
    assert not wrong, "\n".join(wrong)
