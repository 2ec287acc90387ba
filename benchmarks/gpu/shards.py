"""Vocabulary shards over a process group beside the whole vocabulary on one GPU.

torchrun --nproc-per-node 2 -m benchmarks.gpu.shards

A rank per GPU over NCCL; without a GPU over gloo, at a tiny shape. Every rank makes the same head
and hidden states, keeps an uneven share of the columns, and compares the constrained loss, the KL
and their gradients with those of the whole head. Exit status 1 where they differ.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import deepalign_kernels as dak

SHAPES = {"cuda": (2048, 1024, 128256), "cpu": (24, 16, 640)}  # tokens, hidden size, vocabulary
MOST = 2e-2  # of the largest entry: two bf16 roundings of a gradient, and GEMMs of another width


def results(x: Tensor, w: Tensor, ref: Tensor, target: Tensor, **group: Any) -> list[Tensor]:
    """Loss, KL and their gradients by hidden states and head."""
    hidden, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss = dak.linear_constrained_loss(
        hidden, weight, target, beta=0.5, ref_hidden=x.flip(0), ref_weight=ref, **group
    )
    kl = dak.linear_token_kl(hidden, weight, x.flip(0), ref, reduction="mean", **group)
    assert isinstance(loss, Tensor)
    return [loss.detach(), kl.detach(), *torch.autograd.grad(loss + kl, (hidden, weight))]


def compare() -> list[str]:
    """What differs on this rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else 0)
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    T, H, V = SHAPES[kind]
    g = torch.Generator().manual_seed(0)
    x, w, ref = (torch.randn(n, H, generator=g) / H**0.25 for n in (T, V, V))
    x, w, ref = (a.to(device, dtype) for a in (x, w, ref))
    target = torch.randint(0, V, (T,), generator=g).to(device)
    share = V // ranks - 8  # of all but the last, which takes what is left
    own = slice(rank * share, V if rank == ranks - 1 else (rank + 1) * share)
    ours = results(x, w[own], ref[own], target, process_group=dist.group.WORLD)
    gold = results(x, w, ref, target)
    gold[3] = gold[3][own]
    told = []
    for name, a, b in zip(("loss", "kl", "d hidden", "d weight"), ours, gold, strict=True):
        apart = ((a - b).abs().max() / b.abs().max()).item()
        print(f"rank {rank}: {name} differs by {apart:.1e} of the largest", flush=True)
        if not apart <= MOST:
            told.append(name)
    return told


def main() -> int:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    wrong = compare()
    dist.destroy_process_group()
    print("WRONG:" if wrong else "right", *wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
