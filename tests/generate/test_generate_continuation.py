"""Chat servers that go on behind a given beginning of a reply, and those that only seem to."""

import pytest

pytest.importorskip("httpx", reason='needs the extra "eval"')
pytest.importorskip("transformers", reason="the tokenizer is of transformers")

import tiny_chat
from bad_server import planned

from deepalign_kernels.generate.engine import Request, Sampling
from deepalign_kernels.generate.server import Failed, Limits, ServerEngine

USER, BEGUN = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "Sure"}
GIVEN = Request((1,), Sampling(0.7, 5, max_new_tokens=8), messages=(USER, BEGUN))
PLAIN = Request((1,), Sampling(max_new_tokens=8), messages=(USER,))


def chatml(turns, *, closed):
    """The prompt as text, written down once more; of a closed last turn a new one begins."""
    said = [f"<|im_start|>{t['role']}\n{t['content']}" for t in turns]
    text = "<|im_end|>\n".join(said)
    if turns[-1]["role"] == "assistant" and not closed:
        return text
    return text + "<|im_end|>\n<|im_start|>assistant\n"


def server(*, closed=True, counts=True, system=0, says="ok"):
    tokenizer = tiny_chat.build_tokenizer()

    def plan(n, path, body):
        data = {"choices": [{"message": {"content": says}, "finish_reason": "length"}]}
        if counts:
            text = chatml(body["messages"], closed=closed)
            data["usage"] = {"prompt_tokens": system + len(tokenizer(text)["input_ids"])}
        return 200, data

    return tokenizer, plan


def asked(tokenizer, plan, requests=(), **limits):
    with planned(plan) as running:
        engine = ServerEngine(
            running.url, "m", tokenizer, send="chat",
            limits=Limits(**{"concurrency": 1, "tries": 1, **limits}),
        )  # fmt: skip
        try:
            return engine.continues(), engine.generate(requests), running.seen
        finally:
            engine.close()


@pytest.mark.parametrize(
    "kind,wanted",
    [
        ({"closed": False}, True),
        ({"closed": True}, False),
        ({"closed": False, "system": 31}, True),  # a system prompt of its own
        ({"closed": True, "system": 31, "says": "ve, six"}, False),  # it only reads as if
        ({"counts": False, "says": "ve, six, seven"}, True),
        ({"counts": False, "says": "Five, six"}, False),
        ({"counts": False, "says": "five, six"}, False),
        ({"counts": False, "says": "**One**, two"}, False),
        ({"counts": False, "says": "1 2 3"}, None),
        ({"counts": False, "says": None}, None),
    ],
)
def test_what_the_check_says(kind, wanted):
    found, _, seen = asked(*server(**kind))
    assert found is wanted and len(seen) == 2
    first, second = (body for _, body, _ in seen)
    assert [t["role"] for t in first["messages"]] == ["user"]
    assert second["messages"][-1]["role"] == "assistant" and second["continue_final_message"]
    assert second["temperature"] == 0


def test_what_goes_out():
    """The check once, then the assistant's turn to be continued."""
    _, replies, seen = asked(*server(closed=False), [GIVEN, PLAIN, Request((1,))])
    assert [r.text for r in replies[:2]] == ["ok"] * 2 and "without messages" in replies[2].error
    assert len(seen) == 4
    bodies = [body for _, body, _ in seen[2:]]
    assert bodies[0]["continue_final_message"] is True
    assert bodies[0]["add_generation_prompt"] is False
    assert bodies[0]["messages"][-1] == BEGUN
    assert "continue_final_message" not in bodies[1] and "top_k" in bodies[0]


def test_a_beginning_is_never_lost_in_silence():
    """A caller who did not ask: refused before anything is sent, and without one all goes on."""
    tokenizer, plan = server(closed=True)
    with planned(plan) as running:
        engine = ServerEngine(running.url, "m", tokenizer, send="chat")
        assert engine.generate([PLAIN])[0].text == "ok" and len(running.seen) == 1
        with pytest.raises(ValueError, match="begins a reply of its own behind a given beginning"):
            engine.generate([PLAIN, GIVEN])
        assert len(running.seen) == 3  # the check alone
        for send in ("ids", "text"):
            assert ServerEngine(running.url, "m", tokenizer, send=send).continues() is True
        assert len(running.seen) == 3


def test_a_server_that_refuses_to_go_on():
    tokenizer, good = server()

    def plan(n, path, body):
        return (400, {}) if "continue_final_message" in body else good(n, path, body)

    assert asked(tokenizer, plan)[0] is False
    with pytest.raises(Failed, match="status 503"):  # busy: it may go on another time
        asked(tokenizer, lambda *_: (503, {}), give_up=9)
