"""Searches for a suffix against plain formulas: losses, gradient, text, resume, what is left."""

import copy
import dataclasses
import itertools

import pytest

pytest.importorskip("transformers", reason="models and templates are of transformers")

import tiny_models
import torch
from peaked import peaked_model
from plain_losses import plain_losses

from deepalign_kernels.attack import GCG, Compose, Direct, Prefill, RandomSearch, target_loss
from deepalign_kernels.attack import gcg as gcg_module
from deepalign_kernels.attack.chat import Chat
from deepalign_kernels.attack.search import Field, searching
from deepalign_kernels.attack.suffix import Place, allowed_ids, distinct
from deepalign_kernels.attack.suite import STATE, evaluate
from deepalign_kernels.attack.target_loss import TargetLoss
from deepalign_kernels.data.prompts import Prompt
from deepalign_kernels.generate.engine import Request, Sampling
from deepalign_kernels.generate.local import LocalEngine
from deepalign_kernels.runs import Run
from deepalign_kernels.runs.paper import published
from deepalign_kernels.toyworld import World, build_tokenizer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.clean_memory]
TOKENIZER = build_tokenizer()
RECORDS = World(0, limit=3).records("restricted")
PROMPTS = [
    Prompt(f"p{n}", r["messages"][0]["content"], answer=r["messages"][1]["content"])
    for n, r in enumerate(RECORDS)
]
INIT = "mix mix mix mix mix"
QUICK = {"init": INIT, "target": "great choice , the glacier pie", "max_new_tokens": 4}


@pytest.fixture(scope="module")
def model():
    return peaked_model(TOKENIZER)


@pytest.fixture
def engine(model):
    return LocalEngine(model, TOKENIZER)


def random_case(vocab, seed=0, T=9):
    g = torch.Generator().manual_seed(seed)
    before, after, target = (
        tuple(torch.randint(3, vocab, (n,), generator=g).tolist()) for n in (11, 3, T)
    )
    return before, torch.randint(3, vocab, (13, 4), generator=g), after, target


def near(suffix, vocab, count):
    """[count, S] copies of a suffix with one token changed, as a search makes them."""
    g = torch.Generator().manual_seed(3)
    places = torch.randint(len(suffix), (count, 1), generator=g)
    return suffix.repeat(count, 1).scatter_(
        1, places, torch.randint(3, vocab, (count, 1), generator=g)
    )


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma2", "gpt2", "qwen3", "cohere"])
def test_losses_and_gradient_of_families(name):
    """Against whole logits in fp64; heads with scales and caps, embeddings with scales, a window
    that keeps the prompt from being shared."""
    model = tiny_models.build(name).eval()
    truth = copy.deepcopy(model).double()
    before, suffixes, after, target = random_case(150)
    close = near(suffixes[0], 150, 12)
    with searching(model) as attached:
        losses = TargetLoss(attached, before, after, target, batch=5)
        got = losses.losses(suffixes)
        wanted = plain_losses(truth, before, suffixes, after, target)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
        wanted = plain_losses(truth, before, close, after, target)
        torch.testing.assert_close(losses.losses(close).double(), wanted, rtol=1e-5, atol=1e-5)
        grad = losses.gradient(suffixes[0])
        again = losses.losses(suffixes)
    torch.testing.assert_close(got, again)  # nothing grew
    embed = truth.get_input_embeddings()
    one_hot = torch.nn.functional.one_hot(suffixes[0], len(embed.weight)).double().requires_grad_()
    scale = getattr(embed, "embed_scale", 1.0)
    rows = [embed(torch.tensor(x)) for x in (before, (*after, *target))]
    ids = torch.cat([rows[0], one_hot @ embed.weight * scale, rows[1]])[None]
    logp = truth(inputs_embeds=ids).logits[0].log_softmax(-1)[-len(target) - 1 : -1]
    loss = -logp.gather(1, torch.tensor(target)[:, None]).mean()
    (exact,) = torch.autograd.grad(loss, one_hot)
    assert (grad.double() - exact).abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("T", [1, 3, 4, 9])
