"""The log's numbers sent to experiment trackers, through those of accelerate."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any


def names_of(report_to: str | None) -> list[str]:
    """The trackers that a text such as "tensorboard,wandb" names; none for None and "none".

    Raises:
        ValueError: one that accelerate does not know, or whose package is not installed.
    """
    names = [name.strip() for name in (report_to or "").split(",") if name.strip()]
    if not names or names == ["none"]:
        return []
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    except ImportError as error:
        raise ValueError(f"report_to: trackers need accelerate: {error}") from error
    there = [str(getattr(kind, "value", kind)) for kind in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            near = difflib.get_close_matches(name, LOGGER_TYPE_TO_CLASS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(there)}"
            raise ValueError(f"report_to: {name!r} is no tracker of accelerate; {hint}")
        own = LOGGER_TYPE_TO_CLASS[name].__module__ != "accelerate.tracking"  # registered there
        if name not in there and not own:
            raise ValueError(f"report_to: {name!r} is not installed")
    return names


class Trackers:
    """The trackers of one run, in the one process that writes.

    Args:
        report_to: see `names_of`.
        folder: of the run; its name is the run's, and what is written to disk goes into it.
        config: plain values, shown beside the run.
    """

    def __init__(self, report_to: str | None, folder: Path, config: dict[str, Any]) -> None:
        self._trackers: list[Any] = []
        if not (names := names_of(report_to)):
            return
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # its trackers ask it who writes
        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            project, more = os.environ.get(f"{name.upper()}_PROJECT", "deepalign"), {}
            if name in ("wandb", "trackio"):
                more["name"] = folder.resolve().name
            if kind.requires_logging_directory:
                project, more["logging_dir"] = name, str(folder)
            tracker = kind(project, **more)
            tracker.start()
            tracker.store_init_configuration(plain(config))
            self._trackers.append(tracker)

    def send(self, record: dict[str, Any]) -> None:
        """A line of the log about a step or an evaluation; others are passed over."""
        if not self._trackers or record["event"] not in ("step", "eval"):
            return
        values = numbers(record)
        for tracker in self._trackers:
            tracker.log(values, step=record["step"])

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """A line of the log as named numbers: `train/nll`, `eval/nll`, and of what an evaluation has by
    position `eval/nll_at/1` ... `eval/nll_at/rest`."""
    place = "train" if record["event"] == "step" else "eval"
    out: dict[str, float] = {}
    for name, value in record.items():
        if name in ("event", "step"):
            continue
        if isinstance(value, list):
            at = [*map(str, range(1, len(value))), "rest"]
            found = zip((f"{place}/{name}/{where}" for where in at), value, strict=True)
            out |= {key: x for key, x in found if x is not None}
        elif isinstance(value, (int, float)):
            out[f"{place}/{name}"] = value
    return out


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """Values that every tracker takes: texts where a value is neither a number nor a text."""
    fine = (bool, int, float, str)
    return {k: v if isinstance(v, fine) else str(v) for k, v in config.items()}
