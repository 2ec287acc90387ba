"""Random search for a suffix: only improves, ends when the published code does, transfers."""

import dataclasses
import math

import pytest

pytest.importorskip("transformers", reason="models and templates are of transformers")

import torch
from peaked import peaked_model
from plain_losses import plain_losses

from deepalign_kernels import progress
from deepalign_kernels.attack import (
    GCG,
    Compose,
    Decoding,
    Insertion,
    RandomSearch,
    RankAssisted,
)
from deepalign_kernels.attack.chat import Chat
from deepalign_kernels.data.prompts import Prompt
from deepalign_kernels.generate.local import LocalEngine
from deepalign_kernels.toyworld import World, build_tokenizer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.clean_memory]
TOKENIZER = build_tokenizer()
RECORDS = World(0, limit=3).records("restricted")
PROMPTS = [Prompt(f"p{n}", r["messages"][0]["content"]) for n, r in enumerate(RECORDS)]
INIT = "mix mix mix mix mix"
QUICK = {"init": INIT, "target": "great choice , the glacier pie", "max_new_tokens": 4}


@pytest.fixture(scope="module")
def engine():
    return LocalEngine(peaked_model(TOKENIZER), TOKENIZER)


def test_random_search_only_improves(engine):
    config = RandomSearch(steps=60, proposals=3, temperature=0.0, **QUICK)
    record = next(iter(config(engine, PROMPTS[:1])))
    chat = Chat(TOKENIZER, config)
    first = chat.ids(Prompt("x", PROMPTS[0].prompt, suffix=INIT))
    target = chat.answer_ids(PROMPTS[0], config.target)[:1]
    begun = plain_losses(engine.model, first, torch.zeros(1, 0).long(), (), target)
    assert record.data["loss"] < float(begun) and record.data["accepted"] > 0
    steps, fell = zip(*record.data["improved"], strict=True)
    assert steps[0] == 0 and fell[0] == pytest.approx(float(begun), abs=1e-4)
    assert list(fell) == sorted(set(fell), reverse=True) and fell[-1] == record.data["loss"]
    assert len(fell) == record.data["accepted"] + 1 and steps[-1] <= record.data["steps"]
    again = next(iter(config(engine, PROMPTS[:1])))
    assert again.line == record.line


def test_self_transfer(engine):
    """Once a prompt is solved, its suffix begins the search for the others."""
    config = RandomSearch(steps=150, stop_at=7e-6, transfer=True, change=2, **QUICK)
    records, _, found = config.prepare(engine, PROMPTS)
    assert config.together and records[0].data["matched"] and found[0].suffix != INIT
    chat = Chat(TOKENIZER, config)
    for record, prompt in zip(records[1:], PROMPTS[1:], strict=True):
        ids = chat.ids(dataclasses.replace(prompt, suffix=found[0].suffix))
        target = chat.answer_ids(prompt, config.target)[:1]
        begun = plain_losses(engine.model, ids, torch.zeros(1, 0).long(), (), target)
        assert record.data["loss"] <= float(begun) + 1e-4  # a search only improves
    alone, _, _ = dataclasses.replace(config, transfer=False, steps=1).prepare(engine, PROMPTS)
    assert all(a.data["loss"] > r.data["loss"] for a, r in zip(alone[1:], records[1:], strict=True))


@pytest.mark.parametrize(
    "attack",
    [
        RandomSearch(steps=8, restarts=2, **QUICK),
        GCG(steps=6, width=8, topk=4, **QUICK),
        GCG(steps=6, width=8, topk=4, universal=True, **QUICK),
        Compose(GCG(steps=6, width=8, topk=4, **QUICK), Decoding(top_ks=(1, 2), max_new_tokens=2)),
        RankAssisted(depths=(3,), ranks=(2,), refusals=("no",), max_new_tokens=2),
        Insertion(after=(2,), max_new_tokens=2),
    ],
    ids=lambda a: a.name,
)
def test_how_far_a_long_unit_is(engine, attack):
    """All of an attack on two prompts is one unit; its share rises step by step to the whole."""
    shares = []
    with progress.heard(shares.append):
        list(attack(engine, PROMPTS[:2]))
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0)
    steps = {"random_search": 32, "gcg": 6 if attack.together else 12}.get(attack.name, 2)
    assert len(shares) >= steps and shares[0] <= 1.0 / steps


@pytest.mark.parametrize(
    "plateau,gain,above", [(12, 1e-7, 2e-8), (12, 0.5, 6.75e-6), (0, 0.5, 2e-8), (12, 1e-12, 2e-8)]
)
def test_the_end_on_a_plateau(engine, plateau, gain, above):
    """Read off the curve of an endless search: the first step at which the probability is above
    the bound and was hardly less `plateau` steps before. The greedy protocol has no such end."""
    config = RandomSearch(
        steps=60, stop_at=0.99, plateau=0, plateau_from=above, plateau_gain=gain, **QUICK
    )
    (endless,), _, _ = config.prepare(engine, PROMPTS[:1])
    assert endless.data["ended"] == "steps" and endless.data["steps"] == 60
    fell = dict(endless.data["improved"])
    now, best = math.nan, []
    for step in range(61):
        now = math.exp(-fell[step]) if step in fell else now
        best.append(now)
    wanted = next(
        (
            n for n in range(plateau, 60)
            if plateau and best[n] > above and best[n] - best[n - plateau] < gain
        ),
        60,
    )  # fmt: skip
    (record,), _, _ = dataclasses.replace(config, plateau=plateau).prepare(engine, PROMPTS[:1])
    assert record.data["steps"] == wanted and not record.data["matched"]
    assert record.data["ended"] == ("plateau" if wanted < 60 else "steps")
    greedy = dataclasses.replace(config, plateau=plateau, temperature=0.0)
    assert greedy.prepare(engine, PROMPTS[:1])[0][0].data["steps"] == 60


def test_the_published_ends_are_the_defaults():
    config = RandomSearch()
    found = config.stop_at, config.plateau, config.plateau_from, config.plateau_gain
    assert found == (0.1, 750, 0.02, 0.01)


@pytest.mark.parametrize(
    "wrong", [{"stop_at": 0.0}, {"proposals": 0}, {"plateau": -1}, {"plateau_gain": 1.0}]
)
def test_bad_configs(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RandomSearch(**wrong)
