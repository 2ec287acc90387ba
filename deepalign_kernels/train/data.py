"""Conversations: read from JSONL or records, checked one by one, turned into tokens.

Whatever is wrong is refused with the file and the line it stands in, before anything is trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepalign_kernels.train.template import ChatTemplate

IGNORE = -100
ROLES = ("system", "user", "assistant")
Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """A checked conversation. Its assistant turns from message `trained_from` on are trained."""

    messages: tuple[Message, ...]
    where: str  # "chat.jsonl:12"
    trained_from: int = 0


@dataclass(frozen=True)
class Example:
    """What the loop trains on: one row of token ids.

    Attributes:
        input_ids: token ids.
        labels: the same ids where the token is trained, -100 elsewhere; not shifted.
        positions: 1-based position of the token in its response; 0 elsewhere, and for tokens that
            the chat template puts before the content (these have beta = `rest` if they are
            trained).
        part: examples of one part share a mean; a data source with `part_weights` mixes the means.
        where: for messages, such as "chat.jsonl:12".
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    positions: Sequence[int]
    part: int = 0
    where: str = ""


def load_chat_data(path: str | Path) -> list[Conversation]:
    """Read and check a JSONL file: one `{"messages": [...]}` or `{"prompt": .., "completion": ..}`
    per line.

    A message is `{"role": "system" | "user" | "assistant", "content": str}`. Prompt and completion
    are strings (a user turn and an assistant turn) or lists of messages, of which only the
    completion's are trained. Blank lines are skipped.

    Raises:
        ValueError: no such file, nothing in it, or, with file and line: bytes that are not UTF-8,
            broken JSON, a line that is no object, unknown or missing keys, an unknown role, content
            that is not text, an empty assistant turn, no assistant turn, no user turn.
    """
    conversations = [
        check_record(record, where) for record, where in read_jsonl("train_data", path)
    ]
    if not conversations:
        raise ValueError(f"train_data: {path}: no conversation in this file")
    return conversations


