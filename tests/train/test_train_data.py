"""Training data: what is refused and where, what is trained, where a response begins to count."""

import json

import pytest
import tiny_chat
import torch
from tiny_chat import RECORDS, TEMPLATES, build_model, build_tokenizer, chat

import deepalign_kernels as dak
from deepalign_kernels.data.examples import LengthLimit
from deepalign_kernels.train import (
    Example,
    TrainConfig,
    TrainingRun,
    load_chat_data,
    tokenize_chat,
)

GOOD = json.dumps(chat("hi", "hello"))


def line(**record):
    return json.dumps(record)


def messages(*pairs):
    return line(messages=[{"role": r, "content": c} for r, c in pairs])


WRONG = {  # what is in line 3 -> what the message must say
    '{"messages": [': "broken JSON, column",
    '{"messages": ' + "[" * 100_000: "broken JSON: ",
    '{"messages": ' + "1" * 5000 + "}": "broken JSON: ",
    r'{"prompt": "hi", "completion": "\ud800"}': "message 1: half of a surrogate pair",
    "[1, 2]": "one JSON object per line, got a list",
    '"text"': "one JSON object per line, got a str",
    "{}": "got none",
    line(text="a"): "got 'text'",
    line(messages=[], mesages=1): "unknown key 'mesages'; is it meant to be 'messages'",
    line(text="a", id=1): "got 'id', 'text'; plain text has no turns",
    line(conversations=[]): "of ShareGPT make 'messages'",
    line(prompt="a", completion="b", tools={}): "expected a list of JSON schemas under 'tools'",
    line(messages="hi"): "expected a list of messages, got str",
    line(messages=[]): "no assistant turn",
    line(messages=["hi"]): "message 0: expected an object",
    messages(("user", "hi")): "no assistant turn",
    messages(("assistant", "hi")): "no user turn",
    messages(("user", "hi"), ("assistant", " \n")): "message 1: empty assistant turn",
    messages(("user", "hi"), ("assistant", None)): "message 1: expected text under 'content'",
    messages(("user", "hi"), ("bot", "hi")): "message 1: unknown role 'bot'",
    line(messages=[{"role": "user", "content": "a", "wieght": 1}]): "meant to be 'weight'",
    line(messages=[{"role": "user", "content": "a", "train": True}]): "for the assistant's",
    line(messages=[{"role": "assistant", "content": "a", "train": 1}]): "true or false under",
    line(messages=[{"role": "assistant", "content": "a", "weight": -1}]): "a finite number >= 0",
    line(messages=[{"role": "assistant", "content": "a", "weight": "1"}]): "expected a number",
    line(messages=[{"role": "user", "content": [{"type": "image"}]}]): "expected text under",
    line(prompt="hi", completion=""): "message 1: empty assistant turn",
    line(prompt="hi"): "got 'prompt'",
    line(prompt="hi", completion=3): "expected a list of messages, got int",
    line(prompt="hi", completion=[{"role": "user", "content": "x"}]): "no assistant turn",
}


@pytest.mark.parametrize("bad", WRONG, ids=lambda s: s[:40])
def test_a_wrong_line_is_refused_with_its_place(tmp_path, bad):
    path = tmp_path / "chat.jsonl"
    path.write_text(f"{GOOD}\n\n{bad}\n{GOOD}\n")
    with pytest.raises(ValueError) as error:
        load_chat_data(path)
    assert str(error.value).startswith(f"{path}:3: ") and WRONG[bad] in str(error.value)


def test_wrong_files_are_refused(tmp_path):
    path = tmp_path / "chat.jsonl"
    with pytest.raises(ValueError, match="path: .*no such file"):
        load_chat_data(path)
    for empty in ("", "\n \n"):
        path.write_text(empty)
        with pytest.raises(ValueError, match=r"path: .*no conversation in this file"):
            load_chat_data(path)
    path.write_bytes(GOOD.encode() + b'\n{"messages": "\xff"}\n')
    with pytest.raises(ValueError, match=r"chat.jsonl:2: not UTF-8"):
        load_chat_data(path)
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())  # what some editors put in front is no error
    assert len(load_chat_data(path)) == 1


def test_refusals_come_before_anything_is_written(tmp_path):
    path, out = tmp_path / "chat.jsonl", tmp_path / "out"
    path.write_text(GOOD + "\nnot json\n")
    config = TrainConfig(out)
    with pytest.raises(ValueError, match="chat.jsonl:2: broken JSON"):
        TrainingRun(build_model(), build_tokenizer(), config, path)
    for data, why in (
        ([], "data: no conversation"),
        ([chat("a")], r"data\[0\]: no assistant turn"),
        ({"messages": []}, "data: expected a path, a list or"),
        (7, "data: expected a path, a list or"),
        ([Example([1, 2], [1], [0, 0])], "data: example 0: .* lengths 2, 1 and 2"),
        ([Example([1, 2], [1, -100], [1, 0])], "data: example 0: no token to train"),
        ([Example([1, 999], [-100, 999], [0, 1])], "tokenizer: token id 999 is outside"),
    ):
        with pytest.raises(ValueError, match=why):
            TrainingRun(build_model(), build_tokenizer(), config, data)
    assert not out.exists()


