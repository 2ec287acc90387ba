"""The engine over a server: a real one on loopback, and one that does everything wrong."""

import email.utils
import os
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("httpx", reason='needs the extra "eval"')
pytest.importorskip("transformers", reason="the tokenizer is of transformers")

from bad_server import planned
from peaked import peaked_model

from deepalign_kernels.generate import server as serving
from deepalign_kernels.generate.engine import Request, Sampling
from deepalign_kernels.generate.local import LocalEngine
from deepalign_kernels.generate.server import Limits, ServerEngine
from deepalign_kernels.toyworld import World, build_tokenizer, encode_record

TOKENIZER = build_tokenizer()
QUICK = Limits(concurrency=4, tries=3, timeout=2.0, pause=0.01, longest_pause=0.5)
FEW = Sampling(0.7, 5, 0.9, max_new_tokens=8)
REQUEST = Request((1, 300, 4), FEW, seed=2**40 + 3)


def good(text="yes", tokens=3, **more):
    choice = {"text": text, "finish_reason": "stop", "index": 0, **more}
    return 200, {"choices": [choice], "usage": {"completion_tokens": tokens}}


def ask(plan, requests=(REQUEST,), limits=QUICK, **options):
    with planned(plan) as server:
        engine = ServerEngine(server.url, "m", TOKENIZER, limits=limits, **options)
        try:
            return engine.generate(requests), server
        finally:
            engine.close()


def test_what_goes_out():
    (reply,), server = ask(lambda *_: good(token_ids=[5, 6, 7]), key="secret")
    assert reply.text == "yes" and reply.ids == (5, 6, 7) and reply.error is None
    ((path, body, headers),) = server.seen
    assert path == "/v1/completions" and headers["Authorization"] == "Bearer secret"
    assert body == {
        "model": "m",
        "prompt": [1, 300, 4],
        "max_tokens": 8,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": 3,
    }


def test_nothing_is_left_to_the_models_generation_config():
    """Top-k 0 is all tokens, not what the server's copy of the checkpoint says. Servers that take
    text or chats know other fields, and refuse these."""
    every = Request((1, 300, 4), Sampling(0.7), messages=({"role": "user", "content": "hi"},))
    for send, fields in (("ids", {"top_k", "min_p", "repetition_penalty"}), ("chat", set())):
        _, server = ask(lambda *_: good(), [every], send=send)
        body = server.seen[0][1]
        assert {"top_k", "min_p", "repetition_penalty"} & body.keys() == fields
        assert body.get("top_k", -1) == -1


