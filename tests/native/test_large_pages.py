"""Fresh gradients and workspaces ask the kernel for large pages."""

import pathlib
import re

import pytest
import torch

import deepalign_kernels as dak
from deepalign_kernels import backends

SMAPS = pathlib.Path("/proc/self/smaps")
pytestmark = [
    pytest.mark.skipif(
        not SMAPS.exists() or "VmFlags" not in SMAPS.read_text(),
        reason="no flags of mappings in /proc/self/smaps",
    ),
    pytest.mark.skipif(
        not pathlib.Path("/sys/kernel/mm/transparent_hugepage").exists(),
        reason="this kernel has no transparent huge pages",
    ),
    pytest.mark.skipif(
        backends.native_library("cpu") is not None, reason="no native CPU library here"
    ),
]


def asks_for_large_pages(x: torch.Tensor) -> bool:
    """Whether the mapping that holds the middle of `x` carries the flag of MADV_HUGEPAGE."""
    at, here = x.data_ptr() + x.nbytes // 2, False
    for line in SMAPS.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(found[1], 16) <= at < int(found[2], 16)
        elif here and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no mapping holds the tensor")


def test_a_large_gradient_does():
    logits = torch.randn(1024, 8192, requires_grad=True)  # 32 MB: a mapping of its own
    target = torch.randint(8192, (1024,))
    with dak.use_backend("native"):
        dak.token_logp(logits, target).sum().backward()
    assert asks_for_large_pages(logits.grad)
    with dak.use_backend("eager"):
        (grad,) = torch.autograd.grad(dak.token_logp(logits, target).sum(), logits)
    assert not asks_for_large_pages(grad)


def test_only_large_ones_and_only_where_native_may_run():
    assert asks_for_large_pages(backends.fresh_pages(torch.empty(16 << 20, dtype=torch.uint8)))
    with dak.use_backend("eager"):
        x = backends.fresh_pages(torch.empty(48 << 20, dtype=torch.uint8))
    assert not asks_for_large_pages(x)


def test_the_gradient_of_a_head_does():
    hidden, weight = torch.randn(4, 512), torch.randn(32000, 512, requires_grad=True)
    with dak.use_backend("native"):
        dak.linear_constrained_loss(
            hidden, weight, torch.arange(4), beta=1.0, ref_logp=torch.zeros(4)
        ).backward()
    assert asks_for_large_pages(weight.grad)