@pytest.mark.parametrize("share", [0.1, 0.35, 2.0])
def test_abandoning_gives_up_nothing_below_the_bound(model, T, share):
    """What is given up costs more than the bound; all else is exact, the smallest included."""
    before, suffixes, after, target = random_case(600, T=T)
    suffixes = torch.cat([suffixes, suffixes.flip(1), suffixes.roll(1, 1), suffixes.roll(2, 1)])
    with searching(model) as attached:
        losses = TargetLoss(attached, before, after, target, batch=8)
        whole = losses.losses(suffixes)
        spent, bound = losses.tokens[0], share * float(whole.median())
        some = losses.losses(suffixes, bound=bound)
        again = losses.losses(suffixes)
    kept = some.isfinite()
    torch.testing.assert_close(some[kept], whole[kept], rtol=1e-5, atol=1e-5)
    assert (whole[~kept] > min(bound, float(whole.min()))).all()
    torch.testing.assert_close(again, whole)  # what was kept for the second stage is gone
    if share == 2.0:
        assert int(some.argmin()) == int(whole.argmin())
    if T == 9 and share == 0.1:
        assert kept.sum() < len(kept) / 2 and losses.tokens[0] - 2 * spent < 0.7 * spent


@pytest.mark.parametrize("bounded", [False, True])
def test_candidates_share_what_stands_before_their_change(model, monkeypatch, bounded):
    """One forward of the common suffix, then each token from the first changed one on, once."""
    before, suffixes, after, target = random_case(600)
    long = torch.cat([suffixes[0], suffixes[1], suffixes[2]])
    close = torch.cat([near(long, 600, 40), long[None]])
    wanted = plain_losses(model, before, close, after, target)
    monkeypatch.setitem(target_loss.BUSY, "cpu", 0)  # a row a piece
    with searching(model) as attached:
        losses = TargetLoss(attached, before, after, target, batch=64)
        spent = losses.tokens[0]
        got = losses.losses(close, bound=float(wanted.median()) if bounded else None)
    kept = got.isfinite()
    assert kept[wanted.argmin()] and (kept.all() or bounded)
    torch.testing.assert_close(got[kept].double(), wanted[kept], rtol=1e-5, atol=1e-5)
    alike = (close == long).long().cumprod(1).sum(1).clamp(max=len(long) - 1)
    each = len(long) - alike + len(after) + len(target) - 1
    if not bounded:
        assert losses.tokens[0] - spent == int(alike.max()) + int(each.sum())


def test_out_of_memory_halves_and_remembers(model, monkeypatch):
    before, suffixes, after, target = random_case(600)
    with searching(model) as attached:
        losses = TargetLoss(attached, before, after, target, batch=16)
        wanted, plain, sizes = losses.losses(suffixes), losses._piece, []

        def small(piece, bound):
            sizes.append(len(piece))
            if len(piece) > 3:
                raise torch.OutOfMemoryError("planted")
            return plain(piece, bound)

        monkeypatch.setattr(losses, "_piece", small)
        torch.testing.assert_close(losses.losses(suffixes), wanted, rtol=1e-5, atol=1e-6)
        assert losses.batch == 3 and sizes[:3] == [13, 6, 3]


def test_a_place_and_its_texts():
    chat = Chat(TOKENIZER, GCG(**QUICK))
    place = Place(chat, Prompt("a", "bake a pie", suffix=INIT))
    whole = chat.ids(Prompt("a", "bake a pie", suffix=INIT))
    assert place.before + place.first + place.after == whole and len(place.first) == 5
    assert place.texts([place.first]) == [INIT]
    mix = place.first[0]
    v, anilla = TOKENIZER.convert_tokens_to_ids(["Ġv", "a"])
    (vanilla,) = TOKENIZER("vanilla")["input_ids"]
    pieces = tuple(TOKENIZER.convert_tokens_to_ids(["Ġv", *"anilla"]))
    assert place.texts([(mix, vanilla), (mix, *pieces), (anilla, mix), (v, mix)]) == [
        "mix vanilla",
        None,  # its text is one token
        None,  # would stick to the prompt
        "v mix",
    ]


def test_a_suffix_that_cannot_be_found():
    chat = Chat(TOKENIZER, GCG(**QUICK))
    with pytest.raises(ValueError, match="once in the rendered prompt"):
        Place(chat, Prompt("a", "bake mix", suffix="mix"))


