"""Which tokens are trained and where each stands: every stock template against its hand-written
spelling, every template that TRL carries against its own marked twin."""

import re
import warnings
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import pytest
import stock_templates
import tiny_chat
from stock_templates import CONTENT, CONTEXT, END, STOCK, Spelling, Stock, spell

from deepalign_kernels.data.template import PROBE, ChatTemplate
from deepalign_kernels.train import tokenize_chat

CONTENTS = [
    "Rain.",
    "Rain.\n",  # white space at the end: the end mark is trained all the same
    "Rain. \n\n ",
    "  Rain",  # white space in front merges with the template's own
    "\n\nRain falls",
    "\t Rain\n",
    # Substrings of what the templates put before the content.
    *("hi", "in", "k", "a", "n", "i", ".", ">", "|>", "think", "final", "assistant", "model"),
    *("A", "S", "ASSISTANT", "USER:", "[INST]", "[/INST]", "### User:", "Reply", "\n#", "user"),
    *("<", "<b>hi</b>", "<t", "<|", "4", "assistant\n", "<|im_end|>", "x</s>y", "</s>", "<s>"),
    *("<|end|>", " [/INST] x"),
    *("é€", "🙂 ok", "日本", "e\u0301\u200d", "\u00a0x\u00a0", PROBE, PROBE + "q", "%}{{ x }}"),
    "Rain is water.\n\nIt falls <|im_start|>assistant\nRain is water.",
]  # fmt: skip
KINDS = {"bytes": stock_templates.byte_level, "pieces": stock_templates.sentencepiece}


@lru_cache
def tokenizer_of(name, kind):
    return KINDS[kind](STOCK[name])


def conversations(name, content):
    """Alone, as the first and as the last of two answers, in front of a user, below a system."""
    user, other = ("user", "what is it"), ("assistant", "A robin")
    said = ("assistant", content)
    out = [
        [user, said],
        [user, said, ("user", "and then"), other],
        [user, other, ("user", "and then"), said],
        [user, said, ("user", content.strip() or "?")],
        [("user", content.strip()), said, ("user", "Rain."), said, ("user", "a"), said],
    ]
    if STOCK[name].spelling.system:
        out.append([("system", "be brief"), user, said, ("user", "x"), other])
    return [[{"role": r, "content": c} for r, c in turns] for turns in out]


def expected(stock, messages, ids, spans):
    """(trained, positions) of each token, from the spelling and the characters it covers."""
    kinds = [kind for text, kind in spell(stock, messages) for _ in text]
    pieces, at, first = spell(stock, messages), 0, {}
    turn_of, turn = [], 0
    for text, kind in pieces:
        if kind == CONTENT:
            turn += 1
            first[turn] = at
        turn_of += [turn] * len(text)
        at += len(text)
    trained, positions, count = [], [], {}
    for begin, end in spans:
        covered = [i for i in range(begin, end) if kinds[i] != CONTEXT]
        trained.append(bool(covered))
        mine = max((turn_of[i] for i in covered if kinds[i] in (CONTENT, END)), default=0)
        counts = mine and end > first[mine]
        count[mine] = count.get(mine, 0) + 1 if counts else 0
        positions.append(count[mine] if counts else 0)
    return trained, positions


def spans_by_bytes(tokenizer, ids):
    """Characters that each token covers, from its own bytes; not the tokenizer's offsets."""
    alphabet = {c: b for b, c in bytes_to_characters().items()}
    special = set(tokenizer.get_added_vocab())
    words = tokenizer.convert_ids_to_tokens(ids)
    raw = [w.encode() if w in special else bytes(alphabet[c] for c in w) for w in words]
    text = b"".join(raw).decode()
    char_at = [i for i, c in enumerate(text) for _ in c.encode()] + [len(text)]
    ends = list(accumulate(map(len, raw)))
    return text, [(char_at[e - len(r)], char_at[e - 1] + 1) for r, e in zip(raw, ends, strict=True)]