def read_jsonl(name: str, path: str | Path) -> Iterable[tuple[dict[str, Any], str]]:
    """(object, "file:line") of every line that is not blank; `name` is the argument to blame."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{name}: {path}: no such file")
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if not line.strip():
                    continue
                record = json.loads(line)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where}: not UTF-8: {error.reason} at byte {error.start}"
                ) from error
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: broken JSON, column {error.colno}: {error.msg}"
                ) from error
            except (ValueError, RecursionError) as error:  # thousands of digits or brackets
                raise ValueError(f"{where}: broken JSON: {error}") from error
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise ValueError(f"{where}: expected one JSON object per line, got a {kind}")
            yield record, where


def check_record(record: object, where: str) -> Conversation:
    """One record as `load_chat_data` reads it, checked; `where` goes into messages of errors."""
    if isinstance(record, Conversation):
        return record
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a record (dict), got {type(record).__name__}")
    keys = set(record)
    if keys == {"messages"}:
        prompt, reply = [], record["messages"]
    elif keys == {"prompt", "completion"}:
        prompt, reply = record["prompt"], record["completion"]
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        reply = [{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply
    else:
        got = ", ".join(map(repr, sorted(map(str, keys)))) or "none"
        raise ValueError(
            f"{where}: expected the keys 'messages', or 'prompt' and 'completion'; got {got}"
        )
    for part in (prompt, reply):
        if not isinstance(part, (list, tuple)):
            raise ValueError(f"{where}: expected a list of messages, got {type(part).__name__}")
    messages = (*prompt, *reply)
    for index, message in enumerate(messages):
        _check_message(message, f"{where}: message {index}")
    if not any(m["role"] == "assistant" for m in reply):
        raise ValueError(f"{where}: no assistant turn, so nothing to train")
    if not any(m["role"] == "user" for m in messages):
        raise ValueError(f"{where}: no user turn")
    return Conversation(messages, where, len(prompt))


def _check_message(message: object, where: str) -> None:
    if not isinstance(message, dict):
        raise ValueError(
            f"{where}: expected an object with 'role' and 'content', got {type(message).__name__}"
        )
    if unknown := sorted(set(map(str, message)) - {"role", "content"}):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; a message has 'role' and 'content'")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise ValueError(f"{where}: expected text under {key!r}, got {message.get(key)!r}")
    if any("\ud800" <= c <= "\udfff" for c in message["content"]):
        raise ValueError(f"{where}: half of a surrogate pair under 'content', which is no text")
    if message["role"] not in ROLES:
        raise ValueError(
            f"{where}: unknown role {message['role']!r}; expected one of {', '.join(ROLES)}"
        )
    if message["role"] == "assistant" and not message["content"].strip():
        raise ValueError(f"{where}: empty assistant turn")


def tokenize_chat(
    tokenizer: Any, data: str | Path | Iterable[Any], *, position_origin: str = "content"
) -> list[Example]:
    """Tokens, labels and response positions of conversations, through the tokenizer's chat
    template.

    Args:
        tokenizer: a fast tokenizer of transformers with a chat template. `{% generation %}` marks
            in it say what is trained; without them it is the content of every assistant turn and
            what ends the turn.
        data: what `load_chat_data` takes, or a list of such records.
        position_origin: "content" or "span", see `ConstrainedSFTConfig`.

    Raises:
        ValueError: as `load_chat_data`; a template that is missing, fails, or leaves out a turn.
    """
    conversations = conversations_of(data)
    return encode(ChatTemplate(tokenizer), conversations, position_origin=position_origin)


def conversations_of(
    data: str | Path | Iterable[Any], name: str = "train_data"
) -> list[Conversation]:
    if isinstance(data, (str, Path)):
        return load_chat_data(data)
    out = [check_record(record, f"{name}[{index}]") for index, record in enumerate(data)]
    if not out:
        raise ValueError(f"{name}: no conversation in this list")
    return out


def encode(
    template: ChatTemplate,
    conversations: Sequence[Conversation],
    *,
    position_origin: str,
    part: int = 0,
) -> list[Example]:
    """`tokenize_chat` of conversations that are checked already."""
    rendered = []
    for conversation in conversations:
        try:
            rendered.append(template.render(conversation.messages))
        except ValueError as error:
            raise ValueError(f"{conversation.where}: {error}") from error
    fixed = template.fixed_prefix if position_origin == "content" else ()
    examples = []
    rows = template.tokenize([text for text, _ in rendered], [spans for _, spans in rendered])
    for conversation, (ids, spans) in zip(conversations, rows, strict=True):
        labels, positions = [IGNORE] * len(ids), [0] * len(ids)
        for begin, end in spans_to_train(conversation, spans):
            labels[begin:end] = ids[begin:end]
            starts_fixed = fixed and tuple(ids[begin : begin + len(fixed)]) == fixed
            first = begin + len(fixed) if starts_fixed else begin
            positions[first:end] = range(1, end - first + 1)
        if all(
            label == IGNORE for label in labels[1:]
        ):  # the first token has no context to come from
            raise ValueError(
                f"{conversation.where}: the chat template leaves no token of this to train"
            )
        examples.append(Example(ids, labels, positions, part, conversation.where))
    return examples


def spans_to_train(
    conversation: Conversation, spans: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Of the token spans of all assistant turns, in order, those from message `trained_from` on."""
    before = conversation.messages[: conversation.trained_from]
    return spans[sum(m["role"] == "assistant" for m in before) :]


def fit(
    examples: list[Example], max_length: int | None, on_too_long: str
) -> tuple[list[Example], int]:
    """(examples of at most `max_length` tokens, how many were longer).

    Raises:
        ValueError: with "error" if any is longer, with "truncate" if one has nothing left to train,
            with "drop" if none is left.
    """
    long = [e for e in examples if max_length is not None and len(e.input_ids) > max_length]
    if not long or max_length is None:
        return examples, 0
    count = f"{len(long)} of {len(examples)} conversations are over max_length={max_length} tokens"
    first = f"{long[0].where} is the first, with {len(long[0].input_ids)}"
    if on_too_long == "error":
        hint = "raise max_length, or say on_too_long='drop' or 'truncate'"
        raise ValueError(f"train_data: {count}; {first}; {hint}")
    if on_too_long == "drop":
        kept = [e for e in examples if len(e.input_ids) <= max_length]
        if not kept:
            raise ValueError(f"train_data: {count}: none is left to train on; {first}")
        return kept, len(long)
    short = [_truncated(e, max_length) if len(e.input_ids) > max_length else e for e in examples]
    empty = [e for e in short if all(label == IGNORE for label in e.labels[1:])]
    if empty:
        raise ValueError(
            f"{empty[0].where}: nothing to train within the first max_length={max_length} tokens"
            f" ({len(empty)} such conversations)"
        )
    return short, len(long)


def _truncated(e: Example, length: int) -> Example:
    return Example(e.input_ids[:length], e.labels[:length], e.positions[:length], e.part, e.where)