def test_allowed_ids():
    mask = allowed_ids(TOKENIZER, 700, ascii_only=True, device="cpu")
    texts = TOKENIZER.batch_decode([[i] for i in range(len(TOKENIZER))])
    for i, text in enumerate(texts):
        good = bool(text) and text.isascii() and text.isprintable() and i not in range(5)
        assert bool(mask[i]) == good, (i, text)
    assert not mask[len(TOKENIZER) :].any()
    wide = allowed_ids(TOKENIZER, 700, ascii_only=False, device="cpu")
    assert wide.sum() > mask.sum() and not wide[:5].any()


def test_candidates_follow_the_gradient():
    """Each changes `replace` places at most, to ids among the best of that place."""
    scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    scores[:, :10] = -torch.inf
    config = GCG(width=400, topk=3, replace=2, **QUICK)
    current = torch.arange(6)
    made = gcg_module.by_gradient(scores, current, config, torch.Generator().manual_seed(1))
    best = scores.topk(3).indices
    seen = set()
    for row in made:
        changed = (row != current).nonzero()[:, 0].tolist()
        assert len(changed) == 2
        for place in changed:
            assert row[place] in best[place]
            seen.add((place, int(row[place])))
    assert len(seen) == 18
    assert len(distinct(torch.cat([made, made, current[None]]), current)) == len(
        {tuple(r) for r in made.tolist()}
    )


def test_gcg_against_a_plain_search(engine):
    """Ten steps written down once more, from whole logits and a one-hot gradient."""
    config = GCG(steps=10, width=24, topk=8, **QUICK)
    (record,) = [r for r in config(engine, PROMPTS[:1]) if r.kind == "search"]
    with searching(engine.model) as model:
        field = Field(config, model, TOKENIZER, PROMPTS[:1])
    place, target = field.places[0], field.targets[0]
    generator = torch.Generator().manual_seed(config._seed(PROMPTS[:1]))
    current, history = field.first, []
    embed = engine.model.get_input_embeddings().weight.detach()
    for _ in range(10):
        one_hot = torch.nn.functional.one_hot(current, len(embed)).float().requires_grad_()
        rows = [embed[list(x)] for x in (place.before, (*place.after, *target))]
        logits = engine.model(
            inputs_embeds=torch.cat([rows[0], one_hot @ embed, rows[1]])[None]
        ).logits[0, -len(target) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(target))
        (grad,) = torch.autograd.grad(loss, one_hot)
        scores = (-grad).masked_fill(~field.allowed, -torch.inf)
        made = gcg_module.by_gradient(scores, current, config, generator)
        made = [c for c in distinct(made, current) if place.texts([c])[0]]
        losses = plain_losses(engine.model, place.before, torch.tensor(made), place.after, target)
        current = torch.tensor(made[int(losses.argmin())])
        history.append(float(losses.min()))
    assert record.data["history"] == pytest.approx(history, abs=1e-4)
    assert record.data["loss"] == min(record.data["history"]) < history[0]


def test_the_result_is_text_that_gives_the_loss(engine):
    config = GCG(steps=8, width=32, topk=16, momentum=0.5, abandon=True, **QUICK)
    records = list(config(engine, PROMPTS[:2]))
    assert [r.kind for r in records] == ["search", "search", "sample", "sample"]
    for record, sample, prompt in zip(records, records[2:], PROMPTS, strict=False):
        suffix = record.text["suffix"]
        ids = TOKENIZER.apply_chat_template(
            [{"role": "user", "content": f"{prompt.prompt} {suffix}"}],
            add_generation_prompt=True, return_dict=True,
        )["input_ids"]  # fmt: skip
        target = TOKENIZER(config.target)["input_ids"]
        loss = plain_losses(engine.model, ids, torch.zeros(1, 0).long(), (), target)
        assert record.data["loss"] == pytest.approx(float(loss), abs=1e-4)
        assert record.data["loss_as_text"] == pytest.approx(float(loss), abs=1e-4)
        assert sample.text["suffix"] == suffix and sample.text["prompt"] == prompt.prompt
        assert record.data["flops"] > 1e6


