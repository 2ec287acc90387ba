"""The ops over gloo groups of 2, 3 and 4 ranks with uneven shards of the vocabulary."""

import pytest
import torch.distributed as dist
import vocab_linear  # noqa: F401
import vocab_logits  # noqa: F401
from vocab_world import CHECKS, CUTS, spawn

RUNS = [(size, name) for size in CUTS for name, (_, sizes) in CHECKS.items() if size in sizes]


@pytest.fixture(scope="module")
def said():
    """{group size: {check: what each rank had to complain about}}"""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    return spawn()


@pytest.mark.slow
@pytest.mark.parametrize("size,name", RUNS, ids=lambda x: str(x))
def test_vocabulary_shards(size, name, said):
    assert name in said[size], f"{name}: the group of {size} did not come to it"
    complaints = [f"rank {r}: {line}" for r, line in enumerate(said[size][name]) if line]
    assert not complaints and len(said[size][name]) == size, "\n".join(complaints)