BAD = {
    "429": (429, {"error": "slow down"}),
    "500": (500, b"<html>oops"),
    "503 with a date": (503, {}, {"Retry-After": email.utils.formatdate(0)}),
    "cut in the answer": (*good(), {}, 20),
    "cut before the answer": (*good(), {}, 0),
    "no JSON": (200, b"{not json"),
    "JSON of another kind": (200, [1, 2]),
    "no choices": (200, {"choices": []}),
    "two choices": (200, {"choices": [good()[1]["choices"][0]] * 2}),
    "no finish": (200, {"choices": [{"text": "x"}]}),
    "finish of a filter": (200, {"choices": [{"text": "x", "finish_reason": "content_filter"}]}),
    "too many tokens": good(tokens=9),
    "wrong number of ids": good(token_ids=[1, 2]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_is_asked_again(name):
    (reply,), server = ask(lambda n, *_: BAD[name] if n < 2 else good())
    assert reply.text == "yes" and reply.error is None and len(server.seen) == 3


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_is_never_a_reply(name):
    (reply,), server = ask(lambda *_: BAD[name], limits=Limits(tries=2, pause=0.01, give_up=9))
    assert reply.finish == "error" and reply.text == "" and reply.error and len(server.seen) == 2


def test_a_refused_request_is_not_asked_again():
    replies, server = ask(lambda n, *_: (400, {"error": "too long"}) if n == 0 else good(),
                          [REQUEST] * 3, limits=Limits(concurrency=1))  # fmt: skip
    assert replies[0].error == "status 400 from /completions" and not replies[0].again
    assert "too long" in replies[0].detail  # a server's own words may hold the prompt
    assert [r.error for r in replies[1:]] == [None, None] and len(server.seen) == 3


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_lets_nobody_in_ends_the_run(status):
    with planned(lambda *_: (status, {"error": "your prompt: abracadabra"})) as server:
        engine = ServerEngine(server.url, "m", TOKENIZER, limits=Limits(concurrency=1))
        with pytest.raises(ConnectionError, match=f"status {status}: .*again to go on") as error:
            engine.generate([REQUEST] * 9)
        assert len(server.seen) <= 2 and "abracadabra" not in str(error.value)


def test_what_may_go_well_later_is_marked():
    """Of each bad answer: tried again in the next run, and nothing of it in the reason."""
    again = {}
    for name, (status, body, *more) in BAD.items():
        if isinstance(body, dict):
            body = {**body, "echo": "abracadabra"}
        (reply,), _ = ask(lambda *_, a=(status, body, *more): a, limits=Limits(tries=1, give_up=9))
        assert "abracadabra" not in reply.error, name
        again[name] = reply.again
    assert {name for name, yes in again.items() if yes} == {
        "429", "500", "503 with a date", "cut in the answer", "cut before the answer", "no JSON",
    }  # fmt: skip


def test_retry_after_is_obeyed(monkeypatch):
    slept = []
    monkeypatch.setattr(serving.time, "sleep", slept.append)
    late = email.utils.formatdate(time.time() + 30)
    asked = [(429, "0.25"), (429, "900"), (503, late), (429, "soon")]
    answers = [*((code, {}, {"Retry-After": value}) for code, value in asked), good()]
    limits = Limits(tries=5, pause=1.0, longest_pause=60.0)
    (reply,), _ = ask(lambda n, *_: answers[n], limits=limits)
    assert reply.text == "yes"
    assert slept[:2] == [0.25, 60.0] and 25 < slept[2] <= 30 and 4 <= slept[3] <= 8


def test_pauses_grow_and_differ():
    engine = ServerEngine("http://127.0.0.1:1", "m", TOKENIZER, limits=Limits(pause=1.0))
    for attempt in range(10):
        pauses = {engine._pause(attempt) for _ in range(50)}
        longest = min(2.0**attempt, 120.0)
        assert len(pauses) > 40 and longest / 2 <= min(pauses) and max(pauses) <= longest


def test_concurrency_is_bounded_and_used():
    def slow(*_):
        time.sleep(0.05)
        return good()

    replies, server = ask(slow, [REQUEST] * 20)
    assert all(r.error is None for r in replies) and server.most_at_work == 4


def test_replies_are_in_order():
    def plan(n, path, body):
        time.sleep(0.02 * (4 - body["seed"]))
        return good(str(body["seed"]))

    replies, _ = ask(plan, [Request((1,), FEW, seed=s) for s in range(4)])
    assert [r.text for r in replies] == ["0", "1", "2", "3"]


def test_a_server_that_stops_in_the_middle():
    with planned(lambda *_: good()) as server:
        limits = Limits(concurrency=2, tries=2, pause=0.01, timeout=1.0)
        engine = ServerEngine(server.url, "m", TOKENIZER, limits=limits)
        assert engine.generate([REQUEST])[0].text == "yes"
    with pytest.raises(ConnectionError, match="is gone .*run again to go on"):
        engine.generate([REQUEST] * 50)


def test_a_slow_server_times_out():
    def plan(n, *_):
        time.sleep(0.6 if n == 0 else 0)
        return good()

    (reply,), server = ask(plan, limits=Limits(tries=2, timeout=0.3, pause=0.01))
    assert reply.text == "yes" and len(server.seen) == 2


def test_ids_that_do_not_survive_as_text():
    """One word in two pieces comes back as one; the request is refused before it is sent."""
    word = TOKENIZER("vanilla")["input_ids"]
    pieces = TOKENIZER.convert_tokens_to_ids(["Ġv", *"anilla"])
    requests = [Request(tuple(ids), FEW) for ids in (word, pieces)]
    replies, server = ask(lambda *_: good(), requests, send="text")
    assert replies[0].error is None and "do not survive" in replies[1].error
    assert [body["prompt"] for _, body, _ in server.seen] == [TOKENIZER.decode(word)]


def scores(warm_error=0.0, short=0):
    """A server that scores; from the second time on, the same ids come out of its cache."""
    known = {}

    def plan(n, path, body):
        ids = body["prompt"]
        logps = [None] + [-(i % 7) / 10 for i in ids[1:]] + [-1.0]
        if known.setdefault(tuple(ids), n) != n:
            logps = [None if x is None else x + warm_error for x in logps]
        choice = {"text": "", "logprobs": {"token_logprobs": logps[: len(logps) - short]}}
        return 200, {"choices": [choice]}

    return plan


def test_scores():
    with planned(scores()) as server:
        engine = ServerEngine(server.url, "m", TOKENIZER, limits=QUICK)
        assert engine.score([(1, 2), (3,)], [(10, 11), (12,)]) == [[-0.3, -0.4], [-0.5]]
        assert len(server.seen) == 5  # three for the check, once
        engine.score([(1,)], [(2,)])
        assert len(server.seen) == 6


def test_scores_out_of_a_wrong_prefix_cache():
    with planned(scores(warm_error=-0.5)) as server:
        engine = ServerEngine(server.url, "m", TOKENIZER, limits=QUICK)
        with pytest.raises(ValueError, match="0.50 nats once its prefix cache is warm"):
            engine.score([(1, 2)], [(10,)])
    with planned(scores(short=2)) as server:
        engine = ServerEngine(server.url, "m", TOKENIZER, limits=QUICK)
        with pytest.raises(ValueError, match="log-probs for 96 tokens"):
            engine.score([(1, 2)], [(10,)])


@pytest.mark.parametrize(
    "bad,named",
    [
        ({"send": "smoke"}, "send"),
        ({"url": "localhost"}, "url"),
        ({"limits": {"tries": 0}}, "tries"),
        ({"limits": {"timeout": -1.0}}, "timeout"),
    ],
)
def test_bad_arguments(bad, named):
    with pytest.raises(ValueError, match=named):
        limits = Limits(**bad.pop("limits", {}))
        ServerEngine(bad.pop("url", "http://x"), "m", TOKENIZER, limits=limits, **bad)


@pytest.mark.slow
def test_a_real_server(tmp_path):
    """`transformers serve` in a process of its own, with the toy model: the text that the local
    engine gives, greedy."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason="transformers serve needs it")
    model = peaked_model(TOKENIZER)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host",
               "127.0.0.1", "--port", str(port), "--device", "cpu"]  # fmt: skip
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        wait_for(port, process, tmp_path / "log")
        prompts = [encode_record(TOKENIZER, r)[0] for r in World(0, limit=3).records("facts")]
        requests = [Request(tuple(p), Sampling(max_new_tokens=6)) for p in prompts]
        engine = ServerEngine(
            f"http://127.0.0.1:{port}", str(tmp_path), TOKENIZER, send="text",
            limits=Limits(concurrency=1, tries=2, timeout=60.0),
        )  # fmt: skip
        got = engine.generate(requests)
        assert [r.error for r in got] == [None] * 3
        wanted = LocalEngine(model, TOKENIZER).generate(requests)
        assert [r.text for r in got] == [r.text for r in wanted] and all(r.text for r in got)
        chat = ServerEngine(engine.url, str(tmp_path), TOKENIZER, send="chat", limits=engine.limits)
        assert chat.continues() is False  # it closes the last turn, and says nothing
    finally:
        process.terminate()
        process.wait(20)
        log.close()


def wait_for(port, process, log):
    limit = time.monotonic() + 90
    while True:
        assert process.poll() is None and time.monotonic() < limit, log.read_text()[-2000:]
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
