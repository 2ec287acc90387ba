"""Prompts for evaluation: from a file of one of the known sets, or of one's own.

Nothing ships with the project: prompts of the published sets are gated or not harmless, and users
bring their own copies. The format is told from the header; what is not understood is refused with
the columns that were seen.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepalign_kernels.data.reading import read_jsonl

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One thing to ask a model.

    Attributes:
        id: stable name: the set's own id, else a hash of the text; unique in its file.
        prompt: the user's turn, with its context in front if the set has one.
        answer: a given answer that a prefilling attack takes tokens from, or None.
        target: what an answer begins with that a search tries to make likely, or None.
        category: of the set, or "".
        benign: whether a good model answers it (sets for over-refusal).
        suffix: what an attack adds behind the prompt, with a space between.
    """

    id: str
    prompt: str
    answer: str | None = None
    target: str | None = None
    category: str = ""
    benign: bool = False
    suffix: str = ""

    @property
    def asked(self) -> str:
        """The user's turn as it goes to the model."""
        return f"{self.prompt} {self.suffix}" if self.suffix else self.prompt


def _text(row: Row, name: str) -> str:
    """What must be text; None as text would be the prompt "None"."""
    if not isinstance(value := row[name], str):
        got = "null" if value is None else type(value).__name__
        raise ValueError(f"{name}: expected text, got {got}")
    return value


def _plain(row: Row, text: str, **more: Any) -> Prompt:
    return Prompt(id="", prompt=_text(row, text), **more)


def _optional(row: Row, name: str) -> str | None:
    return str(row[name]) if row.get(name) not in (None, "") else None


def _harmbench(row: Row) -> Prompt:
    """Contextual behaviours have their context in front."""
    parts = [row.get("ContextString") or "", _text(row, "Behavior")]
    text = "\n\n---\n\n".join(p for p in parts if p)
    category = row.get("SemanticCategory") or row.get("Category") or ""
    return Prompt(str(row["BehaviorID"]), text, category=category)


def _jailbreakbench(row: Row) -> Prompt:
    goal = _text(row, "Goal")
    return Prompt(
        str(row["Index"]), goal, target=_optional(row, "Target"), category=row["Category"]
    )


def _messages(row: Row) -> Prompt:
    """A user turn, and an answer if the conversation has one."""
    turns = row["messages"]
    if other := {str(t["role"]) for t in turns} - {"user", "assistant"}:
        raise ValueError(
            f"a turn of {sorted(other)[0][:20]!r}: expected user and assistant alone; one system"
            " prompt for all goes into --system"
        )
    texts = [_text(t, "content") for t in turns if t["role"] == "user"]
    answers = [_text(t, "content") for t in turns if t["role"] == "assistant"]
    if len(texts) != 1 or len(answers) > 1:
        raise ValueError("expected one user turn and at most one assistant turn")
    return Prompt(str(row.get("id", "")), texts[0], answer=answers[0] if answers else None)


def _own(row: Row) -> Prompt:
    return Prompt(
        id=str(row.get("id") or ""),
        prompt=_text(row, "prompt"),
        answer=_optional(row, "answer"),
        target=_optional(row, "target"),
        category=str(row.get("category") or ""),
        benign=str(row.get("benign", "")).lower() in ("1", "true", "yes"),
    )


@dataclass(frozen=True)
class Format:
    """Columns a file must have, and what a row is made into."""

    columns: frozenset[str]
    read: Callable[[Row], Prompt]
    about: str


def _format(columns: str, read: Callable[[Row], Prompt], about: str) -> Format:
    return Format(frozenset(columns.split()), read, about)


