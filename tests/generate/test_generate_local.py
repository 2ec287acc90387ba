"""The local engine against transformers' own generate, and against itself in other company."""

import copy
import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the engine is of transformers")

import tiny_models
from peaked import peaked_model

from deepalign_kernels.generate.engine import Request, Sampling
from deepalign_kernels.generate.local import LocalEngine, _hosts
from deepalign_kernels.generate.sampling import Picker
from deepalign_kernels.toyworld import World, build_tokenizer, encode_record

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = build_tokenizer()
WORLD = World(0, limit=12)
GREEDY = Sampling(max_new_tokens=12)
HOT = Sampling(1.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def model():
    return peaked_model(TOKENIZER).double()  # rounding does not decide which token comes


@pytest.fixture(scope="module")
def prompts():
    """Of several lengths; with prefills of 0, 1, 3 and 7 tokens of the same answers."""
    rows = [encode_record(TOKENIZER, r) for r in WORLD.records("restricted")[:6]]
    return [(*prompt, *reply[:k]) for prompt, reply in rows for k in (0, 1, 3, 7)]


def of_transformers(model, prompt, steps=12):
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=steps,
        eos_token_id=TOKENIZER.eos_token_id, pad_token_id=TOKENIZER.pad_token_id,
    )  # fmt: skip
    return tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_greedy_is_that_of_transformers(model, prompts, mode):
    engine = LocalEngine(model, TOKENIZER, mode=mode, batch_size=7)
    replies = engine.generate([Request(p, GREEDY) for p in prompts])
    assert [r.ids for r in replies] == [of_transformers(model, p) for p in prompts]
    assert len({r.ids for r in replies}) > 10  # they are not all alike


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_log_probs_are_those_of_one_forward(model, prompts, mode):
    engine = LocalEngine(model, TOKENIZER, mode=mode)
    requests = [Request(p, HOT, seed) for seed, p in enumerate(prompts)]
    for request, reply in zip(requests, engine.generate(requests), strict=True):
        whole = torch.tensor([[*request.prompt, *reply.ids]])
        with torch.no_grad():
            logp = model(whole).logits.double().log_softmax(-1)[0, len(request.prompt) - 1 : -1]
        wanted = logp.gather(1, torch.tensor(reply.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(reply.logps).double(), wanted, atol=2e-5, rtol=1e-5)


def test_a_reply_depends_on_its_request_alone(model, prompts):
    """Exact: bit for bit in any company. Fast: the same ids here, log-probs up to rounding."""
    requests = [Request(p, HOT, seed) for seed, p in enumerate(prompts)]
    exact = LocalEngine(model, TOKENIZER, mode="exact")
    alone = [exact.generate([r])[0] for r in requests]
    assert exact.generate(requests) == alone
    assert exact.generate(requests[::-1])[::-1] == alone
    fast = LocalEngine(model, TOKENIZER, mode="fast").generate(requests)
    assert [r.ids for r in fast] == [r.ids for r in alone]
    assert LocalEngine(model, TOKENIZER).self_check(requests) == {
        "rows": len(requests),
        "different": 0,
    }


def test_self_check_sees_a_difference(model, prompts, monkeypatch):
    engine = LocalEngine(model, TOKENIZER)
    plain = engine._prefill

    def leaky(rows):
        cache, logits, mask = plain(rows)
        return cache, logits + (len(rows) > 1) * torch.randn_like(logits), mask

    monkeypatch.setattr(engine, "_prefill", leaky)
    found = engine.self_check([Request(p, GREEDY) for p in prompts])
    assert found["different"] > 3 and engine.mode == "fast"


def test_prefixes_are_computed_once(model, prompts):
    """The tokens that go through the model: those of the six longest prompts, then one a step."""
    seen = []
    hook = model.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["input_ids"].shape), with_kwargs=True
    )
    try:
        LocalEngine(model, TOKENIZER).generate([Request(p, GREEDY) for p in prompts] * 3)
    finally:
        hook.remove()
    first = next(s for s in seen if s[1] > 1)
    assert first == (6, max(map(len, prompts)))
    assert max(s[0] for s in seen) <= 64


