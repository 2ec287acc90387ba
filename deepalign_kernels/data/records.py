"""Conversations: read from JSONL or records, checked one by one.

Whatever is wrong is refused with the file and the line it stands in, before anything is trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROLES = ("system", "user", "assistant")
Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """A checked conversation. Its assistant turns from message `trained_from` on are trained."""

    messages: tuple[Message, ...]
    where: str  # "chat.jsonl:12"
    trained_from: int = 0


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
    return _from_file("path", path)


def conversations_of(data: str | Path | Iterable[Any], name: str = "data") -> list[Conversation]:
    """Checked conversations of a file or of a list of records; `name` is the argument to blame."""
    if isinstance(data, (str, Path)):
        return _from_file(name, data)
    out = [check_record(record, f"{name}[{index}]") for index, record in enumerate(data)]
    if not out:
        raise ValueError(f"{name}: no conversation in this list")
    return out


def _from_file(name: str, path: str | Path) -> list[Conversation]:
    conversations = [check_record(record, where) for record, where in read_jsonl(name, path)]
    if not conversations:
        raise ValueError(f"{name}: {path}: no conversation in this file")
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
