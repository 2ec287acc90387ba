"""The demo's fine-tunings in one process and in two: the same numbers."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("transformers", reason="deepalign_kernels.toyworld needs transformers")

from deepalign_kernels.toyworld import World, demo, stages

STAGES = ("base", "align", "deep", "attack", "task")


@pytest.mark.slow
def test_worker_processes_change_no_result(tmp_path):
    world, recipes = World(5, limit=2), stages.Recipes().shortened(2)
    few = {name: replace(getattr(recipes, name), batch_size=8) for name in STAGES}
    recipes = replace(recipes, **few)
    one, two = (demo.run_seed(world, recipes, tmp_path / str(n), workers=n) for n in (1, 2))
    assert one.pop("seconds").keys() == two.pop("seconds").keys()
    assert one == two
    assert len(one["attack_curves"]) == 4 and len(one["kl"]) == 3
    logs = [sorted((tmp_path / n).rglob("train_log.jsonl")) for n in "12"]
    assert [len(x) for x in logs] == [9, 9]
    records = [sorted((tmp_path / n).rglob("records.jsonl")) for n in "12"]
    assert [len(x) for x in records] == [16, 16]  # 9 attacks, 2 analyses, 4 dynamics, the curves
    for a, b in zip(*records, strict=True):
        assert a.read_bytes() == b.read_bytes()
    for a, b in zip(*logs, strict=True):  # the losses, too, to the last bit
        assert [x.get("objective") for x in lines(a)] == [x.get("objective") for x in lines(b)]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