def test_hosts():
    rows = [(1,), (1, 2), (1, 2, 3), (1, 3), (2,), (1, 2, 3), (1, 2, 4, 5)]
    hosts = _hosts(rows)
    assert set(hosts) == set(rows)
    for row, host in hosts.items():
        assert host[: len(row)] == row
    assert set(hosts.values()) == {(1, 2, 3), (1, 2, 4, 5), (1, 3), (2,)}


@pytest.mark.slow
def test_many_samples_follow_the_model(model, prompts):
    """First tokens of 4000 seeds have the model's own distribution under each setting."""
    prompt = prompts[0]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double()
    for sampling in (Sampling(1.5), Sampling(2.0, top_k=5), Sampling(2.0, top_p=0.7)):
        settings = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, 1)
        replies = LocalEngine(model, TOKENIZER, batch_size=4000).generate(
            [Request(prompt, settings, seed) for seed in range(4000)]
        )
        got = np.bincount([r.ids[0] for r in replies], minlength=len(TOKENIZER)) / 4000
        p = (logits / settings.temperature).softmax(-1).numpy()
        order = np.argsort(-p)
        kept = order[: settings.top_k or None]
        if settings.top_p < 1:
            kept = order[: int((p[order].cumsum() < settings.top_p).sum()) + 1]
        wanted = np.zeros_like(p)
        wanted[kept] = p[kept] / p[kept].sum()
        assert set(np.flatnonzero(got)) <= set(kept)
        assert np.abs(got - wanted).max() < 4 * np.sqrt(0.25 / 4000)


