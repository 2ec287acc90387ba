"""What a chat template makes of a conversation: text, and where in it the assistant speaks."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from os.path import commonprefix
from typing import Any

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBES = ("Aa", "Zz")  # two contents that share no first and no last token
Span = tuple[int, int]
Message = dict[str, str]


class ChatTemplate:
    """The chat template of one fast tokenizer.

    Raises:
        ValueError: a slow tokenizer, no template, one that fails on a plain conversation or ignores
            the user.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"tokenizer: {name} is no fast tokenizer; it cannot say which text a token covers"
            )
        try:
            self.template: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise ValueError(
                f"tokenizer: {name} has no chat template; set tokenizer.chat_template"
            ) from error
        self.marked = MARK.search(self.template) is not None
        try:
            self.render(self._probe(PROBES[0]))
        except ValueError as error:
            raise ValueError(
                f"tokenizer: {name}: a user turn and an assistant turn: {error}"
            ) from error

    def render(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text, and the characters that each assistant turn is trained on, in order.

        Raises:
            ValueError: the template fails, leaves out a user turn, or does not show where the
                assistant speaks.
        """
        messages = [dict(m) for m in messages]
        text, marks = self._jinja(messages, marks=self.marked)
        for message in messages:
            if message["role"] == "user" and message["content"].strip() not in text:
                raise ValueError("the chat template does not render the user turn")
        turns = sum(m["role"] == "assistant" for m in messages)
        spans = _join(marks, text, turns) if self.marked else self._search(messages, text)
        if len(spans) != turns:
            raise ValueError(
                f"the chat template marks {len(spans)} assistant turns in place of {turns}"
            )
        return text, spans

    def tokenize(
        self, texts: list[str], spans: list[list[Span]]
    ) -> list[tuple[list[int], list[Span]]]:
        """Token ids of each text, and its spans as [begin, end) token indices."""
        if not texts:
            return []
        coded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        out = []
        for ids, offsets, marks in zip(
            coded["input_ids"], coded["offset_mapping"], spans, strict=True
        ):
            starts, ends = [o[0] for o in offsets], [o[1] for o in offsets]
            # Tokens that cover at least one character of the span.
            rows = [(bisect_right(ends, begin), bisect_left(starts, end)) for begin, end in marks]
            out.append((ids, rows))
        return out

    @cached_property
    def fixed_prefix(self) -> tuple[int, ...]:
        """Tokens that the template puts at the start of an assistant turn whatever its content."""
        return self._common(1)

    @cached_property
    def fixed_suffix(self) -> tuple[int, ...]:
        """Tokens that the template puts at the end of an assistant turn whatever its content."""
        return self._common(-1)[::-1]

    def _common(self, direction: int) -> tuple[int, ...]:
        texts, spans = zip(*(self.render(self._probe(content)) for content in PROBES), strict=True)
        rows = self.tokenize(list(texts), list(spans))
        first, second = (ids[begin:end][::direction] for ids, [(begin, end)] in rows)
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
        return tuple(a for a, _ in pairs)

    def _probe(self, content: str) -> list[Message]:
        return [{"role": "user", "content": "uU"}, {"role": "assistant", "content": content}]

    def _jinja(
        self, messages: list[Message], *, marks: bool = False, ask: bool = False
    ) -> tuple[str, list[Span]]:
        """Text and `{% generation %}` spans; `ask` adds the header of an assistant turn to come."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self.template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=ask,
                **self.tokenizer.special_tokens_map,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template fails: {error}") from error
        return texts[0], [(int(begin), int(end)) for begin, end in spans[0]] if marks else []

    @cached_property
    def _ending(self) -> str:
        """What follows the content of the last assistant turn, up to white space."""
        text = self._jinja(self._probe(PROBES[0]))[0]
        return text[text.rindex(PROBES[0]) + len(PROBES[0]) :].rstrip()

    def _search(self, messages: list[Message], text: str) -> list[Span]:
        """Assistant turns in `text` for a template without marks.

        A turn begins where `text` parts from what the template offers as a prompt for generation
        and ends behind its content and the end mark. That all before it is how the conversation so
        far is rendered is checked, not assumed.
        """
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._jinja(messages[:index], ask=True)[0]
            history = len(commonprefix([prompt, self._jinja(messages[:index])[0]]))
            begin = len(commonprefix([prompt, text]))
            at = _find(message["content"].strip(), text, history, begin)
            if begin <= history or at < 0:
                raise ValueError(
                    f"cannot find assistant turn {len(spans) + 1} in what the chat template"
                    " renders; put {% generation %} marks into the template"
                )
            end = at + len(message["content"].strip())
            end += len(self._ending) * text.startswith(self._ending, end)
            spans.append((begin, end))
        return spans


def _find(content: str, text: str, low: int, begin: int) -> int:
    """Where `content` stands in text[low:], if it reaches beyond `begin`; -1 if nowhere."""
    for at in range(low, begin):  # content that repeats the end of the prompt, "<think>" as a rule
        if at + len(content) > begin and text.startswith(content, at):
            return at
    return text.find(content, begin)


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
