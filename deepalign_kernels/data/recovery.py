"""Safety-recovery augmentation: equation 2 of arXiv 2406.05946.

A recovery example is a prompt x, an answer h that should not have begun, and a refusal r. The model
sees x and the first k tokens of h and is trained on r alone, so it learns to turn back late, not
only at the first token:

    alpha * mean over recovery tokens of -log p(r | x, h[:k])  +  (1 - alpha) * mean over anchor
    tokens of -log p(y | x)

with k = 0 with probability p0, else uniform on 1..max_k.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepalign_kernels import check
from deepalign_kernels.data.examples import IGNORE, ORIGINS, Example, encode
from deepalign_kernels.data.packing import derived_seed
from deepalign_kernels.data.records import Conversation, conversations_of, read_jsonl
from deepalign_kernels.data.template import ChatTemplate, Turn

ANCHOR, RECOVERY = 0, 1
KEYS = ("prompt", "answer", "refusal")


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
        recovery: JSONL file or list of `{"prompt": str, "answer": str, "refusal": str}`.
        tokenizer: as in `tokenize_chat`.
        anchors: ordinary conversations (file or list, see `load_chat_data`) that keep the model
            useful; None: none.
        alpha: weight of the recovery mean in every step's loss, 1 - alpha that of the anchor mean,
            however many tokens either has. Without anchors the recovery mean is the whole loss.
        p0: probability of k = 0.
        max_k: largest k; never more than the answer has tokens.
        anchors_per_recovery: anchor examples per recovery example in an epoch (the paper: 64 to
            16), taken in turn from a shuffled round through all of them.
        separator: text between the cut answer and the refusal.
        seed: the draw of example i in epoch e depends on (seed, e, i) alone: not on order, batches
            or ranks.

    Attributes:
        part_weights: {ANCHOR: 1 - alpha, RECOVERY: alpha}, what the trainer multiplies the means
            by.

    Raises:
        ValueError: naming the argument, or file and line.
    """

    def __init__(
        self,
        recovery: str | Path | Iterable[Mapping[str, str]],
        tokenizer: Any,
        *,
        anchors: str | Path | Iterable[Any] | None = None,
        alpha: float = 0.2,
        p0: float = 0.5,
        max_k: int = 100,
        anchors_per_recovery: int = 4,
        separator: str = " ",
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
        self.p0, self.max_k, self.seed = p0, max_k, seed
        template = ChatTemplate(tokenizer)
        self._recovery = _tokenize(template, _read(recovery), separator)
        self._anchors = []
        if anchors is not None:
            conversations = conversations_of(anchors, "anchors")
            self._anchors = encode(
                template, conversations, position_origin=position_origin, part=ANCHOR
            )
        self._order: tuple[int, list[int]] = (-1, [])  # of the anchors, in the round asked for last
        self._anchors_per_epoch = anchors_per_recovery * len(self._recovery) if self._anchors else 0
        self.part_weights = (
            {ANCHOR: 1 - alpha, RECOVERY: alpha} if self._anchors else {RECOVERY: 1.0}
        )

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


def _read(data: str | Path | Iterable[Mapping[str, str]]) -> list[tuple[dict[str, str], str]]:
    """Checked (record, where) pairs."""
    if isinstance(data, (str, Path)):
        records = list(read_jsonl("recovery", data))
    else:
        records = [(record, f"recovery[{index}]") for index, record in enumerate(data)]
    if not records:
        raise ValueError(
            f"recovery: no example in {data if isinstance(data, (str, Path)) else 'this list'}"
        )
    for record, where in records:
        if not isinstance(record, Mapping) or set(record) != set(KEYS):
            got = sorted(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
            raise ValueError(f"{where}: expected the keys {', '.join(map(repr, KEYS))}; got {got}")
        for key in KEYS:
            if not isinstance(record[key], str) or not record[key].strip():
                raise ValueError(f"{where}: expected text under {key!r}, got {record[key]!r}")
    return [(dict(record), where) for record, where in records]


def _tokenize(
    template: ChatTemplate, records: list[tuple[dict[str, str], str]], separator: str
) -> list[_Recovery]:
    def turns(key: str) -> list[tuple[list[int], Turn]]:
        """Ids, and where the assistant speaks."""
        chats = [
            Conversation(
                (
                    {"role": "user", "content": r["prompt"]},
                    {"role": "assistant", "content": r[key]},
                ),
                where,
            )
            for r, where in records
        ]
        rendered = []
        for chat in chats:
            try:
                rendered.append(template.render(chat.messages))
            except ValueError as error:
                raise ValueError(f"{chat.where}: {error}") from error
        rows = template.tokenize([text for text, _ in rendered], [spans for _, spans in rendered])
        return [(ids, turn) for ids, [turn] in rows]

    out = []
    late = template.tokenizer(
        [separator + r["refusal"].strip() for r, _ in records], add_special_tokens=False
    )["input_ids"]
    both = zip(turns("answer"), turns("refusal"), late, records, strict=True)
    for (a, said), (r, turn), late_ids, (_, where) in both:
        answer, refusal = a[said.content : said.stop], r[turn.content : turn.stop]
        ending = r[turn.stop : turn.end]
        out.append(_Recovery(r[: turn.content], answer, refusal + ending, late_ids + ending, where))
        if not answer or not refusal:
            raise ValueError(
                f"{where}: the chat template leaves nothing of the answer or of the refusal"
            )
    return out
