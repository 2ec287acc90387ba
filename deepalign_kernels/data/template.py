"""What a chat template makes of a conversation: text, and where in it the assistant speaks.

Where a turn stands is not searched for: its content is exchanged for a word that occurs nowhere
else, and what the two renderings have in common is what the template puts around the content.
"""

from __future__ import annotations

import re
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = "Qz7Xw"  # no template treats it specially, and a change of case would show
HINT = "put {% generation %} marks into the template"
Span = tuple[int, int]
Message = dict[str, Any]


class Turn(NamedTuple):
    """Where an assistant turn stands, in characters or in tokens: begin <= content <= stop <= end.

    [begin, end) is what the assistant says: what the template makes it say first (a think block, a
    channel header), [content, stop) what the message holds, and what ends the turn.
    """

    begin: int
    content: int
    stop: int
    end: int


class _Talk(list[Message]):
    """Messages, and the tools that the template is told of with them; slices keep the tools."""

    tools: list[Any] | None = None

    def but(self, index: int, message: Message) -> _Talk:
        out = _Talk([*self[:index], message, *self[index + 1 :]])
        out.tools = self.tools
        return out

    def until(self, index: int) -> _Talk:
        out = _Talk(self[:index])
        out.tools = self.tools
        return out


def tokenizer_of(model: str | Path, chat_template: str | Path | None = None) -> Any:
    """The tokenizer of a folder or name; with the text of the file `chat_template` as its template.

    Raises:
        ValueError: there is no such tokenizer, or no such file.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model))
    except (OSError, ValueError) as error:
        raise ValueError(f"model: no tokenizer in {model}: {error}") from error
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"chat_template: {chat_template}: {error}") from error
    return tokenizer


class ChatTemplate:
    """The chat template of one fast tokenizer.

    Raises:
        ValueError: a slow tokenizer, no template, one that fails on a plain conversation or ignores
            the user.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"tokenizer: {self.name} is no fast tokenizer; it cannot say which text a token"
                " covers"
            )
        try:
            self.template: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise ValueError(
                f"tokenizer: {self.name} has no chat template; set --chat-template, or"
                " tokenizer.chat_template"
            ) from error
        self.marked = MARK.search(self.template) is not None
        self._in_parts = False  # whether contents are lists of parts, as for models that see images
        try:
            self.render(_plain("uU", "Aa"))
        except ValueError as error:
            self._in_parts = True
            try:
                self.render(_plain("uU", "Aa"))
            except ValueError:
                raise ValueError(
                    f"tokenizer: {self.name}: a user turn and an assistant turn: {error}"
                ) from error
        if endless := self._without_end():
            warnings.warn(
                f"tokenizer: {self.name}: the chat template has nothing trained behind {endless};"
                " a model does not learn there to end its turn",
                stacklevel=2,
            )

    def _without_end(self) -> str:
        """Which assistant turns have no trained end mark; "" if all have one."""
        turns = _plain("uU", "Aa")
        try:
            text, found = self.render(turns * 2)
        except ValueError:  # a template for one question and one answer
            text, found = self.render(turns)
        marks = [text[turn.stop : turn.end].strip() for turn in found]
        if all(marks):
            return ""
        return "the last assistant turn" if all(marks[:-1]) and marks[:-1] else "assistant turns"

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[str, list[Turn]]:
        """The text, and the characters of each assistant turn, in order. `tools`: JSON schemas.

        Raises:
            ValueError: the template fails, leaves out a user turn, or does not show where the
                assistant speaks.
        """
        messages = _Talk(map(dict, messages))
        messages.tools = None if tools is None else list(tools)
        text, marks = self._jinja(messages, marks=self.marked)
        for message in messages:
            if message["role"] == "user" and message["content"].strip() not in text:
                raise ValueError("the chat template does not render the user turn")
        at = [index for index, m in enumerate(messages) if m["role"] == "assistant"]
        if not self.marked:
            return text, [self._unmarked(messages, index, n, text) for n, index in enumerate(at, 1)]
        marks = _join(marks, text, len(at))
        if len(marks) != len(at):
            raise ValueError(
                f"the chat template marks {len(marks)} assistant turns in place of {len(at)}"
            )
        pairs = zip(at, marks, strict=True)
        return text, [self._marked(messages, index, mark, text) for index, mark in pairs]

    def tokenize(
        self, texts: list[str], turns: list[list[Turn]]
    ) -> list[tuple[list[int], list[Turn]]]:
        """Token ids of each text, and its turns in tokens. A token belongs to a part of the turn if
        it covers at least one of its characters; one that covers the end of what the template puts
        first and the beginning of the content belongs to the content."""
        if not texts:
            return []
        coded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        out = []
        for ids, offsets, row in zip(
            coded["input_ids"], coded["offset_mapping"], turns, strict=True
        ):
            starts, ends = [o[0] for o in offsets], [o[1] for o in offsets]
            first = [[bisect_right(ends, at) for at in (t.begin, t.content)] for t in row]
            past = [[bisect_left(starts, at) for at in (t.stop, t.end)] for t in row]
            both = zip(first, past, strict=True)
            out.append((ids, [Turn(a, b, max(b, c), max(b, d)) for (a, b), (c, d) in both]))
        return out

    def _jinja(
        self, messages: list[Message], *, marks: bool = False, ask: bool = False
    ) -> tuple[str, list[Span]]:
        """Text and `{% generation %}` spans; `ask` adds the header of an assistant turn to come."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        tools = getattr(messages, "tools", None)
        if self._in_parts:
            messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages
            ]
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=ask,
                **self.tokenizer.special_tokens_map,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template fails: {error}") from error
        return texts[0], [(int(begin), int(end)) for begin, end in spans[0]] if marks else []

    # One turn.

    def _around(self, messages: _Talk, index: int, text: str) -> tuple[str, str] | None:
        """What the template puts before and behind the content of message `index`, whatever that
        is; None if it does not show the content once and as it is."""
        probe = PROBE
        while probe in text:
            probe += "q"
        bare = {"role": "assistant", "content": probe}
        try:
            rendered = self._jinja(messages.but(index, bare))[0]
        except ValueError:  # such as a tool's answer that nobody has called for any more
            return None
        before, *after = rendered.split(probe)
        return (before, after[0]) if len(after) == 1 else None

    def _marked(self, messages: _Talk, index: int, mark: Span, text: str) -> Turn:
        """The mark says what is trained, and the template's surroundings where the content is."""
        begin, end = mark
        around = self._around(messages, index, text)
        if around is None:
            return Turn(begin, begin, end, end)
        before, after = around
        shared = len(commonprefix([text, before]))
        content = shared if shared == len(before) and begin <= shared <= end else begin
        stop = len(text) - _common_suffix(text[shared:], after)
        return Turn(begin, content, min(max(stop, content), end), end)

    def _unmarked(self, messages: _Talk, index: int, number: int, text: str) -> Turn:
        """Trained is what follows the prompt for generation, up to what ends the turn. Of a
        template that has no such prompt, it is the content and what ends the turn."""
        lost = ValueError(f"cannot find assistant turn {number} in what the chat template renders")
        around = self._around(messages, index, text)
        if around is None:
            raise ValueError(f"{lost}; {HINT}")
        before, after = around
        shared = len(commonprefix([text, before]))
        # Not so of reasoning and calls of tools, for which templates change what they put first.
        plain = shared == len(before)
        behind = _common_suffix(text[shared:], after)
        stop = len(text) - behind
        prompt, past = self._prompt(messages.until(index))
        begin = len(commonprefix([prompt, before if plain else text]))
        found = past < begin and (begin if plain else past + 1) <= shared
        if plain and text.startswith(prompt) and len(before) < len(prompt) < stop:
            begin = content = len(prompt)  # the content repeats the end of the prompt: "<think>"
        elif plain:
            begin, content = (begin if found else shared), shared
        elif found:
            content = begin
        else:
            raise ValueError(f"{lost}; {HINT}")
        said, simple = messages[index]["content"], set(messages[index]) <= {"role", "content"}
        shown = text[content:stop].strip()
        if plain and simple and behind == len(after) and shown not in said:
            raise ValueError(f"{lost}: it changes the content; {HINT}")
        closed = behind == len(after)
        end = stop + (self._ending(text[stop:], index == len(messages) - 1) if closed else 0)
        return Turn(begin, content, stop, end)

    def _prompt(self, messages: _Talk) -> tuple[str, int]:
        """(the prompt for an answer to `messages`, how much of it is there without asking)."""
        try:
            prompt = self._jinja(messages, ask=True)[0]
            return prompt, len(commonprefix([prompt, self._jinja(messages)[0]]))
        except ValueError:  # nothing said yet, or no user before the assistant
            return "", 0

    def _ending(self, rest: str, last: bool) -> int:
        """How much of `rest`, all that stands behind a content, ends its turn; no white space
        behind the mark."""
        if last:
            return len(rest.rstrip())
        return max(
            len(rest[: self._common_tokens(rest, ending)].rstrip()) for ending in self._endings
        )

    @cached_property
    def _endings(self) -> list[str]:
        """What the template puts behind the last assistant turn, and behind one that is followed by
        another prompt for generation, without that prompt: it may be another mark."""
        turns = _plain("uU", PROBE)
        out = [self._jinja(turns)[0].split(PROBE)[-1]]
        try:
            asked, silent = (self._jinja(turns[:1], ask=ask)[0] for ask in (True, False))
            behind = self._jinja(turns, ask=True)[0].split(PROBE)[-1]
        except ValueError:
            return out
        prompt = asked[self._common_tokens(asked, silent) :]
        return [*out, behind.removesuffix(prompt)] if behind.endswith(prompt) and prompt else out

    def _common_tokens(self, a: str, b: str) -> int:
        """How many characters of `a` are in the tokens with which both begin. Characters alone
        would not do: two marks may both begin with "<|"."""
        reach = len(commonprefix([a, b])) + 32
        coded = self.tokenizer(
            [a[:reach], b[:reach]], add_special_tokens=False, return_offsets_mapping=True
        )
        shared = len(commonprefix(coded["input_ids"]))
        return coded["offset_mapping"][0][shared - 1][1] if shared else 0


def _plain(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _common_suffix(a: str, b: str) -> int:
    return len(commonprefix([a[::-1], b[::-1]]))


def _join(marks: list[Span], text: str, turns: int) -> list[Span]:
    """`marks`; if there are more than turns, those with only white space between them made one."""
    if len(marks) <= turns:
        return marks
    out = marks[:1]
    for begin, end in marks[1:]:
        if text[out[-1][1] : begin].strip():
            out.append((begin, end))
        else:
            out[-1] = (out[-1][0], end)
    return out