def test_sampling_is_that_of_transformers_warpers():
    """What is kept of random logits under temperature, top-k and top-p together."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits = 3 * torch.randn(1, 50)
    for t, k, p in itertools.product((0.3, 1.0, 2.0), (0, 1, 7), (0.05, 0.6, 0.95, 1.0)):
        warped = TemperatureLogitsWarper(t)(None, logits)
        warped = TopKLogitsWarper(k)(None, warped) if k else warped
        warped = TopPLogitsWarper(p)(None, warped) if p < 1 else warped
        shares = warped.softmax(-1)[0].double()
        requests = [Request((1,), Sampling(t, k, p, 1), seed) for seed in range(400)]
        pick = Picker(requests, torch.device("cpu"))
        # Equally spaced numbers instead of random ones: the share of each token, to 1/400.
        pick._uniform[0] = (torch.arange(400) + 0.5) / 400
        ids, _ = pick(logits.expand(400, -1), torch.arange(400), 0)
        got = torch.bincount(ids, minlength=50).double() / 400
        torch.testing.assert_close(got, shares, atol=1 / 400 + 1e-6, rtol=0)


def test_mixed_settings_in_one_batch(model, prompts):
    """Rows with settings of their own get what they get alone."""
    settings = [GREEDY, HOT, Sampling(0.7, 3, 0.8, 5), Sampling(1.2, 0, 0.5, 9)]
    requests = [Request(p, s, 7) for p in prompts[:5] for s in settings]
    together = LocalEngine(model, TOKENIZER).generate(requests)
    alone = [LocalEngine(model, TOKENIZER).generate([r])[0] for r in requests]
    assert [r.ids for r in together] == [r.ids for r in alone]
    assert {len(r.ids) for r in together if r.finish == "length"} >= {5, 9, 12}


def test_end_marks_end_a_reply(model, prompts):
    """With a likely token declared an end, replies stop at its first place, and not before."""
    plain = LocalEngine(model, TOKENIZER).generate([Request(p, HOT, 1) for p in prompts])
    ends = {reply.ids[2] for reply in plain[::3]}
    engine = LocalEngine(model, TOKENIZER)
    engine.end_ids |= ends
    stopped = engine.generate([Request(p, HOT, 1) for p in prompts])
    for whole, short in zip(plain, stopped, strict=True):
        at = next((i for i, t in enumerate(whole.ids) if t in engine.end_ids), None)
        assert short.ids == (whole.ids if at is None else whole.ids[: at + 1])
        assert short.finish == ("length" if at is None else "stop")
        assert short.text == TOKENIZER.decode(short.ids, skip_special_tokens=True)
    assert len({len(r.ids) for r in stopped}) > 3


def test_score(model, prompts):
    targets = [tuple(range(300 + i, 303 + 2 * i)) for i in range(len(prompts))]
    for mode in ("exact", "fast"):
        got = LocalEngine(model, TOKENIZER, mode=mode, batch_size=5).score(prompts, targets)
        for prompt, target, values in zip(prompts, targets, got, strict=True):
            ids = torch.tensor([[*prompt, *target]])
            with torch.no_grad():
                logp = model(ids).logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1]
            wanted = logp.gather(1, torch.tensor(target)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(values).double(), wanted, atol=2e-5, rtol=1e-5)


def test_what_does_not_fit_fails_alone(model, prompts):
    engine = LocalEngine(model, TOKENIZER)
    good = engine.generate([Request(prompts[0], GREEDY)])[0]
    got = engine.generate(
        [Request((5,) * 128, GREEDY), Request(prompts[0], GREEDY), Request((), GREEDY)]
    )
    assert [r.finish for r in got] == ["error", good.finish, "error"] and got[1] == good
    assert "128 tokens does not fit into a context of 128" in got[0].error
    assert "zero tokens" in got[2].error
    end = engine.generate([Request((5,) * 120, Sampling(1.0))])[0]
    assert len(end.ids) <= 8 and end.finish in ("length", "stop")
    with pytest.raises(ValueError, match="zero tokens"):
        engine.score([prompts[0]], [()])
    with pytest.raises(ValueError, match="context"):
        engine.score([(5,) * 100], [(5,) * 60])


def test_out_of_memory_halves_and_remembers(model, prompts, monkeypatch):
    engine, sizes = LocalEngine(model, TOKENIZER, batch_size=16), []
    plain = engine._prefill

    def small(rows):
        sizes.append(len(rows))
        if len(rows) > 5:
            raise torch.OutOfMemoryError("planted")
        return plain(rows)

    monkeypatch.setattr(engine, "_prefill", small)
    requests = [Request(p, GREEDY) for p in prompts]
    wanted = LocalEngine(model, TOKENIZER).generate(requests)
    assert [r.ids for r in engine.generate(requests)] == [r.ids for r in wanted]
    assert sizes[:3] == [16, 8, 4] and engine.batch_size == 4 and set(sizes[3:]) == {4}


def test_the_model_stays_as_it_was(model, prompts):
    own = copy.deepcopy(model).train()
    own.model.layers[1].eval()
    state, flag = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    LocalEngine(own, TOKENIZER).generate([Request(p, HOT, 1) for p in prompts])
    assert own.training and not own.model.layers[1].training and own.model.layers[0].training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.are_deterministic_algorithms_enabled() == flag


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "opt", "gpt2", "bloom"])
def test_families(name):
    """Layers with a window or a state of their own, and positions as in OPT."""
    model = tiny_models.build(name)
    model.generation_config.eos_token_id = None
    tokenizer = type("Ids", (), {"eos_token_id": None, "decode": lambda *_, **__: ""})()
    torch.manual_seed(0)
    rows = [tuple(torch.randint(3, 150, (n,)).tolist()) for n in (5, 9, 24)]
    rows += [rows[2][:20], rows[2][:7], rows[0]]
    engine = LocalEngine(model, tokenizer)
    settings = Sampling(max_new_tokens=6)
    for prompt, reply in zip(
        rows, engine.generate([Request(r, settings) for r in rows]), strict=True
    ):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(6):
                ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
        assert tuple(ids[len(prompt) :]) == reply.ids


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_new_tokens": 0},
    ],
)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


def test_bad_engines(model):
    with pytest.raises(ValueError, match="mode"):
        LocalEngine(model, TOKENIZER, mode="quick")
    with pytest.raises(ValueError, match="batch_size"):
        LocalEngine(model, TOKENIZER, batch_size=0)
