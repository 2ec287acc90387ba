"""Conversations as tokens: which of them are trained, where in its response each stands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepalign_kernels import check
from deepalign_kernels.data.records import Conversation, conversations_of
from deepalign_kernels.data.template import ChatTemplate, Turn

IGNORE = -100
ORIGINS = ("content", "span")
TOO_LONG = ("error", "drop", "truncate")


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
        position_origin: where a response begins to count: at its "content", behind what the chat
            template itself puts there (an empty think block, a channel header), or at the start of
            its "span".

    Raises:
        ValueError: as `load_chat_data`; a template that is missing, fails, or leaves out a turn;
            an unknown position_origin.
    """
    check.one_of("position_origin", position_origin, ORIGINS)
    conversations = conversations_of(data)
    return encode(ChatTemplate(tokenizer), conversations, position_origin=position_origin)


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
    examples = []
    rows = template.tokenize([text for text, _ in rendered], [turns for _, turns in rendered])
    for conversation, (ids, turns) in zip(conversations, rows, strict=True):
        labels, positions = [IGNORE] * len(ids), [0] * len(ids)
        for turn in turns_to_train(conversation, turns):
            labels[turn.begin : turn.end] = ids[turn.begin : turn.end]
            first = turn.content if position_origin == "content" else turn.begin
            positions[first : turn.end] = range(1, turn.end - first + 1)
        if all(
            label == IGNORE for label in labels[1:]
        ):  # the first token has no context to come from
            raise ValueError(
                f"{conversation.where}: the chat template leaves no token of this to train"
            )
        examples.append(Example(ids, labels, positions, part, conversation.where))
    return examples


def turns_to_train(conversation: Conversation, turns: list[Turn]) -> list[Turn]:
    """Of all assistant turns, in order, those from message `trained_from` on."""
    before = conversation.messages[: conversation.trained_from]
    return turns[sum(m["role"] == "assistant" for m in before) :]


def limit_length(
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
        raise ValueError(f"data: {count}; {first}; {hint}")
    if on_too_long == "drop":
        kept = [e for e in examples if len(e.input_ids) <= max_length]
        if not kept:
            raise ValueError(f"data: {count}: none is left to train on; {first}")
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
