"""Options of a command: a dataclass, filled from a YAML file and from flags by one parser.

A key of the file is written out as the flag of the same name in front of the user's own flags,
which therefore win. What is wrong in the file is said with its line.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro
import yaml

Options = TypeVar("Options")
POSITIONAL = tyro.conf.Positional[int].__metadata__  # type: ignore[attr-defined]


def parse(options: type[Options], arguments: Sequence[str], prog: str) -> Options:
    """An instance of `options`, a dataclass, from `arguments`; `--config FILE` may be among them.

    Raises:
        ValueError: the file cannot be read or has a key that is no option.
        SystemExit: a flag is wrong (said on stderr; status 2), or `--help` was asked for (0).
    """
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config", type=Path)
    known, rest = before.parse_known_args(list(arguments))
    if known.config is not None:
        flags = _flags(options)
        rest = [*_of_file(known.config, flags), *rest]
        options = _with_defaults(options, flags)
    about = (options.__doc__ or "").partition("\n\nAttributes:\n")[0]  # tyro lists those
    text = f"{about}\n\n--config FILE reads options from YAML; flags win."
    return tyro.cli(options, args=rest, prog=prog, description=text)


def _with_defaults(options: type[Options], flags: dict[str, Any]) -> type[Options]:
    """`options` with what the file said of positional fields as their defaults: words on the
    command line then win, as flags do."""
    placed = {
        name: kind for name, kind in flags.items() if isinstance(kind, _Placed) and kind.words
    }
    if not placed:
        return options
    body: dict[str, Any] = {"__annotations__": {}, "__doc__": options.__doc__}
    for name, kind in placed.items():
        field = name.replace("-", "_")
        body["__annotations__"][field] = kind.hint
        body[field] = tyro.cli(kind.hint, args=kind.words)
    made: Any = type(options.__name__, (options,), body)
    return dataclasses.dataclass(frozen=True, kw_only=True)(made)


@dataclasses.dataclass
class _Placed:
    """A field that stands on the command line without a flag, and what a file says of it."""

    hint: Any
    words: list[str] = dataclasses.field(default_factory=list)


def _flags(options: Any, prefix: str = "") -> dict[str, Any]:
    """The type of every option by its flag; a field that is a dataclass gives `--field.inner`."""
    out: dict[str, Any] = {}
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        name, kind = f"{prefix}{field.name.replace('_', '-')}", hints[field.name]
        if getattr(kind, "__metadata__", ()) == POSITIONAL:
            out[name] = _Placed(kind)
        else:
            out |= _flags(kind, f"{name}.") if dataclasses.is_dataclass(kind) else {name: kind}
    return out


def _of_file(file: Path, flags: dict[str, Any]) -> Iterator[str]:
    try:
        node = yaml.compose(file.read_text())
        value = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ValueError(f"--config {file}: {error.strerror or error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config {file}: not YAML: {error}") from None
    if node is None:
        return
    if not isinstance(value, dict):
        raise ValueError(f"--config {file}: a {type(value).__name__}, expected keys and values")
    yield from _of_mapping(file, node, value, "", flags)


def _of_mapping(
    file: Path, node: Any, value: dict[str, Any], prefix: str, flags: dict[str, Any]
) -> Iterator[str]:
    for (key_node, inner), (key, one) in zip(node.value, value.items(), strict=True):
        name = f"{prefix}{str(key).replace('_', '-')}"
        nested = isinstance(one, dict) and any(flag.startswith(f"{name}.") for flag in flags)
        if nested:
            yield from _of_mapping(file, inner, one, f"{name}.", flags)
        elif name in flags:
            yield from _written(name, one, flags)
        else:
            near = difflib.get_close_matches(name, flags, n=1)
            hint = f"; did you mean {near[0].replace('-', '_')!r}?" if near else ""
            line = key_node.start_mark.line + 1
            raise ValueError(f"{file}:{line}: {prefix}{key!s} is no option{hint}")


def _written(name: str, value: Any, flags: dict[str, Any]) -> list[str]:
    if isinstance(value, bool) and flags[name] is bool:
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, dict):
        value = [x for pair in value.items() for x in pair]
    values = value if isinstance(value, list) else [value]
    if isinstance(flags[name], _Placed):
        flags[name].words = [str(x) for x in values]
        return []
    return [f"--{name}", *(str(x) for x in values)]
