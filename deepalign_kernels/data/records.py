"""Conversations: records of the user's, checked one by one.

Whatever is wrong is refused with the file and the line it stands in, before anything is trained.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepalign_kernels import check
from deepalign_kernels.data.reading import rows_of

ROLES = ("system", "developer", "user", "assistant", "tool")
UNKNOWN_KEYS = ("ignore", "error")
RECORD_KEYS = ("messages", "prompt", "completion", "tools", "beta_scale")
OURS = ("train", "weight")  # keys of a message that the chat template does not see
MESSAGE_KEYS = (
    *("role", "content", *OURS, "name", "tool_calls", "tool_call_id"),
    *("reasoning_content", "reasoning", "thinking"),
)
OTHER_FORMATS = {  # a key that gives it away -> what to do
    "conversations": "of ShareGPT make 'messages', 'from' to 'role' and 'value' to 'content'",
    "instruction": "of Alpaca make 'prompt' (instruction and input) and 'completion' (output)",
    "text": "plain text has no turns; this trains on conversations",
}
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """A checked conversation.

    Attributes:
        messages: as the chat template takes them.
        where: for messages of errors, such as "chat.jsonl:12".
        trained_from: its assistant turns from this message on are trained.
        tools: what the chat template is told of tools; None: nothing.
        weights: what `train` and `weight` say, by message; None where they say nothing.
        beta_scale: what beta of its tokens is multiplied by.
    """

    messages: tuple[Message, ...]
    where: str
    trained_from: int = 0
    tools: tuple[Any, ...] | None = None
    weights: tuple[float | None, ...] = ()
    beta_scale: float = 1.0


def load_chat_data(path: str | Path, *, unknown_keys: str = "ignore") -> list[Conversation]:
    """Read and check conversations of a file or a data set; see `rows_of` for what it may be.

    A record is `{"messages": [...]}` or `{"prompt": .., "completion": ..}`, with `"tools"` if the
    chat template knows tools. Prompt and completion are strings (a user turn and an assistant turn)
    or lists of messages, of which only the completion's are trained. A message is `{"role":
    "system" | "developer" | "user" | "assistant" | "tool", "content": str}`, with keys that chat
    templates know (`tool_calls`, `reasoning_content`, ...). On an assistant's message `"train":
    false` leaves the turn as context, `true` trains one of the prompt, and `"weight": 0.3` weighs
    its tokens in the loss. `"beta_scale": 2.0` in a record, >= 0, multiplies beta of its tokens: it
    is held to the reference harder (0: not at all, which is plain cross-entropy).

    Args:
        path: file, folder or name of a data set.
        unknown_keys: "error" refuses keys that mean nothing here; "ignore" leaves them out, except
            those that look like a misspelling.

    Raises:
        ValueError: no such file, nothing in it, or, with file and line: bytes that are not UTF-8,
            broken JSON, a line that is no object, wrong or missing keys, an unknown role, content
            that is not text, an empty assistant turn, no assistant turn, no user turn.
    """
    return conversations_of(path, "path", unknown_keys=unknown_keys)


def conversations_of(
    data: Any, name: str = "data", *, unknown_keys: str = "ignore"
) -> list[Conversation]:
    """Checked conversations of whatever `rows_of` takes; `name` is the argument to blame."""
    check.one_of("unknown_keys", unknown_keys, UNKNOWN_KEYS)
    return [check_record(row, where, unknown_keys) for row, where in rows_of(data, name)]


def check_record(record: object, where: str, unknown_keys: str = "ignore") -> Conversation:
    """One record as `load_chat_data` reads it, checked; `where` goes into messages of errors. A
    `ValueError` in its place, as `rows_of` gives with `keep_broken`, is raised."""
    if isinstance(record, Conversation):
        return record
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected a record (dict), got {type(record).__name__}")
    # Columns of a table that this row has nothing in.
    record = {key: value for key, value in record.items() if value is not None}
    if "messages" in record:
        prompt, reply = [], record["messages"]
        # A data set may carry a copy of its first message under "prompt".
        check_keys(set(record) - {"prompt", "completion"}, RECORD_KEYS, where, unknown_keys)
    elif {"prompt", "completion"} <= set(record):
        prompt, reply = record["prompt"], record["completion"]
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        reply = [{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply
        check_keys(record, RECORD_KEYS, where, unknown_keys)
    else:
        hint = next((f"; {say}" for key, say in OTHER_FORMATS.items() if key in record), "")
        got = ", ".join(map(repr, sorted(map(str, record)))) or "none"
        raise ValueError(
            f"{where}: expected the keys 'messages', or 'prompt' and 'completion'; got {got}{hint}"
        )
    for part in (prompt, reply):
        if not isinstance(part, (list, tuple)):
            raise ValueError(f"{where}: expected a list of messages, got {type(part).__name__}")
    both = [
        _check_message(message, f"{where}: message {index}", unknown_keys)
        for index, message in enumerate((*prompt, *reply))
    ]
    messages = tuple(message for message, _ in both)
    weights = tuple(weight for _, weight in both)
    if not any(m["role"] == "assistant" for m in messages[len(prompt) :]):
        raise ValueError(f"{where}: no assistant turn, so nothing to train")
    if not any(m["role"] == "user" for m in messages):
        raise ValueError(f"{where}: no user turn")
    tools = record.get("tools")
    if tools is not None and not (isinstance(tools, (list, tuple)) and all(map(_is_tool, tools))):
        raise ValueError(f"{where}: expected a list of JSON schemas under 'tools', got {tools!r}")
    return Conversation(
        messages,
        where,
        len(prompt),
        tuple(tools) if tools else None,
        weights if any(w is not None for w in weights) else (),
        check.number(f"{where}: beta_scale", record.get("beta_scale", 1.0), low=0.0),
    )


def _is_tool(tool: object) -> bool:
    return isinstance(tool, Mapping)


def check_keys(keys: Iterable[str], known: tuple[str, ...], where: str, unknown: str) -> None:
    """Raises ValueError: a key is not `known`, and `unknown` is "error" or it looks like one."""
    for key in sorted(map(str, set(keys) - set(known))):
        if unknown == "error":
            raise ValueError(
                f"{where}: unknown key {key!r}; expected some of {', '.join(known)}"
                " (unknown_keys='ignore' leaves others out)"
            )
        near = difflib.get_close_matches(key, known, 1, 0.8)
        if near and not key.startswith(f"{near[0]}_"):  # "prompt_id" is meant as it is
            raise ValueError(f"{where}: unknown key {key!r}; is it meant to be {near[0]!r}?")


def _check_message(message: object, where: str, unknown: str) -> tuple[Message, float | None]:
    """What the chat template sees, and what `train` and `weight` say."""
    if not isinstance(message, Mapping):
        raise ValueError(
            f"{where}: expected an object with 'role' and 'content', got {type(message).__name__}"
        )
    # None is what a table has where this message lacks the key.
    given = {key: value for key, value in message.items() if value is not None}
    check_keys(given, MESSAGE_KEYS, where, unknown)
    if "beta_scale" in given:
        raise ValueError(f"{where}: 'beta_scale' belongs beside the messages: it is of them all")
    role, content = given.get("role"), _text(given.get("content"))
    if content is None and given.get("tool_calls"):
        content = ""
    for key, value in (("role", role), ("content", content)):
        if not isinstance(value, str):
            raise ValueError(f"{where}: expected text under {key!r}, got {message.get(key)!r}")
    assert isinstance(content, str)
    if any("\ud800" <= c <= "\udfff" for c in content):
        raise ValueError(f"{where}: half of a surrogate pair under 'content', which is no text")
    if role not in ROLES:
        raise ValueError(f"{where}: unknown role {role!r}; expected one of {', '.join(ROLES)}")
    if role == "assistant" and not content.strip() and not given.get("tool_calls"):
        raise ValueError(f"{where}: empty assistant turn")
    plain = {k: v for k, v in given.items() if k in MESSAGE_KEYS and k not in OURS}
    return {**plain, "role": role, "content": content}, _weight(given, role, where)


def _text(content: object) -> object:
    """Parts of text, as some data have them, as one text; anything else as it is."""
    if isinstance(content, (list, tuple)) and content:
        parts = [p.get("text") for p in content if isinstance(p, Mapping) and _is_text(p)]
        if len(parts) == len(content) and all(isinstance(p, str) for p in parts):
            return "".join(map(str, parts))
    return content


def _is_text(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "text"


def _weight(given: Mapping[str, Any], role: object, where: str) -> float | None:
    train, weight = given.get("train"), given.get("weight")
    if train is None and weight is None:
        return None
    if role != "assistant":
        raise ValueError(f"{where}: 'train' and 'weight' are for the assistant's messages")
    if train is not None and not isinstance(train, bool):
        raise ValueError(f"{where}: expected true or false under 'train', got {train!r}")
    if weight is None:
        return float(bool(train))
    weight = check_weight(weight, where)
    return 0.0 if train is False else weight


def check_weight(weight: object, where: str) -> float:
    """Raises ValueError: no weight of tokens."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise ValueError(f"{where}: expected a number under 'weight', got {weight!r}")
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{where}: expected a finite number >= 0 under 'weight', got {weight!r}")
    return float(weight)
