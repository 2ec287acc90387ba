"""Pieces that tests of the benchmarks share."""

import pytest
import torch

from benchmarks.cases.logits import LOGITS, Shape
from benchmarks.harness import ceilings, cells, machine
from benchmarks.harness.cells import Row

SHAPE = Shape(12, 640)


def run(table, wanted="ours,plain", shape=SHAPE, dtypes=("fp32",), **more):
    plan = cells.RunPlan(list(table), [shape], list(dtypes), wanted=wanted, seconds=0.002, **more)
    return cells.run(plan, ceilings.Ceilings(), lambda text: None)


@pytest.fixture(autouse=True)
def small_rulers(monkeypatch):
    monkeypatch.setattr(machine, "last_level_cache", lambda device: 1 << 18)


def cell(name, phase="fwd_bwd"):
    return LOGITS[name], "cpu", torch.float32, phase


def _row(ms, spread=0.01, extra=1 << 20, **more):
    parts = dict(op="token_kl/js", phase="fwd", T=8, V=9, H=0, dtype="fp32", provider="native")
    times = dict(ms=ms, p10_ms=ms * (1 - spread), p90_ms=ms * (1 + spread), extra_bytes=extra)
    return Row(**{**parts, "group": "ours", **times, **more})