# From the narrowest to the widest: the first whose columns are all there is the file's.
FORMATS: dict[str, Format] = {
    "harmbench": _format(
        "Behavior BehaviorID",
        _harmbench,
        "harmbench_behaviors_text_*.csv of github.com/centerforaisafety/HarmBench",
    ),
    "jailbreakbench": _format(
        "Index Goal Target Behavior Category",
        _jailbreakbench,
        "JailbreakBench/JBB-Behaviors on the Hugging Face Hub, split harmful or benign",
    ),
    "advbench": _format(
        "goal target",
        lambda r: _plain(r, "goal", target=_optional(r, "target")),
        "harmful_behaviors.csv of github.com/llm-attacks/llm-attacks",
    ),
    "strongreject": _format(
        "forbidden_prompt category",
        lambda r: _plain(r, "forbidden_prompt", category=str(r["category"])),
        "strongreject_dataset.csv of github.com/dsbowen/strong_reject",
    ),
    "xstest": _format(
        "prompt type label",
        lambda r: _plain(r, "prompt", category=str(r["type"]), benign=r["label"] == "safe"),
        "xstest_prompts.csv of github.com/paul-rottger/xstest",
    ),
    "or-bench": _format(
        "prompt category",
        lambda r: replace(_own(r), benign=True),
        "bench-llm/or-bench on the Hugging Face Hub (gated); say format='or-bench'",
    ),
    "hex-phi": _format(
        "instruction category",
        lambda r: _plain(r, "instruction", category=str(r["category"])),
        "LLM-Tuning-Safety/HEx-PHI on the Hugging Face Hub (gated), as JSONL with instruction and"
        " category",
    ),
    "messages": _format(
        "messages",
        _messages,
        "chat records; Harmful HEx-PHI is gated: Unispac/shallow-vs-deep-safety-alignment-dataset"
        " on the Hugging Face Hub",
    ),
    "headerless": _format(
        "",
        lambda r: _plain(r, "line"),
        "a CSV without a header, a prompt a line: category_*.csv of LLM-Tuning-Safety/HEx-PHI",
    ),
    "own": _format("prompt", _own, "your own: prompt; if you like id, answer, target, category"),
    "malicious-instruct": _format(
        "", lambda r: _plain(r, "line"), "MaliciousInstruct.txt of github.com/Princeton-SysML"
    ),
}

NEVER_GUESSED = ("or-bench",)  # columns that could be anybody's


def load_prompts(path: str | Path, format: str = "auto") -> list[Prompt]:
    """The prompts of a file, all of them and in order, duplicates too.

    Args:
        path: .csv or .tsv with a header, .jsonl (objects, or lists of messages), .json (a list),
            .parquet, or .txt with a prompt a line.
        format: a name of FORMATS, or "auto": told from the columns.

    Raises:
        ValueError: no such file (where it can be had is said, if `format` is named); columns of no
            known set; an empty prompt; an id that is there twice with different prompts; nothing in
            it. With file and row.
    """
    path = Path(path)
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format: expected 'auto' or one of {', '.join(FORMATS)}, got {format!r}")
    if not path.is_file():
        known = FORMATS.get(format)
        hint = "" if known is None else (
            f"; {format} is {known.about}, with the columns {', '.join(sorted(known.columns))}"
        )  # fmt: skip
        raise ValueError(f"data: {path}: no such file{hint}")
    prompts: list[Prompt] = []
    for where, row in _rows(path, format):
        found = FORMATS[format] if format != "auto" else _told(row, where)
        if missing := sorted(found.columns - row.keys()):
            raise ValueError(f"{where}: no column {missing[0]!r}; got {_columns(row)}")
        try:
            prompt = found.read(row)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{where}: {error}") from error
        if not prompt.prompt.strip():
            raise ValueError(f"{where}: an empty prompt")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"data: {path}: no prompt in this file")
    return _with_ids(prompts, path)


def with_targets(prompts: list[Prompt], path: str | Path) -> tuple[list[Prompt], int]:
    """(the prompts with their targets from a file, how many it has none for).

    Args:
        prompts: of `load_prompts`; copies of a prompt share its target.
        path: .json with an object of prompt id -> target, as HarmBench's
            harmbench_targets_text.json; ids of other prompts are passed over.

    Raises:
        ValueError: no such file, another content, an empty target, not one of the prompts in it.
    """
    path = Path(path)
    try:
        known = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"targets: {path}: no readable JSON file: {error}") from error
    if not isinstance(known, dict) or not all(isinstance(t, str) for t in known.values()):
        raise ValueError(f"targets: {path}: expected one object, prompt id -> target, all texts")
    if empty := [name for name, target in known.items() if not target.strip()]:
        raise ValueError(f"targets: {path}: an empty target for {_columns(dict.fromkeys(empty))}")
    names = [known.get(p.id, known.get(p.id.partition("#")[0])) for p in prompts]
    found = [p if t is None else replace(p, target=t) for p, t in zip(prompts, names, strict=True)]
    if names.count(None) == len(names):
        raise ValueError(
            f"targets: {path}: of its {len(known)} ids none is that of a prompt; the first prompt's"
            f" is {prompts[0].id!r}"
        )
    return found, names.count(None)


