"""The processor time that a part of a program takes."""

from __future__ import annotations

import time
from typing import Any


class Clocked:
    """`target` with the processor time that its `name` took, in `spent`."""

    def __init__(self, target: Any, name: str) -> None:
        self._target, self._name, self.spent = target, name, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def _run(self, *args: Any) -> Any:
        begun = time.process_time()
        try:
            return getattr(self._target, self._name)(*args)
        finally:
            self.spent += time.process_time() - begun

    def generate(self, *args: Any) -> Any:
        """Of an engine."""
        return self._run(*args)

    def __call__(self, *args: Any) -> Any:
        """Of a judge."""
        return self._run(*args)
