"""`python -m deepalign_kernels.train --model PATH --data FILE.jsonl --output DIR ...`

What `deepalign train` does, with no more than the standard library for its options.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING
from typing import Any

import deepalign_kernels.quiet  # noqa: F401
from deepalign_kernels.train.command import SEVERAL, Option, options_of, run


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m deepalign_kernels.train",
        description="Constrained fine-tuning of a causal language model (arXiv 2406.05946).",
    )
    for option in options_of():
        _add(out, option)
    return out


def _add(out: argparse.ArgumentParser, option: Option) -> None:
    shown = "" if option.default in (MISSING, None) else f" (default {option.default!r})"
    more: dict[str, Any] = {"help": (option.text + shown).replace("%", "%%")}
    if option.default is MISSING:
        more["required"] = True
    else:
        more["default"] = option.default
    if option.kind is bool:
        more["action"] = argparse.BooleanOptionalAction
    elif option.allowed:
        more["choices"] = option.allowed
    else:
        more["type"] = option.kind
    if option.name == "adam_betas":
        more |= {"nargs": 2, "type": float, "metavar": ("B1", "B2")}
    if option.name in SEVERAL:
        more["nargs"] = "+"
    if option.name == "resume":
        more |= {"nargs": "?", "const": "yes"}
    out.add_argument(f"--{option.name.replace('_', '-')}", **more)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parser().parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
