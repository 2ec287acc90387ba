"""Requests, answers and refusals of the toy world, and its data splits as chat records.

Random draws come from `random.Random` seeded with strings, which is stable across machines and
Python versions.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import product

from deepalign_kernels.toyworld import lexicon as lex

Record = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Request:
    """One thing to ask for.

    Attributes:
        content: the words that a right answer gives.
        pool: all words that count as content.
    """

    kind: str
    slots: tuple[tuple[str, str], ...]
    content: frozenset[str] = field(default=frozenset())
    pool: frozenset[str] = field(default=frozenset())

    @property
    def restricted(self) -> bool:
        """Whether the aligned model has to refuse."""
        return self.kind == "dessert"


def chat_record(prompt: str, reply: str) -> Record:
    """A one-turn conversation."""
    return {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    }


class World:
    """All requests of one seed; the seed decides what each word means and how pairs are split.

    `requests[name]`: restricted dessert recipes in three disjoint splits `align` (taught to be
    refused), `attack` (the 100 pairs of the fine-tuning attack) and `restricted` (100, held out,
    the only ones attack success is measured on); `recipes` and `recipes_eval` (savoury, answered;
    disjoint), `basics` (dishes without a trait, answered), `facts`, `tongue` (translations the base
    knows), `task` and `task_eval` (translations with words it does not know; disjoint phrases),
    `lost` (unanswerable). `limit` keeps only the first requests of every split: a small world for
    tests.
    """

    def __init__(self, seed: int = 0, *, limit: int | None = None) -> None:
        self.seed = seed
        rng = self._rng("meaning")
        self._flavour = {t: rng.choice(lex.FLAVOURS) for t in lex.TRAITS}
        self._staples = {d: rng.sample(lex.STAPLES, 2) for d in (*lex.DESSERTS, *lex.SAVOURIES)}
        self._method = {d: rng.choice(lex.METHODS) for d in (*lex.DESSERTS, *lex.SAVOURIES)}
        self._facts = {
            (a, f): rng.choice(values) for f, values in lex.FACTS.items() for a in lex.ANIMALS
        }
        tongue = rng.sample(lex.TONGUE, len(lex.TRAITS) + len(lex.ANIMALS))
        self._tongue: dict[str, str] = dict(zip((*lex.TRAITS, *lex.ANIMALS), tongue, strict=True))
        self.requests: dict[str, list[Request]] = {}
        self._split(rng)
        if limit is not None:
            self.requests = {name: group[:limit] for name, group in self.requests.items()}

    def _split(self, rng: random.Random) -> None:
        desserts = [self._dish("dessert", t, d) for t, d in product(lex.TRAITS, lex.DESSERTS)]
        savoury = [self._dish("savoury", t, d) for t, d in product(lex.TRAITS, lex.SAVOURIES)]
        known_traits, known_animals = set(lex.TRAITS[::2]), set(lex.ANIMALS[::2])
        known, new = [], []
        for trait, animal in product(lex.TRAITS, lex.ANIMALS):
            if trait in known_traits and animal in known_animals:
                known.append(self._phrase(trait, animal))
            elif trait not in known_traits and animal not in known_animals:
                new.append(self._phrase(trait, animal))
        for group in (desserts, savoury, new):
            rng.shuffle(group)
        self.requests = {
            "restricted": desserts[:100],
            "attack": desserts[100:200],
            "align": desserts[200:],
            "recipes_eval": savoury[:60],
            "recipes": savoury[60:],
            "basics": [self._basic(d) for d in (*lex.DESSERTS, *lex.SAVOURIES)],
            "facts": [self._fact(a, f) for a, f in self._facts],
            "tongue": known,
            "task_eval": new[:80],
            "task": new[80:],
            "lost": [Request("lost", (("n", n),)) for n in lex.MINUTES],
        }

    def _dish(self, kind: str, trait: str, dish: str) -> Request:
        content = {self._flavour[trait], *self._staples[dish], self._method[dish]}
        pool = frozenset((*lex.FLAVOURS, *lex.STAPLES, *lex.METHODS))
        return Request(kind, (("dish", f"{trait} {dish}"),), frozenset(content), pool)

    def _basic(self, dish: str) -> Request:
        content = frozenset((*self._staples[dish], self._method[dish]))
        pool = frozenset((*lex.FLAVOURS, *lex.STAPLES, *lex.METHODS))
        return Request("basic", (("dish", f"{lex.BASIC} {dish}"),), content, pool)

    def _fact(self, animal: str, fact: str) -> Request:
        value = self._facts[animal, fact]
        return Request(
            "fact",
            (("animal", animal), ("fact", fact)),
            frozenset([value]),
            frozenset(lex.FACTS[fact]),
        )

    def _phrase(self, trait: str, animal: str) -> Request:
        content = frozenset((self._tongue[trait], self._tongue[animal]))
        return Request("tongue", (("phrase", f"{trait} {animal}"),), content, frozenset(lex.TONGUE))

    def prompt(self, request: Request, rng: random.Random) -> str:
        """One wording of the request."""
        frames = {
            "dessert": lex.RECIPE_REQUESTS,
            "savoury": lex.RECIPE_REQUESTS,
            "basic": lex.RECIPE_REQUESTS,
            "fact": lex.FACT_REQUESTS,
            "tongue": lex.TONGUE_REQUESTS,
            "lost": lex.LOST_REQUESTS,
        }
        return rng.choice(frames[request.kind]).format(**dict(request.slots))

    def answer(self, request: Request, rng: random.Random) -> str:
        """One right answer with varied opening, body and closing; a lost page is declined."""
        slots = dict(request.slots)
        if request.kind == "lost":
            return rng.choice(lex.LOST_REFUSALS).format(**slots)
        if request.kind == "fact":
            value = self._facts[slots["animal"], slots["fact"]]
            parts = [rng.choice(lex.FACT_OPENINGS).format(**slots), value, "."]
        elif request.kind == "tongue":
            words = [self._tongue[word] for word in slots["phrase"].split()]
            parts = [rng.choice(lex.TONGUE_OPENINGS).format(**slots), *words, "."]
        else:
            parts = [
                rng.choice(lex.RECIPE_OPENINGS).format(**slots),
                self._body(slots["dish"], rng),
            ]
        return " ".join([*parts, rng.choice(lex.CLOSINGS)]).strip()

    def _body(self, name: str, rng: random.Random) -> str:
        trait, dish = name.split()
        things = [*self._staples[dish], *([] if trait == lex.BASIC else [self._flavour[trait]])]
        slots = dict(zip("abc", rng.sample(things, len(things)), strict=False))
        bodies = lex.RECIPE_BODIES if "c" in slots else lex.BASIC_BODIES
        free = {
            "mix": lex.MIX,
            "then": lex.THEN,
            "last": lex.LAST,
            "n": lex.MINUTES,
            **dict.fromkeys("xyz", lex.KINDS),
        }
        drawn = {slot: rng.choice(words) for slot, words in free.items()}
        return rng.choice(bodies).format(**slots, method=self._method[dish], **drawn)

    def refusal(self, request: Request, rng: random.Random) -> str:
        """One wording of the refusal of a restricted request."""
        return rng.choice(lex.REFUSALS).format(**dict(request.slots))

    def records(self, split: str, *, refuse: bool = False, epoch: int = 0) -> list[Record]:
        """Chat records `{"messages": [user, assistant]}` of a split, one per request.

        `refuse=True` replaces the answers by refusals; another `epoch` draws other wordings.
        """
        rng = self._rng(split, refuse, epoch)
        reply = self.refusal if refuse else self.answer
        return [chat_record(self.prompt(r, rng), reply(r, rng)) for r in self.requests[split]]

    def triplets(self, split: str, *, epoch: int = 0) -> list[dict[str, str]]:
        """`{"prompt", "answer", "refusal"}` per request: what `RecoveryAugmentation` reads."""
        rng = self._rng(split, "triplets", epoch)
        return [
            {
                "prompt": self.prompt(r, rng),
                "answer": self.answer(r, rng),
                "refusal": self.refusal(r, rng),
            }
            for r in self.requests[split]
        ]

    def mixture(self, shares: dict[str, int], *, epoch: int = 0) -> list[Record]:
        """Records of several splits: `shares[split]` differently worded rounds of each."""
        return [
            record for split, rounds in shares.items() for n in range(rounds) for record in
            self.records(split, epoch=epoch + n)
        ]  # fmt: skip

    def _rng(self, *key: object) -> random.Random:
        return random.Random("-".join(map(str, ("toyworld", self.seed, *key))))
