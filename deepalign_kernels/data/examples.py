"""Conversations as tokens: which of them are trained, where in its response each stands."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepalign_kernels import check
from deepalign_kernels.data.records import UNKNOWN_KEYS, Conversation, conversations_of
from deepalign_kernels.data.template import ChatTemplate

IGNORE = -100
ORIGINS = ("content", "span")
TRAIN_ON = ("all", "last")
TOO_LONG = ("error", "drop", "truncate")
BAD_RECORDS = ("error", "skip")


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
        weights: of the tokens in the loss, >= 0, which is a weighted mean; None: 1 for each.
        beta_scale: what beta of its tokens is multiplied by, >= 0; 0 is plain cross-entropy.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    positions: Sequence[int]
    part: int = 0
    where: str = ""
    weights: Sequence[float] | None = None
    beta_scale: float = 1.0


@dataclass(frozen=True)
class Encoding:
    """How conversations become examples: the arguments of `tokenize_chat`, and what is done with a
    record that is none, or of which nothing can be trained (`on_bad_record`)."""

    position_origin: str = "content"
    train_on: str = "all"
    unknown_keys: str = "ignore"
    on_bad_record: str = "error"

    def __post_init__(self) -> None:
        check.one_of("position_origin", self.position_origin, ORIGINS)
        check.one_of("train_on", self.train_on, TRAIN_ON)
        check.one_of("unknown_keys", self.unknown_keys, UNKNOWN_KEYS)
        check.one_of("on_bad_record", self.on_bad_record, BAD_RECORDS)


def tokenize_chat(
    tokenizer: Any,
    data: str | Path | Iterable[Any],
    *,
    position_origin: str = "content",
    train_on: str = "all",
    unknown_keys: str = "ignore",
) -> list[Example]:
    """Tokens, labels and response positions of conversations, through the tokenizer's chat
    template.

    Args:
        tokenizer: a fast tokenizer of transformers with a chat template. `{% generation %}` marks
            in it say what is trained of an assistant's turn; without them it is the content and
            what ends the turn.
        data: what `load_chat_data` takes, or records like those in it.
        position_origin: where a response begins to count: at its "content", behind what the chat
            template itself puts there (an empty think block, a channel header), or at the start of
            its "span".
        train_on: "all" assistant turns, or the "last" of each conversation. `train` and `weight` of
            a message come before this.
        unknown_keys: as in `load_chat_data`.

    Raises:
        ValueError: as `load_chat_data`; a template that is missing, fails, or leaves out a turn;
            a conversation without a token to train; an unknown choice.
    """
    encoding = Encoding(position_origin, train_on, unknown_keys)
    conversations = conversations_of(data, unknown_keys=unknown_keys)
    return encode(ChatTemplate(tokenizer), conversations, encoding)


def encode(
    template: ChatTemplate,
    conversations: Sequence[Conversation],
    encoding: Encoding,
    part: int = 0,
) -> list[Example]:
    """`tokenize_chat` of conversations that are checked already."""
    rendered = []
    for conversation in conversations:
        try:
            rendered.append(template.render(conversation.messages, conversation.tools))
        except ValueError as error:
            raise ValueError(f"{conversation.where}: {error}") from error
    examples = []
    rows = template.tokenize([text for text, _ in rendered], [turns for _, turns in rendered])
    for conversation, (ids, turns) in zip(conversations, rows, strict=True):
        labels, positions, weights = [IGNORE] * len(ids), [0] * len(ids), [1.0] * len(ids)
        for turn, weight in zip(turns, turn_weights(conversation, encoding.train_on), strict=True):
            if weight == 0:
                continue
            labels[turn.begin : turn.end] = ids[turn.begin : turn.end]
            first = turn.content if encoding.position_origin == "content" else turn.begin
            positions[first : turn.end] = range(1, turn.end - first + 1)
            weights[turn.begin : turn.end] = [weight] * (turn.end - turn.begin)
        if all(
            label == IGNORE for label in labels[1:]
        ):  # the first token has no context to come from
            raise ValueError(f"{conversation.where}: no token of this is trained")
        own = weights if any(w != 1 for w in weights) else None
        about = conversation.where, own, conversation.beta_scale
        examples.append(Example(ids, labels, positions, part, *about))
    return examples


def compact(e: Example) -> Example:
    """The same in 12 bytes a token, to be kept or sent."""
    columns = {"input_ids": e.input_ids, "labels": e.labels, "positions": e.positions}
    small = {name: array("i", column) for name, column in columns.items()}
    weights = None if e.weights is None else array("f", e.weights)
    return replace(e, **small, weights=weights)


def turn_weights(conversation: Conversation, train_on: str) -> list[float]:
    """What the tokens of each assistant turn weigh in the loss; 0: context alone."""
    at = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
    said = conversation.weights or (None,) * len(conversation.messages)
    usual = [i >= conversation.trained_from and (train_on == "all" or i == at[-1]) for i in at]
    pairs = [(said[i], float(default)) for i, default in zip(at, usual, strict=True)]
    return [default if weight is None else weight for weight, default in pairs]


class LengthLimit:
    """Keeps examples to at most `max_length` tokens, one by one.

    Args:
        max_length: None: no limit.
        on_too_long: "error" refuses a longer one when all are seen, "drop" leaves it out,
            "truncate" keeps its beginning.
        skipped: what is said there of examples whose beginning has nothing to train, which are then
            left out; None refuses them.
    """

    def __init__(
        self, max_length: int | None, on_too_long: str, skipped: list[str] | None = None
    ) -> None:
        self.max_length, self.on_too_long, self._skipped = max_length, on_too_long, skipped
        self.seen = self.too_long = self.empty = 0
        self._first = self._first_empty = ""

    def of(self, examples: Iterable[Example]) -> Iterable[Example]:
        """Those that are to be trained.

        Raises:
            ValueError: at the end, with "error" if any is longer, with "truncate" if one has
                nothing left to train, with "drop" if none is left.
        """
        for example in examples:
            self.seen += 1
            if self.max_length is None or len(example.input_ids) <= self.max_length:
                yield example
                continue
            self.too_long += 1
            self._first = self._first or f"{example.where} is the first, with "
            self._first += str(len(example.input_ids)) * (self.too_long == 1)
            if self.on_too_long == "truncate":
                short = _truncated(example, self.max_length)
                if any(label != IGNORE for label in short.labels[1:]):
                    yield short
                elif self._skipped is not None:
                    limit = f"max_length={self.max_length} tokens"
                    self._skipped.append(f"{example.where}: nothing to train within {limit}")
                else:
                    self.empty += 1
                    self._first_empty = self._first_empty or example.where
        self._finish()

    def _finish(self) -> None:
        limit = f"max_length={self.max_length} tokens"
        many = f"{self.too_long} of {self.seen}"
        count = f"{many} conversations are over max_length={self.max_length} tokens"
        if self.too_long and self.on_too_long == "error":
            hint = "raise max_length, or say on_too_long='drop' or 'truncate'"
            raise ValueError(f"data: {count}; {self._first}; {hint}")
        if self.too_long == self.seen and self.seen and self.on_too_long == "drop":
            raise ValueError(f"data: {count}: none is left to train on; {self._first}")
        if self.empty:
            raise ValueError(
                f"{self._first_empty}: nothing to train within the first {limit}"
                f" ({self.empty} such conversations)"
            )


def _truncated(e: Example, n: int) -> Example:
    weights = None if e.weights is None else e.weights[:n]
    short = {"input_ids": e.input_ids[:n], "labels": e.labels[:n], "positions": e.positions[:n]}
    return replace(e, **short, weights=weights)