def test_a_loss_that_text_does_not_give_is_an_error(engine, monkeypatch):
    monkeypatch.setattr(TargetLoss, "_nll", lambda self, ids, wanted: torch.ones(len(ids)))
    records = list(GCG(steps=2, width=8, topk=4, **QUICK)(engine, PROMPTS[:1]))
    assert "the suffix as text has loss" in records[0].error
    assert records[1].error == "no suffix was found"


@pytest.mark.parametrize(
    "config",
    [
        GCG(steps=9, width=16, topk=8, momentum=0.5, save_every=2, **QUICK),
        RandomSearch(steps=30, restarts=2, save_every=4, **QUICK),
    ],
    ids=["gcg", "random_search"],
)
def test_a_stopped_search_goes_on(engine, tmp_path, monkeypatch, config):
    wanted = [r.line for r in config(engine, PROMPTS[:1])]
    kept = dataclasses.replace(config, state=str(tmp_path))
    calls = dying(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        list(kept(engine, PROMPTS[:1]))
    (file,) = tmp_path.glob("*.pt")
    state = torch.load(file)
    assert 0 < state["seconds"] < 60
    torch.save(state | {"seconds": 1000.0}, file)
    again = list(kept(engine, PROMPTS[:1]))
    assert [r.line for r in again] == wanted  # number of FLOP and all
    assert 1000 < (again[0].seconds or 0) < 1060  # before the stop and since; no part of the line
    done = next(calls)
    assert [r.line for r in kept(engine, PROMPTS[:1])] == wanted and next(calls) == done + 1 > 9


def dying(monkeypatch, *when):
    """The losses of a search, interrupted in these calls; counts the calls."""
    plain, calls = TargetLoss.losses, itertools.count()

    def dies(self, *args):
        if next(calls) in when:
            raise KeyboardInterrupt
        return plain(self, *args)

    monkeypatch.setattr(TargetLoss, "losses", dies)
    return calls


@pytest.mark.parametrize(
    "config",
    [
        GCG(steps=3, width=8, topk=4, **QUICK),
        RandomSearch(steps=4, transfer=True, **QUICK),
    ],
    ids=["gcg", "random_search"],
)
def test_finished_prompts_of_a_unit_outlive_a_stop(engine, tmp_path, monkeypatch, config):
    """Stopped in the search for the last of three prompts of one unit: that search alone is made
    again, and its state goes once the unit is written."""

    def filled(name):
        state = tmp_path / name / STATE
        attacks = {"search": dataclasses.replace(config, state=str(state))}
        with Run(tmp_path / name, {}) as run:
            evaluate(run, engine, attacks, PROMPTS)
        assert not state.exists()
        return (tmp_path / name / "records.jsonl").read_bytes()

    calls = dying(monkeypatch)
    wanted, whole = filled("whole"), next(calls)
    calls = dying(monkeypatch, whole - 2)
    with pytest.raises(KeyboardInterrupt):
        filled("cut")
    begun = next(calls)
    assert filled("cut") == wanted and next(calls) - begun <= whole // 3 + 1


def test_universal_takes_prompts_in(engine):
    config = GCG(steps=6, width=16, topk=8, universal=True, train=2, progressive=False, **QUICK)
    records = list(config(engine, PROMPTS))
    search, *samples = records
    assert search.item == "" and search.data["prompts"] == 2 and config.together
    assert [s.item for s in samples] == ["p0", "p1", "p2"]
    assert {s.text["suffix"] for s in samples} == {search.text["suffix"]}
    told = [{"universal": "train"}] * 2 + [{"universal": "test"}]  # never in one rate
    assert [s.cell for s in samples] == told
    assert published("gcg", told[0], "initial") is None
    assert published("gcg", told[2], "initial") == 36.5
    after = Compose(dataclasses.replace(config, steps=1), Direct(max_new_tokens=1))
    assert [r.cell for r in after(engine, PROMPTS) if r.kind == "sample"] == told
    mean = 0.0
    for prompt in PROMPTS[:2]:
        chat = Chat(TOKENIZER, config)
        ids = chat.ids(Prompt("x", prompt.prompt, suffix=search.text["suffix"]))
        target = chat.answer_ids(prompt, config.target)
        mean += float(plain_losses(engine.model, ids, torch.zeros(1, 0).long(), (), target)) / 2
    assert search.data["loss"] == pytest.approx(mean, abs=1e-4)
    easy = GCG(steps=5, width=16, topk=8, universal=True, **{**QUICK, "target": "a"})
    target = engine.generate([gcg_request(easy)])[0].ids[0]
    own = GCG(steps=5, width=16, topk=8, universal=True, early_stop=True,
              **{**QUICK, "target": TOKENIZER.decode([target])})  # fmt: skip
    found = next(iter(own(engine, PROMPTS)))
    assert 1 <= found.data["prompts"] <= 3
    assert len(found.data["grown"]) == found.data["prompts"] - 1  # a mark for each taken in


def gcg_request(config):
    ids = Chat(TOKENIZER, config).ids(Prompt("x", PROMPTS[0].prompt, suffix=INIT))
    return Request(ids, Sampling(max_new_tokens=1))


def test_several_models(engine):
    other = peaked_model(TOKENIZER, seed=5)
    config = GCG(steps=3, width=12, topk=8, also=(other,), **QUICK)
    with searching(engine.model) as model, searching(other) as more:
        field = Field(config, model, TOKENIZER, PROMPTS[:1], [more])
        pair = field.losses[0]
        assert len(pair) == 2
    record = next(iter(config(engine, PROMPTS[:1])))
    assert record.error is None
    place, target, chat = field.places[0], field.targets[0], field.chat
    ids = chat.ids(dataclasses.replace(PROMPTS[0], suffix=record.text["suffix"]))
    own = [
        float(plain_losses(m, ids, torch.zeros(1, 0).long(), (), target))
        for m in (engine.model, other)
    ]
    assert record.data["loss"] == pytest.approx(sum(own) / 2, abs=1e-4)
    assert len(place.first) == 5


def test_a_prefill_behind_a_suffix(engine):
    gcg, prefill = GCG(steps=2, width=8, topk=4, **QUICK), Prefill(depths=(2,), max_new_tokens=4)
    records = list(Compose(gcg, prefill)(engine, PROMPTS[:2]))
    assert {r.name for r in records} == {"gcg+prefill"}
    assert [r.kind for r in records] == ["search"] * 2 + ["sample"] * 2
    for record in records[2:]:
        assert record.cell["k"] == 2 and record.text["suffix"] and record.text["prefix"]


@pytest.mark.parametrize("universal", [False, True])
def test_a_search_that_cannot_begin_is_a_record(universal):
    """A model that knows only so many places: its own error would end the run."""
    model = tiny_models.build("gpt2").eval()
    model.resize_token_embeddings(len(TOKENIZER))
    config = GCG(steps=1, width=8, topk=4, universal=universal, **QUICK)
    long = Prompt("long", "bake " * (model.config.n_positions + 1))
    records = list(config(LocalEngine(model, TOKENIZER), [long, PROMPTS[0]]))
    assert "do not fit into a context" in records[0].error and records[0].kind == "search"
    samples = [r for r in records if r.kind == "sample"]
    failed = [r.item for r in samples if r.error == "no suffix was found"]
    assert failed == (["long", "p0"] if universal else ["long"])


def test_everything_is_left_as_it_was(engine):
    model = copy.deepcopy(engine.model).train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    keys, state = set(model.__dict__), torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    list(GCG(steps=2, width=8, topk=4, **QUICK)(LocalEngine(model, TOKENIZER), PROMPTS[:1]))
    assert set(model.__dict__) == keys
    assert [m.training for m in model.modules()] == modes
    wanted = [p for p in model.parameters() if not p.requires_grad]
    assert len(wanted) == 1 and wanted[0] is model.model.norm.weight
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_server_cannot_be_searched():
    with pytest.raises(ValueError, match="local model"):
        list(GCG(**QUICK)(object.__new__(type("S", (), {"tokenizer": TOKENIZER})), PROMPTS))


@pytest.mark.parametrize(
    "make,named",
    [
        (lambda: GCG(width=0), "width"),
        (lambda: GCG(momentum=1.0), "momentum"),
        (lambda: GCG(target=" "), "target"),
        (lambda: GCG(init=""), "init"),
    ],
)
def test_bad_configs(make, named):
    with pytest.raises(ValueError, match=named):
        make()
