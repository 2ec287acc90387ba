"""Prompts as token ids, and the requests and records that attacks make of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from deepalign_kernels.attack.attack import Asking
from deepalign_kernels.data.prompts import Prompt
from deepalign_kernels.data.template import ChatTemplate, Message
from deepalign_kernels.generate.engine import Engine, Reply, Request, Sampling
from deepalign_kernels.runs.record import Record, derived_seed

Ids = tuple[int, ...]


class Chat:
    """How one tokenizer renders prompts.

    Raises:
        ValueError: no chat template where one is asked for, or one that drops the user's turn.
    """

    def __init__(self, tokenizer: Any, asking: Asking) -> None:
        self.tokenizer, self._system, self._wrap = tokenizer, asking.system, asking.wrap
        self.templated = asking.chat == "template"
        self._template = ChatTemplate(tokenizer) if self.templated else None
        if self._template is None and asking.system is not None:
            raise ValueError("system: a plain prompt has no system turn")
        if asking.system is not None:  # a template that refuses it refuses every prompt
            try:
                self.text(Prompt("", "PROMPT"))
            except ValueError as error:
                raise ValueError(f"system: {error}") from error

    def messages(self, prompt: Prompt) -> list[Message]:
        """The turns before the reply."""
        before = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*before, {"role": "user", "content": self._asked(prompt)}]

    def _asked(self, prompt: Prompt) -> str:
        return self._wrap.replace("{prompt}", prompt.asked)

    def text(self, prompt: Prompt) -> str:
        """All that comes before the reply, as text.

        Raises:
            ValueError: the chat template fails on this prompt, or changes or drops a turn.
        """
        import jinja2

        if self._template is None:
            return self._asked(prompt) + "\n\n"
        try:
            text = self.tokenizer.apply_chat_template(
                self.messages(prompt), tokenize=False, add_generation_prompt=True
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template fails: {error}") from error
        if self._asked(prompt).strip() not in text:
            raise ValueError("the chat template does not render the user turn")
        if self._system and self._system.strip() not in text:
            raise ValueError("the chat template does not render the system turn")
        return text

    def encode(self, texts: list[str]) -> list[Ids]:
        """Ids of whole rendered prompts; a template's own marks are text already."""
        plain = self._template is None
        coded = self.tokenizer(texts, add_special_tokens=plain)["input_ids"]
        return [tuple(ids) for ids in coded]

    def ids(self, prompt: Prompt) -> Ids:
        """All that comes before the reply."""
        return self.encode([self.text(prompt)])[0]

    def answer_ids(self, prompt: Prompt, answer: str) -> Ids:
        """The ids of `answer` as the assistant's turn behind the prompt, without what the template
        puts around it."""
        if self._template is None:
            return tuple(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
        turns = [*self.messages(prompt), {"role": "assistant", "content": answer}]
        text, found = self._template.render(turns)
        ids, rows = self._template.tokenize([text], [found])[0]
        return tuple(ids[rows[-1].content : rows[-1].stop])


@dataclass(frozen=True)
class Ask:
    """One reply that an attack wants, with what its record says.

    Attributes:
        prompt: what is asked.
        ids: all ids before the reply.
        cell: as in Record.
        sample: as in Record.
        prefix: of `ids`, the last ones that are in the model's mouth.
        data: more values for the record.
        error: why it cannot be asked.
        again: whether it may be in the next run.
    """

    prompt: Prompt
    ids: Ids
    cell: Mapping[str, Any]
    sample: int
    prefix: Ids = ()
    sampling: Sampling | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    again: bool = False


def begun(chat: Chat, prompts: Iterable[Prompt]) -> Iterator[tuple[Prompt, Ids, str | None]]:
    """(prompt, all ids before the reply, None), or (prompt, none, why the template has none)."""
    for prompt in prompts:
        try:
            yield prompt, chat.ids(prompt), None
        except ValueError as error:
            yield prompt, (), str(error)


def replies(
    name: str, asking: Asking, chat: Chat, engine: Engine, asks: Iterable[Ask]
) -> Iterator[Record]:
    """A record of kind "sample" per ask, in order; all go to the engine at once."""
    asks = list(asks)
    seeds = [derived_seed(asking.seed, a.prompt.id, name, dict(a.cell), a.sample) for a in asks]
    requests = [_request(asking, chat, a, s) for a, s in zip(asks, seeds, strict=True)]
    good = [i for i, a in enumerate(asks) if a.error is None]
    found = dict(zip(good, engine.generate([requests[i] for i in good]), strict=True))
    for i, (ask, seed) in enumerate(zip(asks, seeds, strict=True)):
        reply = found.get(i) or Reply(finish="error", error=ask.error, again=ask.again)
        yield _record(name, chat, engine, ask, seed, reply)


def _request(asking: Asking, chat: Chat, ask: Ask, seed: int) -> Request:
    prefix = chat.tokenizer.decode(ask.prefix, skip_special_tokens=False) if ask.prefix else ""
    messages = chat.messages(ask.prompt)
    if prefix:
        messages.append({"role": "assistant", "content": prefix})
    return Request(ask.ids, ask.sampling or asking.sampling, seed, tuple(messages))


def _record(name: str, chat: Chat, engine: Engine, ask: Ask, seed: int, reply: Reply) -> Record:
    prefix = chat.tokenizer.decode(ask.prefix, skip_special_tokens=True) if ask.prefix else ""
    data = {
        "seed": seed,
        "mode": engine.mode,
        "prefilled": len(ask.prefix),
        "finish": reply.finish,
        "tokens": len(reply.ids),
        "logp": sum(reply.logps) if reply.logps else None,
        **ask.data,
    }
    if reply.again:
        data["again"] = True
    text = {"prompt": ask.prompt.prompt, "prefix": prefix, "reply": reply.text}
    if ask.prompt.suffix:
        text["suffix"] = ask.prompt.suffix
    if reply.detail:
        text["server"] = reply.detail
    # What a good model answers is a rate of its own: a set may hold both kinds.
    cell = {**ask.cell, "benign": True} if ask.prompt.benign else dict(ask.cell)
    return Record("sample", name, cell, ask.prompt.id, ask.sample, data, text, reply.error)
