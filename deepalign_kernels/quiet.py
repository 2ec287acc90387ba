"""Importing this leaves out what other packages log while a model is loaded and no user can act on.
For programs that print for people, the command line and the demo; a library must not do it.

transformers imports torchao wherever that is installed, and torchao warns of each of its kernels
that this machine cannot load, and lets torch warn of how it registers its own types.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

LEFT_OUT = {"torchao": "Failed to load", "torch.utils._pytree": "Enum subclass"}  # logger: words


def _without(words: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: words not in record.getMessage()


for _name, _words in LEFT_OUT.items():
    logging.getLogger(_name).addFilter(_without(_words))