def bytes_to_characters():
    """The alphabet of byte-level BPE: printable bytes stand for themselves, others from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(rest)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STOCK)
def test_labels_of_stock_templates(name, kind):
    tokenizer, stock = tokenizer_of(name, kind), STOCK[name]
    cases = [c for content in CONTENTS for c in conversations(name, content)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of templates without an end mark
        examples = tokenize_chat(tokenizer, [{"messages": messages} for messages in cases])
    for messages, example in zip(cases, examples, strict=True):
        text = "".join(t for t, _ in spell(stock, messages))
        assert tokenizer.apply_chat_template(messages, tokenize=False) == text, "the spelling"
        ids = list(example.input_ids)
        if kind == "bytes":
            again, spans = spans_by_bytes(tokenizer, ids)
            assert again == text
        else:
            coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            spans = coded["offset_mapping"]
        trained, positions = expected(stock, messages, ids, spans)
        assert [x != -100 for x in example.labels] == trained, (messages, text)
        assert list(example.positions) == positions, (messages, text)


def shown(name, *turns, kind="bytes"):
    """(trained text, text of position 1) of every turn of a chat whose users say "q"."""
    tokenizer = tokenizer_of(name, kind)
    (example,) = tokenize_chat(
        tokenizer, [tiny_chat.chat(*(t for turn in turns for t in ("q", turn)))]
    )
    runs, firsts, last = [], [], False
    for label, position in zip(example.labels, example.positions, strict=True):
        if label != -100:
            if not last:
                runs.append([])
                firsts.append("")
            runs[-1].append(label)
            if position == 1:
                firsts[-1] = tokenizer.decode([label])
        last = label != -100
    return list(zip(map(tokenizer.decode, runs), firsts, strict=True))


FAULTS = {  # what went wrong once: (template, answers) -> trained text of each
    "refused: llama2": ("llama2", ["Rain"], ["Rain </s>"]),
    "refused: mistral": ("mistral_0.1", ["Rain"], ["Rain</s>"]),
    "refused: vicuna": ("vicuna", ["Rain"], ["Rain</s>"]),
    "no end mark behind white space": ("chatml", ["Rain.\n"], ["Rain.\n<|im_end|>"]),
    "a substring of the header": ("qwen3", ["hi"], ["<think>\n\n</think>\n\nhi<|im_end|>"]),
    "a substring of the channel": (
        "gpt_oss",
        ["final"],
        ["<|channel|>final<|message|>final<|return|>"],
    ),
    "phi3: earlier end marks": (
        "phi3",
        ["One", "Two"],
        ["One<|end|>", "Two<|end|>\n<|endoftext|>"],
    ),
    "gpt_oss: earlier end marks": (
        "gpt_oss",
        ["One", "Two"],
        [f"<|channel|>final<|message|>{x}" for x in ("One<|end|>", "Two<|return|>")],
    ),
    "refused: thoughts in an earlier turn": (
        "qwen3",
        ["<think>\nhm\n</think>\n\nOne", "Two"],
        ["One<|im_end|>", "<think>\n\n</think>\n\nTwo<|im_end|>"],
    ),
    "begins like the prompt's block": ("open_think", ["<b>hi"], ["<b>hi<|im_end|>"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_once_went_wrong(fault):
    name, turns, texts = FAULTS[fault]
    assert [text for text, _ in shown(name, *turns)] == texts


def test_positions_of_content_with_leading_spaces():
    """The token that takes in the end of the think block and the content's spaces is the first."""
    ((_, first),) = shown("qwen3", "  Rain")
    assert first == "\n\n "
    # Thoughts in the content are the response and count; an empty block of the template is not.
    ((text, first),) = shown("qwen3", "<think>\nhm\n</think>\n\nRain")
    assert text == "<think>\nhm\n</think>\n\nRain<|im_end|>" and first == "<think>"


def test_a_template_without_an_end_mark_is_said():
    marks = {"plain_text": "assistant turns"}
    for name, stock in STOCK.items():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ChatTemplate(stock_templates.byte_level(stock))
        assert len(said) == (name in marks), name
        if name in marks:
            assert f"nothing trained behind {marks[name]};" in str(said[0].message)
    # As GLM 4 has it: an answer ends where the next user's header begins, and the last one never.
    only_between = STOCK["plain_text"].template.replace("{{ '### Reply:\n' + m.content + '\n\n' }}",
        "{{ '### Reply:\n' + m.content }}{% if not loop.last %}<|end|>{% endif %}")  # fmt: skip
    with pytest.warns(UserWarning, match="nothing trained behind assistant turns"):
        ChatTemplate(
            stock_templates.byte_level(Stock(only_between, Spelling(("", ""), "", ""), ()))
        )
    # Marks of one's own that leave the end mark out.
    begin, message, end = "<|im_start|>{{ m.role }}\n", "{{ m.content }}", "<|im_end|>\n"
    marked = f"{begin}{{% generation %}}{message}{{% endgeneration %}}{end}"
    both = f"{{% if m.role == 'assistant' %}}{marked}{{% else %}}{begin}{message}{end}{{% endif %}}"
    chatml = STOCK["chatml"]
    template = f"{{% for m in messages %}}{both}{{% endfor %}}"
    with pytest.warns(UserWarning, match="nothing trained behind assistant turns"):
        ChatTemplate(stock_templates.byte_level(replace(chatml, template=template)))


