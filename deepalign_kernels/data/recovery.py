"""Safety-recovery augmentation: equation 2 of arXiv 2406.05946.

A recovery example is a prompt x, an answer h that should not have begun, and a refusal r. The model
sees x and the first k tokens of h and is trained on r alone, so it learns to turn back late, not
only at the first token:

    alpha * E[-log p(r | x, h[:k])]  +  (1 - alpha) * E[-log p(y | x)]

over recovery examples and over ordinary conversations (anchors), with k = 0 with probability p0,
else uniform on 1..max_k. The log-probabilities are those of whole sequences. The authors train on
16 recovery examples and 64 anchors in each batch, which is alpha = 0.2, and take the mean over all
their tokens: equation 2 divided by the mean number of trained tokens of an example.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from deepalign_kernels import check
from deepalign_kernels.data.columns import PART_WEIGHTINGS
from deepalign_kernels.data.examples import IGNORE, Encoding, Example, compact
from deepalign_kernels.data.packing import derived_seed
from deepalign_kernels.data.reading import read_jsonl, rows_of
from deepalign_kernels.data.records import (
    Conversation,
    Message,
    check_keys,
    check_record,
    check_weight,
)
from deepalign_kernels.data.template import ChatTemplate, Turn
from deepalign_kernels.data.tokenizing import encoded

ANCHOR, RECOVERY = 0, 1
KEYS = ("prompt", "answer", "refusal")
MAY_HAVE = ("weight", "beta_scale")
GLUES = ("ids", "text")
T = TypeVar("T")


class _Triplet(NamedTuple):
    """A checked record."""

    prompt: tuple[Message, ...]
    answer: str
    refusal: str
    where: str
    weight: float
    beta_scale: float


@dataclass(frozen=True)
class _Recovery:
    """Token ids of one example, cut where the augmentation needs it."""

    prompt: list[int]  # up to where the assistant's content begins
    answer: list[int]  # content alone
    refusal: list[int]  # content and end of turn, as it stands at the start of a turn
    late_refusal: list[int]  # the same behind other text
    about: _Triplet


class RecoveryAugmentation:
    """A data source for the trainer: recovery examples, drawn anew each epoch, mixed with ordinary
    conversations.

    Args:
        recovery: JSONL file or list of `{"prompt": .., "answer": str, "refusal": str}`; the prompt
            is a string or a list of messages that ends with the user's. `"weight"` and
            `"beta_scale"` beside them are of the refusal's tokens.
        tokenizer: as in `tokenize_chat`.
        anchors: ordinary conversations (file or list, see `load_chat_data`) that keep the model
            useful; None: none.
        alpha: weight of the recovery examples in every step's loss, 1 - alpha that of the anchors.
            Without anchors the recovery examples are the whole loss.
        weighting: what alpha weighs. "examples", as in the paper: an example counts with its whole
            log-probability, so a long answer counts for more than a short refusal. With alpha the
            share of recovery examples in a step (0.2 at four anchors to one), every token weighs
            the same. "tokens": the mean over the recovery tokens and that over the anchor tokens,
            however many either has.
        p0: probability of k = 0.
        max_k: largest k; never more than the answer has tokens, its end mark not counted.
        anchors_per_recovery: anchor examples per recovery example in an epoch (the paper: 64 to
            16), taken in turn from a shuffled round through all of them.
        glue: how a refusal follows a cut answer. "ids", as in the paper: the refusal's tokens are
            those at the start of a turn ("Step 1: GatherI cannot"). "text": those of `separator`
            and refusal in running text ("Step 1: Gather I cannot").
        separator: text between the cut answer and the refusal, with glue "text".
        system: system prompt of recovery examples and anchors that have none; "": none is added.
        seed: the draw of example i in epoch e depends on (seed, e, i) alone: not on order, batches
            or ranks.
        position_origin: of the anchors, as in `tokenize_chat`; a refusal counts from its first
            token, whatever k.
        train_on: of the anchors, as in `tokenize_chat`.
        unknown_keys: of all records: "ignore" leaves them out, "error" refuses them.
        on_bad_record: of all records: "error" stops at one of which nothing can be trained, "skip"
            leaves it out.

    Attributes:
        skipped: of each record that was left out, where it stands and what is wrong with it.
        part_weights: {ANCHOR: 1 - alpha, RECOVERY: alpha}.
        part_weighting: `weighting`.

    Raises:
        ValueError: naming the argument, or file and line.
    """

    def __init__(
        self,
        recovery: str | Path | Iterable[Mapping[str, Any]],
        tokenizer: Any,
        *,
        anchors: str | Path | Iterable[Any] | None = None,
        alpha: float = 0.2,
        weighting: str = "examples",
        p0: float = 0.5,
        max_k: int = 100,
        anchors_per_recovery: int = 4,
        glue: str = "ids",
        separator: str = " ",
        system: str = "",
        seed: int = 0,
        position_origin: str = "content",
        train_on: str = "all",
        unknown_keys: str = "ignore",
        on_bad_record: str = "error",
    ) -> None:
        for name, value in (("alpha", alpha), ("p0", p0)):
            check.number(name, value, low=0.0)
            if value > 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
        for name, value in (("max_k", max_k), ("anchors_per_recovery", anchors_per_recovery)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        encoding = Encoding(position_origin, train_on, unknown_keys, on_bad_record)
        check.one_of("weighting", weighting, PART_WEIGHTINGS)
        check.one_of("glue", glue, GLUES)
        self.p0, self.max_k, self.seed = p0, max_k, seed
        template = ChatTemplate(tokenizer)
        self.skipped: list[str] = []
        between = separator if glue == "text" else None
        triplets = _read(recovery, system, encoding, self.skipped)
        self._recovery = _tokenize(template, triplets, between, encoding, self.skipped)
        self._anchors: list[Example] = []
        if anchors is not None:
            self._anchors = _anchors_of(template, anchors, system, encoding, self.skipped)
        self._order: tuple[int, list[int]] = (-1, [])  # of the anchors, in the round asked for last
        self._anchors_per_epoch = anchors_per_recovery * len(self._recovery) if self._anchors else 0
        self.part_weights = (
            {ANCHOR: 1 - alpha, RECOVERY: alpha} if self._anchors else {RECOVERY: 1.0}
        )
        self.part_weighting = weighting

    def examples(self, epoch: int) -> list[Example]:
        """All recovery examples with this epoch's k, then this epoch's anchors."""
        recovery = [self._cut(index, epoch) for index in range(len(self._recovery))]
        first = epoch * self._anchors_per_epoch
        return recovery + [self._anchor(n) for n in range(first, first + self._anchors_per_epoch)]

    def draw_k(self, epoch: int, index: int) -> int:
        """Tokens of answer `index` that stand before the refusal in this epoch."""
        rng = random.Random(derived_seed(self.seed, "k", epoch, index))
        if rng.random() < self.p0:
            return 0
        return rng.randint(1, min(self.max_k, len(self._recovery[index].answer)))

    def _cut(self, index: int, epoch: int) -> Example:
        row, k = self._recovery[index], self.draw_k(epoch, index)
        context = row.prompt + row.answer[:k]
        refusal = row.late_refusal if k else row.refusal
        labels = [IGNORE] * len(context) + refusal
        positions = [0] * len(context) + list(range(1, len(refusal) + 1))
        weight, weights = row.about.weight, None
        if weight != 1:
            weights = [1.0] * len(context) + [weight] * len(refusal)
        about = RECOVERY, row.about.where, weights, row.about.beta_scale
        return Example(context + refusal, labels, positions, *about)

    def _anchor(self, number: int) -> Example:
        """Anchor `number` of the run; every round through all of them has an order of its own."""
        turn, at = divmod(number, len(self._anchors))
        if self._order[0] != turn:
            order = list(range(len(self._anchors)))
            random.Random(derived_seed(self.seed, "anchors", turn)).shuffle(order)
            self._order = turn, order
        return self._anchors[self._order[1][at]]


def _read(
    data: str | Path | Iterable[Mapping[str, Any]],
    system: str,
    encoding: Encoding,
    skipped: list[str],
) -> list[_Triplet]:
    """Checked records; why others are left out goes into `skipped`."""
    skips, before = encoding.on_bad_record == "skip", len(skipped)
    if isinstance(data, (str, Path)):
        records = list(read_jsonl("recovery", data, skips))
    else:
        records = [(record, f"recovery[{index}]") for index, record in enumerate(data)]
    if not records:
        raise ValueError(
            f"recovery: no example in {data if isinstance(data, (str, Path)) else 'this list'}"
        )
    out: list[_Triplet] = []
    for record, where in records:
        about = record, where, system, encoding.unknown_keys
        out += _or_skipped(encoding, skipped, _checked, *about)
    return _some("recovery", out, skipped[before:])


def _or_skipped(
    encoding: Encoding, skipped: list[str], make: Callable[..., T], *about: Any
) -> list[T]:
    """What `make` makes of `about`, unless it raises ValueError and that is to be skipped."""
    try:
        return [make(*about)]
    except ValueError as error:
        if encoding.on_bad_record == "error":
            raise
        skipped.append(str(error))
        return []


def _some(name: str, found: list[T], skipped: list[str]) -> list[T]:
    if not found:
        raise ValueError(f"{name}: none of its records can be trained; the first: {skipped[0]}")
    return found


def _checked(record: object, where: str, system: str, unknown: str) -> _Triplet:
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, Mapping) or not set(KEYS) <= set(record):
        got = sorted(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
        raise ValueError(f"{where}: expected the keys {', '.join(map(repr, KEYS))}; got {got}")
    check_keys(record, (*KEYS, *MAY_HAVE), where, unknown)
    for key in ("answer", "refusal"):
        if not isinstance(record[key], str) or not record[key].strip():
            raise ValueError(f"{where}: expected text under {key!r}, got {record[key]!r}")
    pair = {"prompt": record["prompt"], "completion": record["answer"]}
    asked = check_record(pair, where, unknown)
    prompt = asked.messages[: asked.trained_from]
    if prompt[-1]["role"] != "user" or not prompt[-1]["content"].strip():
        raise ValueError(f"{where}: expected a prompt that ends with the user's text")
    if asked.weights:
        raise ValueError(
            f"{where}: 'train' and 'weight' of a message in the prompt do nothing, as only the"
            " refusal is trained; its weight stands beside the prompt"
        )
    given = {key: record[key] for key in MAY_HAVE if record.get(key) is not None}
    weight = check_weight(given.get("weight", 1.0), where)
    if weight == 0:
        raise ValueError(f"{where}: weight 0, so nothing to train")
    scale = check.number(f"{where}: beta_scale", given.get("beta_scale", 1.0), low=0.0)
    said = record["answer"], record["refusal"]
    return _Triplet(_with_system(prompt, system), *said, where, weight, scale)


def _anchors_of(
    template: ChatTemplate,
    anchors: Any,
    system: str,
    encoding: Encoding,
    skipped: list[str],
) -> list[Example]:
    """Ordinary conversations as the trainer has them, below the system prompt."""
    before, rows = len(skipped), []
    for row, where in rows_of(anchors, "anchors", encoding.on_bad_record == "skip"):
        about = row, where, encoding.unknown_keys
        for conversation in _or_skipped(encoding, skipped, check_record, *about):
            rows.append((_below_system(conversation, system), where))
    examples, wrong = encoded(template, rows, encoding)
    skipped += wrong
    return [compact(example) for example in _some("anchors", examples, skipped[before:])]


def _with_system(messages: Sequence[Message], system: str) -> tuple[Message, ...]:
    """`messages` behind this system prompt, unless they have one or it is empty."""
    if not system or any(m["role"] == "system" for m in messages):
        return tuple(messages)
    return ({"role": "system", "content": system}, *messages)


def _below_system(conversation: Conversation, system: str) -> Conversation:
    messages = _with_system(conversation.messages, system)
    more = len(messages) - len(conversation.messages)
    return replace(conversation, messages=messages, trained_from=conversation.trained_from + more)


def _tokenize(
    template: ChatTemplate,
    triplets: list[_Triplet],
    separator: str | None,
    encoding: Encoding,
    skipped: list[str],
) -> list[_Recovery]:
    """`_together`, or one by one where a bad one is left out."""
    try:
        return _together(template, triplets, separator)
    except ValueError:
        if encoding.on_bad_record == "error":
            raise
    before, out = len(skipped), []
    for each in triplets:
        for rows in _or_skipped(encoding, skipped, _together, template, [each], separator):
            out += rows
    return _some("recovery", out, skipped[before:])


def _together(
    template: ChatTemplate, triplets: list[_Triplet], separator: str | None
) -> list[_Recovery]:
    """`separator`: between answer and refusal; None: the refusal as at the start of a turn."""
    answers = _last_turns(template, triplets, [t.answer for t in triplets])
    refusals = _last_turns(template, triplets, [t.refusal for t in triplets])
    out = []
    for triplet, (a, said), (r, turn) in zip(triplets, answers, refusals, strict=True):
        answer, refusal = a[said.content : said.stop], r[turn.content : turn.stop]
        ending = r[turn.stop : turn.end]
        if not answer or not refusal:
            raise ValueError(
                f"{triplet.where}: the chat template leaves nothing of the answer or of the refusal"
            )
        late = refusal
        if separator is not None:
            late = _in_running_text(template.tokenizer, separator + triplet.refusal.strip())
        prompt = r[: turn.content]
        out.append(_Recovery(prompt, answer, refusal + ending, late + ending, triplet))
    return out


def _last_turns(
    template: ChatTemplate, triplets: list[_Triplet], replies: list[str]
) -> list[tuple[list[int], Turn]]:
    """Token ids of prompt and reply, and where the reply stands."""
    rendered = []
    for triplet, reply in zip(triplets, replies, strict=True):
        try:
            said = {"role": "assistant", "content": reply}
            rendered.append(template.render([*triplet.prompt, said]))
        except ValueError as error:
            raise ValueError(f"{triplet.where}: {error}") from error
    rows = template.tokenize([text for text, _ in rendered], [turns for _, turns in rendered])
    return [(ids, turns[-1]) for ids, turns in rows]


def _in_running_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` behind other text: no space of the tokenizer's own in front."""
    for before in (".", "x", "0", "\n"):  # the first that does not melt into the text
        coded = tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True)
        pairs = list(zip(coded["input_ids"], coded["offset_mapping"], strict=True))
        if not any(begin < 1 < end for _, (begin, end) in pairs):
            return [token for token, (_, end) in pairs if end > 1]
    return tokenizer(text, add_special_tokens=False)["input_ids"]
