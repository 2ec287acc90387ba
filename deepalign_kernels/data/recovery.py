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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from deepalign_kernels import check
from deepalign_kernels.data.columns import PART_WEIGHTINGS
from deepalign_kernels.data.examples import IGNORE, ORIGINS, Encoding, Example, compact, encode
from deepalign_kernels.data.packing import derived_seed
from deepalign_kernels.data.reading import read_jsonl
from deepalign_kernels.data.records import Conversation, Message, check_record, conversations_of
from deepalign_kernels.data.template import ChatTemplate, Turn

ANCHOR, RECOVERY = 0, 1
KEYS = ("prompt", "answer", "refusal")
GLUES = ("ids", "text")


class _Triplet(NamedTuple):
    """A checked record."""

    prompt: tuple[Message, ...]
    answer: str
    refusal: str
    where: str


@dataclass(frozen=True)
class _Recovery:
    """Token ids of one example, cut where the augmentation needs it."""

    prompt: list[int]  # up to where the assistant's content begins
    answer: list[int]  # content alone
    refusal: list[int]  # content and end of turn, as it stands at the start of a turn
    late_refusal: list[int]  # the same behind other text
    where: str


class RecoveryAugmentation:
    """A data source for the trainer: recovery examples, drawn anew each epoch, mixed with ordinary
    conversations.

    Args:
        recovery: JSONL file or list of `{"prompt": .., "answer": str, "refusal": str}`; the prompt
            is a string or a list of messages that ends with the user's.
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

    Attributes:
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
    ) -> None:
        for name, value in (("alpha", alpha), ("p0", p0)):
            check.number(name, value, low=0.0)
            if value > 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
        for name, value in (("max_k", max_k), ("anchors_per_recovery", anchors_per_recovery)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        check.one_of("position_origin", position_origin, ORIGINS)
        check.one_of("weighting", weighting, PART_WEIGHTINGS)
        check.one_of("glue", glue, GLUES)
        self.p0, self.max_k, self.seed = p0, max_k, seed
        template = ChatTemplate(tokenizer)
        self._recovery = _tokenize(
            template, _read(recovery, system), separator if glue == "text" else None
        )
        self._anchors = []
        if anchors is not None:
            conversations = conversations_of(anchors, "anchors")
            conversations = [_below_system(c, system) for c in conversations]
            encoding = Encoding(position_origin)
            examples = encode(template, conversations, encoding, ANCHOR)
            self._anchors = [compact(example) for example in examples]
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
        return Example(context + refusal, labels, positions, RECOVERY, row.where)

    def _anchor(self, number: int) -> Example:
        """Anchor `number` of the run; every round through all of them has an order of its own."""
        turn, at = divmod(number, len(self._anchors))
        if self._order[0] != turn:
            order = list(range(len(self._anchors)))
            random.Random(derived_seed(self.seed, "anchors", turn)).shuffle(order)
            self._order = turn, order
        return self._anchors[self._order[1][at]]


def _read(data: str | Path | Iterable[Mapping[str, Any]], system: str) -> list[_Triplet]:
    """Checked records."""
    if isinstance(data, (str, Path)):
        records = list(read_jsonl("recovery", data))
    else:
        records = [(record, f"recovery[{index}]") for index, record in enumerate(data)]
    if not records:
        raise ValueError(
            f"recovery: no example in {data if isinstance(data, (str, Path)) else 'this list'}"
        )
    return [_checked(record, where, system) for record, where in records]


def _checked(record: object, where: str, system: str) -> _Triplet:
    if not isinstance(record, Mapping) or set(record) != set(KEYS):
        got = sorted(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
        raise ValueError(f"{where}: expected the keys {', '.join(map(repr, KEYS))}; got {got}")
    for key in ("answer", "refusal"):
        if not isinstance(record[key], str) or not record[key].strip():
            raise ValueError(f"{where}: expected text under {key!r}, got {record[key]!r}")
    asked = check_record({"prompt": record["prompt"], "completion": record["answer"]}, where)
    prompt = asked.messages[: asked.trained_from]
    if prompt[-1]["role"] != "user" or not prompt[-1]["content"].strip():
        raise ValueError(f"{where}: expected a prompt that ends with the user's text")
    return _Triplet(_with_system(prompt, system), record["answer"], record["refusal"], where)


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
        out.append(_Recovery(prompt, answer, refusal + ending, late + ending, triplet.where))
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
