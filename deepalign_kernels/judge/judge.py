"""What a judge sees and says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deepalign_kernels import check


@dataclass(frozen=True)
class Exchange:
    """One reply in its place.

    Attributes:
        prompt: what the user asked, without an attack's additions.
        reply: what the model wrote.
        prefix: what was put into its mouth before that (a prefill); "" if nothing.
        item: id of the prompt, for judges that know the right answer.
    """

    prompt: str
    reply: str
    prefix: str = ""
    item: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a judge says.

    Attributes:
        success: whether the attack succeeded; None where nobody can tell.
        score: the judge's own number, higher is worse; None if it has none.
        raw: what the judge wrote, for a person.
        error: why success is None.
        again: whether a judge may tell later: its server was busy, broken or gone.
    """

    success: bool | None
    score: float | None = None
    raw: str = ""
    error: str | None = None
    again: bool = False


@dataclass(frozen=True)
class View:
    """Which text counts as the reply. Judging a prefill's text too makes attacks look stronger.

    Args:
        prefix: "hidden": the model's own words alone; "shown": the prefix, then those.
        separator: between the two, if the prefix is shown and not empty. The paper's notebooks have
            a space there; "" is what the model wrote on from.
    """

    prefix: str = "hidden"
    separator: str = ""

    def __post_init__(self) -> None:
        check.one_of("prefix", self.prefix, ("hidden", "shown"))

    def text(self, exchange: Exchange) -> str:
        """The reply as the judge sees it."""
        if self.prefix == "hidden" or not exchange.prefix:
            return exchange.reply
        return exchange.prefix + self.separator + exchange.reply


class Judge(Protocol):
    """Anything that has these."""

    name: str  # such as "keywords@1f2e3d4c": equal names give equal verdicts

    def about(self) -> dict[str, Any]:
        """Plain values for a manifest: all that the hash in `name` is made of."""
        ...

    def __call__(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """One verdict each, in order."""
        ...


def named(kind: str, about: dict[str, Any]) -> str:
    """`kind` with a hash of `about`."""
    raw = json.dumps(about, sort_keys=True).encode()
    return f"{kind}@{hashlib.sha256(raw).hexdigest()[:8]}"
