"""How far a long piece of work is: told by what does it, heard by what shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[float], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def told(done: float, total: float) -> None:
    """`done` of `total` of the work at hand is behind us; nothing if nobody listens."""
    if (listener := _listener.get()) is not None:
        listener(done / total)


@contextmanager
def heard(listener: Listener) -> Iterator[None]:
    """`listener` gets what is told inside, a share in [0, 1]."""
    kept = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(kept)


@contextmanager
def part(begin: float, end: float) -> Iterator[None]:
    """What is told inside is a part of the work at hand, from share `begin` of it to `end`."""
    outer = _listener.get()
    if outer is None:
        yield
        return
    with heard(lambda share: outer(begin + (end - begin) * share)):
        yield
