"""`deepalign COMMAND [--config FILE] [options]`.

A room with a command has a module `command.py` with `Options`, a dataclass whose fields are the
options, and `run(options)`, which returns an exit status or None for 0. It stands here in one line
and is imported only when it is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

import deepalign_kernels.quiet  # noqa: F401
from deepalign_kernels import __version__

COMMANDS: dict[str, tuple[str, str]] = {  # name: (module, what it does)
    "analyze": ("deepalign_kernels.analyze.command", "where two models differ, by position"),
    "attack": ("deepalign_kernels.attack.command", "how robust a model's refusals are"),
    "compare": ("deepalign_kernels.attack.compare", "two runs of attack, cell by cell"),
    "data show": ("deepalign_kernels.data.command", "which tokens of data are trained, one by one"),
    "info": ("deepalign_kernels.cli.info", "versions; which backend runs each op, and why"),
    "plan": ("deepalign_kernels.plan.command", "which recipe of full fine-tuning fits a device"),
    "reference": (
        "deepalign_kernels.train.precompute",
        "what train needs of its reference, before",
    ),
    "report": ("deepalign_kernels.report.command", "one page from analyses, attacks, trainings"),
    "train": ("deepalign_kernels.train.command", "fine-tune a model with the constrained loss"),
}
INTERRUPTED = 130  # as a shell says it of SIGINT
WRONG = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    A `ValueError` or `OSError` of a command is a user's mistake: it is said in one line, status 2.

    Args:
        arguments: what follows `deepalign`; `sys.argv` by default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        print(__version__)
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    name = next((n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS), None)
    if name is None:
        print(f"error: {unknown(words)}", file=sys.stderr)
        return WRONG
    try:
        from deepalign_kernels.cli.options import parse

        command = importlib.import_module(COMMANDS[name][0])
        options = parse(command.Options, words[len(name.split()) :], f"deepalign {name}")
        return command.run(options) or 0
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("deepalign_kernels"):
            raise
        extra = 'pip install "deepalign_kernels[train,eval]" brings what the commands need'
        print(f"error: {error}; {extra}", file=sys.stderr)
        return WRONG
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: deepalign COMMAND [--config FILE.yaml] [options]", "", *lines, ""]
        + ["deepalign COMMAND --help lists the options of one; --version prints the version."]
    )


def unknown(words: Sequence[str]) -> str:
    inner = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if inner:
        return f"deepalign {words[0]}: say which of {', '.join(inner)}"
    near = difflib.get_close_matches(words[0], [n.split()[0] for n in COMMANDS], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(COMMANDS)}"
    return f"{words[0]!r} is no command; {hint}"


if __name__ == "__main__":
    raise SystemExit(main())