def test_templates_that_cannot_be_trained_with_are_refused(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\n")
    silent = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    silent += "{% endgeneration %}{% endif %}{% endfor %}"
    for template, why in (
        (None, "no chat template"),
        (silent, "does not render the user turn"),
        ("{{ raise_exception('only in pairs') }}", "the chat template fails: only in pairs"),
    ):
        with pytest.raises(ValueError, match=f"tokenizer: .*{why}"):
            tokenize_chat(build_tokenizer(template), path)
    # A template that is fine with a plain conversation but not with this one: the line is named.
    only_first = TEMPLATES["marked"].replace("for m in messages", "for m in messages[:2]")
    path.write_text(f"{GOOD}\n{json.dumps(chat('a', 'b', 'cc', 'd'))}\n")
    with pytest.raises(ValueError, match=r"chat.jsonl:2: .*does not render the user turn"):
        tokenize_chat(build_tokenizer(only_first), path)


def limit_length(examples, max_length, how):
    limit = LengthLimit(max_length, how)
    return list(limit.of(examples)), limit.too_long


def test_too_long_is_refused_dropped_or_truncated_but_never_in_silence(tmp_path):
    tokenizer = build_tokenizer()
    records = [chat("hi", "hello"), chat("hi", "a much longer answer " * 3)]
    examples = tokenize_chat(tokenizer, records)
    limit = len(examples[0].input_ids) + 4
    with pytest.raises(ValueError, match="position_origin: expected one of 'content', 'span'"):
        tokenize_chat(tokenizer, records, position_origin="start")
    with pytest.raises(ValueError, match=r"1 of 2 .* max_length=.*data\[1\] is the first"):
        limit_length(examples, limit, "error")
    assert limit_length(examples, limit, "drop") == (examples[:1], 1)
    short, count = limit_length(examples, limit, "truncate")
    assert count == 1 and [len(e.input_ids) for e in short] == [limit - 4, limit]
    assert short[1].labels == examples[1].labels[:limit] and short[1].where == "data[1]"
    with pytest.raises(ValueError, match="none is left to train on"):
        limit_length(examples, 3, "drop")
    nothing_left = examples[1].labels.index(next(x for x in examples[1].labels if x != -100))
    with pytest.raises(ValueError, match=r"data\[0\]: nothing to train within"):
        limit_length(examples, nothing_left, "truncate")
    # The model's own limit counts where the config names none.
    config = TrainConfig(tmp_path / "out")
    with pytest.raises(ValueError, match="max_length=256"):
        TrainingRun(build_model(), tokenizer, config, [chat("x" * 300, "y")])


def trained_text(tokenizer, example):
    """Text of each run of trained tokens."""
    runs, last = [], None
    for index, label in enumerate(example.labels):
        if label == -100:
            continue
        assert label == example.input_ids[index]
        if last != index - 1:
            runs.append([])
        runs[-1].append(label)
        last = index
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", ("marked", "unmarked"))
def test_only_the_assistant_is_trained(name):
    tokenizer = build_tokenizer(TEMPLATES[name])
    end = "<|im_end|>\n" if name == "marked" else "<|im_end|>"
    two, pair = tokenize_chat(tokenizer, [RECORDS[2], RECORDS[4]])
    assert trained_text(tokenizer, two) == [
        "a robin" + end,
        "an owl , which sees well at night" + end,
    ]
    assert trained_text(tokenizer, pair) == ["it is paris ." + end]
    for example, record in ((two, RECORDS[2]["messages"]), (pair, None)):
        if record:
            ids = tokenizer.apply_chat_template(record, return_dict=True)["input_ids"]
            assert list(example.input_ids) == ids


def test_prompt_and_completion_may_be_messages_and_only_the_completion_is_trained():
    tokenizer = build_tokenizer()
    all_turns = chat("hi", "hello", "bye", "see you")["messages"]
    (example,) = tokenize_chat(tokenizer, [{"prompt": all_turns[:3], "completion": all_turns[3:]}])
    assert trained_text(tokenizer, example) == ["see you<|im_end|>\n"]
    (whole,) = tokenize_chat(tokenizer, [{"messages": all_turns}])
    assert whole.input_ids == example.input_ids and len(trained_text(tokenizer, whole)) == 2


def test_marks_agree_with_transformers_mask():
    tokenizer = build_tokenizer()
    for record in (RECORDS[0], RECORDS[2], RECORDS[3]):
        (example,) = tokenize_chat(tokenizer, [record])
        coded = tokenizer.apply_chat_template(
            record["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        assert [int(x != -100) for x in example.labels] == coded["assistant_masks"]


def first_counted(tokenizer, example):
    """Text of the tokens at position 1 and the two after each."""
    starts = [i for i, p in enumerate(example.positions) if p == 1]
    return [tokenizer.decode(example.input_ids[i : i + 3]) for i in starts]


PREFIXES = {  # template -> trained tokens before the content, in the last turn and in the others
    "marked": (0, 0),
    "unmarked": (0, 0),
    "think": (6, 0),
    "think_unmarked": (6, 0),
    "open_think": (0, 0),
    "header": (11, 11),
    "two_marks": (0, 0),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_positions_start_at_the_content_of_every_turn(name):
    tokenizer = build_tokenizer(TEMPLATES[name])
    record = chat("q", "first answer", "r", "second answer")
    (content,) = tokenize_chat(tokenizer, [record])
    (span,) = tokenize_chat(tokenizer, [record], position_origin="span")
    assert first_counted(tokenizer, content) == ["fir", "sec"]
    last, others = PREFIXES[name]
    for origin, example in ((0, content), (1, span)):
        starts = [i for i, p in enumerate(example.positions) if p == 1]
        begins = [i for i in range(len(example.labels)) if _begins(example.labels, i)]
        offsets = [s - b for s, b in zip(starts, begins, strict=True)]
        assert offsets == ([others, last] if origin == 0 else [0, 0])
    # Counting goes on by one to the end of the turn, and untrained tokens have no position.
    for example in (content, span):
        for before, after in zip(example.positions, example.positions[1:], strict=False):
            assert after in (0, 1, before + 1)
        assert all(
            p == 0 for p, x in zip(example.positions, example.labels, strict=True) if x == -100
        )


def _begins(labels, i):
    return labels[i] != -100 and (i == 0 or labels[i - 1] == -100)


def test_content_that_repeats_the_templates_own_prefix_is_content():
    """Real reasoning text counts from its first token; only what the template adds is skipped."""
    tokenizer = build_tokenizer(TEMPLATES["think"])
    (example,) = tokenize_chat(tokenizer, [chat("q", "<think>hm</think>yes")])
    counted = [i for i, p in zip(example.input_ids, example.positions, strict=True) if p]
    assert tokenizer.decode(counted).startswith("<think>hm</think>yes")
    # A prompt that opens the block has said "<think>\n" already: the response begins behind it.
    opened = build_tokenizer(TEMPLATES["open_think"])
    (example,) = tokenize_chat(opened, [chat("q", "<think>\nhm</think>yes", "a", "assistant")])
    assert trained_text(opened, example) == ["hm</think>yes<|im_end|>", "assistant<|im_end|>"]


def test_positions_survive_packing():
    """Stored columns end to end are what `response_positions` finds in packed documents."""
    examples = tokenize_chat(build_tokenizer(), RECORDS, position_origin="span")
    labels, positions, ids = [], [], []
    for e in examples:
        labels += e.labels
        positions += e.positions
        ids += range(len(e.labels))
    derived = dak.response_positions(torch.tensor(labels), position_ids=torch.tensor(ids))
    assert derived.tolist() == positions
    # A document cut in two goes on counting in the column; derived afterwards it would start again.
    cut = next(i for i, p in enumerate(positions) if p == 3)
    again = dak.response_positions(torch.tensor(labels[cut:]))
    assert positions[cut] == 3 and again[0] == 1


def test_slow_tokenizers_and_missing_marks_are_refused():
    slow = build_tokenizer()
    slow.__class__ = type("Slow", (type(slow),), {"is_fast": False})
    with pytest.raises(ValueError, match="is no fast tokenizer"):
        tokenize_chat(slow, RECORDS)
    reply_twice = tiny_chat._chatml("{{ m.content | upper }}<|im_end|>", marks=False)
    with pytest.raises(ValueError, match=r"put \{% generation %\} marks into the template"):
        tokenize_chat(build_tokenizer(reply_twice), RECORDS)


def test_bytes_of_one_character_stay_together():
    """A character of several tokens: all of them are trained, none of the header's."""
    tokenizer = build_tokenizer()
    (example,) = tokenize_chat(tokenizer, [chat("é", "é€")])
    assert trained_text(tokenizer, example) == ["é€<|im_end|>\n"]
    assert max(example.positions) == 2 + 3 + 2
