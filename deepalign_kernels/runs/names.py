"""What a model is called in tables and figures."""

from __future__ import annotations

import re
from pathlib import PurePath

# Names of folders that say nothing: the trainer writes its model to OUT/model.
_GENERAL = re.compile(r"model|final|adapter|merged|checkpoint-\d+")


def title_of(path: str) -> str:
    """The last part of a path or hub name, the part before it too where the last says nothing."""
    parts = [p for p in PurePath(path).parts if p not in ("/", ".", "..")]
    if not parts:
        return path
    if len(parts) == 1 or not _GENERAL.fullmatch(parts[-1]):
        return parts[-1]
    return parts[-2] if parts[-1] == "model" else "/".join(parts[-2:])