# Every template that TRL carries.

try:
    import trl

    SHIPPED = {f.stem: f for f in Path(trl.__file__).parent.glob("chat_templates/*.jinja")}
except ImportError:  # a Python or transformers that it does not take
    SHIPPED = {}
NAME_OF_SPECIAL = re.compile(
    r"<[|｜][^|｜<>\n']{1,40}[|｜]?>|<[a-z_]{1,20}[|]?>|</think>|\[/?INST\]"
)
SHORT = ("Rain.", "Rain.\n", "  Rain", "\n\nRain", "hi", "a", "n", "think", "final", "assistant")
UNENDED = ("glm4moe",)  # what ends a turn is the next user's header; said, see above


def shipped_tokenizer(name):
    text = SHIPPED[name].read_text()
    special = tuple(sorted({*NAME_OF_SPECIAL.findall(text), "</s>"}))
    return stock_templates.byte_level(Stock(text, STOCK["chatml"].spelling, special))


def in_disguise(messages, but=None):
    """The conversation with every letter of message i exchanged for one that is in no other text;
    white space stays. Of message `but` white space at the ends goes."""
    out = []
    for index, m in enumerate(messages):
        content = m["content"].strip() if index == but else m["content"]
        hidden = "".join(c if c.isspace() else chr(0xE000 + 256 * index + ord(c)) for c in content)
        out.append({**m, "content": hidden})
    return out


def core(text, index):
    """Where the disguised letters of message `index` stand."""
    at = [i for i, c in enumerate(text) if 0 <= ord(c) - 0xE000 - 256 * index < 256]
    return at[0], at[-1] + 1


@pytest.mark.skipif(not SHIPPED, reason="TRL is not installed")
@pytest.mark.parametrize(
    "name",
    [  # every third when there is little time
        pytest.param(name, marks=[pytest.mark.slow] * bool(i % 3))
        for i, name in enumerate(sorted(SHIPPED) or ["none"])
    ],
)
def test_labels_of_all_templates_that_trl_carries(name):
    """Where a content stands is seen on a rendering in disguise; what follows it, on TRL's own
    marked version of the template."""
    tokenizer = shipped_tokenizer(name)
    chats = [[("q", c), ("x", "One")] for c in SHORT] + [[("q", "One"), ("x", c)] for c in SHORT]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        template = ChatTemplate(tokenizer)
        twin = f"{name}_training" if f"{name}_training" in SHIPPED else name
        marked = ChatTemplate(shipped_tokenizer(twin))
    for chat in chats:
        messages = tiny_chat.chat(*(t for pair in chat for t in pair))["messages"]
        text, turns = template.render(messages)
        hidden = template._jinja(in_disguise(messages))[0]
        assert len(hidden) == len(text)
        ((ids, rows),) = template.tokenize([text], [turns])
        _, spans = spans_by_bytes(tokenizer, ids)
        again, endings = marked.render(messages)
        for index, turn, row, ending in zip((1, 3), turns, rows, endings, strict=True):
            begin, end = core(hidden, index)
            assert turn.begin <= begin and end <= turn.end
            first = core(template._jinja(in_disguise(messages, index))[0], index)[0]
            assert spans[row.content][0] <= first < spans[row.content][1], (chat, text)
            users = [core(hidden, i) for i in (0, 2)]
            assert not any(turn.begin < b and a < turn.end for a, b in users)
            if name not in UNENDED and twin != name:
                hidden_twin = marked._jinja(in_disguise(messages))[0]
                tail = again[core(hidden_twin, index)[1] : ending.end].strip()
                assert tail and text[end : turn.end].strip() == tail, (chat, text)
            else:
                assert text[end : turn.end].strip() or name in UNENDED


@pytest.mark.skipif(not SHIPPED, reason="TRL is not installed")
@pytest.mark.parametrize(
    "name", sorted(n for n in SHIPPED if "think" in SHIPPED[n].read_text()) or ["none"]
)
def test_thoughts_are_trained_as_the_template_shows_them(name):
    tokenizer = shipped_tokenizer(name)
    thought = "<think>\nhm\n</think>\n\nYes"
    messages = tiny_chat.chat("q", thought, "x", thought)["messages"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        text, turns = ChatTemplate(tokenizer).render(messages)
    for turn in turns:
        assert text[turn.begin : turn.stop].rstrip().endswith("Yes")
        assert "hm" not in text[: turn.begin].rsplit("x", 1)[-1], "a thought shown is trained"