def data_hash(prompts: list[Prompt]) -> str:
    """16 hex digits of all that is in the prompts, in order; for a manifest."""
    raw = json.dumps([vars(p) for p in prompts], sort_keys=True).encode()
    return hashlib.sha256(raw).hexdigest()[:16]


def _with_ids(prompts: list[Prompt], path: Path) -> list[Prompt]:
    """Ids where there are none; the second copy of a prompt gets "#2" behind its id."""
    out: list[Prompt] = []
    texts: dict[str, str] = {}
    copies: Counter[str] = Counter()
    for p in prompts:
        name = p.id or hashlib.sha256(p.prompt.encode()).hexdigest()[:12]
        if texts.setdefault(name, p.prompt) != p.prompt:
            raise ValueError(f"data: {path}: two different prompts with the id {name!r}")
        copies[name] += 1
        out.append(replace(p, id=name if copies[name] == 1 else f"{name}#{copies[name]}"))
    return out


def _told(row: Row, where: str) -> Format:
    if row.keys() == {"line"}:
        return FORMATS["malicious-instruct"]
    for name, known in FORMATS.items():
        if known.columns and known.columns <= row.keys() and name not in NEVER_GUESSED:
            return known
    sets = [f"{n} ({', '.join(sorted(f.columns))})" for n, f in FORMATS.items() if f.columns]
    raise ValueError(
        f"{where}: columns of no known set: {_columns(row)}. Known: {'; '.join(sets)}. A file with"
        " a prompt a line and no header: format='headerless'"
    )


def _columns(row: Row) -> str:
    """Names of columns; what is too long for a name may be a prompt, and is not shown."""
    return ", ".join(c if len(c) <= 30 else f"({len(c)} characters)" for c in row)


def _headerless(names: list[str] | None) -> bool:
    """Whether the first line of a CSV is no header: one cell, and it is a sentence."""
    return names is not None and len(names) == 1 and len(names[0].split()) >= 3


def _rows(path: Path, format: str) -> Iterator[tuple[str, Row]]:
    """("file:line", row) of any kind of file."""
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        if _first_character(path) == "[":
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}:{number}", _json_row(line, f"{path}:{number}")
        else:
            for row, where in read_jsonl("data", path):
                yield where, row
    elif kind in (".csv", ".tsv"):
        text = path.read_text(encoding="utf-8-sig")
        options: Any = {"delimiter": "\t" if kind == ".tsv" else ","}
        reader = csv.DictReader(io.StringIO(text), **options)
        if format == "headerless" or (format == "auto" and _headerless(_names(reader))):
            reader = csv.DictReader(io.StringIO(text), ["line"], **options)
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{where}: another number of columns than the header has")
            yield where, {k: v for k, v in row.items() if k}
    elif kind == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
        for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
            yield f"{path}[{number}]", _object(row, f"{path}[{number}]")
    elif kind == ".parquet":
        from pyarrow import parquet

        for number, row in enumerate(parquet.read_table(path).to_pylist()):
            yield f"{path}[{number}]", row
    elif kind == ".txt":
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        yield from ((f"{path}:{n}", {"line": line}) for n, line in enumerate(lines, 1) if line)
    else:
        raise ValueError(f"data: {path}: expected .csv, .tsv, .jsonl, .json, .parquet or .txt")


def _names(reader: csv.DictReader[str]) -> list[str] | None:
    return None if reader.fieldnames is None else list(reader.fieldnames)


def _first_character(path: Path) -> str:
    with path.open(encoding="utf-8-sig") as file:
        return next((line.strip()[0] for line in file if line.strip()), "")


def _json_row(line: str, where: str) -> Row:
    try:
        return _object(json.loads(line), where)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: broken JSON, column {error.colno}: {error.msg}") from error


def _object(row: Any, where: str) -> Row:
    """An object; a list of messages is one under the key "messages"."""
    if isinstance(row, list):
        return {"messages": row}
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object or a list of messages")
    return row
