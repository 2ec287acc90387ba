"""`deepalign attack`: attacks on a model or a server into a folder, judged, with tables."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepalign_kernels import check
from deepalign_kernels.attack.calibration import read_labels
from deepalign_kernels.attack.config import (
    attacks_of,
    for_server,
    judge_of,
    local_engine,
    near,
    with_state,
)
from deepalign_kernels.attack.self_check import self_check
from deepalign_kernels.attack.suite import STATE, evaluate, judge_run, plain, same_chunk, verify
from deepalign_kernels.attack.summary import summary
from deepalign_kernels.data.prompts import Prompt, data_hash, load_prompts, with_targets
from deepalign_kernels.judge import View
from deepalign_kernels.runs import paper
from deepalign_kernels.runs.store import (
    MANIFEST,
    MEASURED,
    Run,
    loaded,
    read_manifest,
    read_records,
    read_verdicts,
    write_private,
)
from deepalign_kernels.runs.told import told


@dataclass(frozen=True)
class Options:
    """Measure how robust a model's refusals are. A run that was stopped goes on where it was.

    Attributes:
        data: prompts: .csv, .jsonl, .json, .parquet or .txt of a published set or your own.
        out: folder of the run; records with texts in it can be read by you alone.
        model: folder or name of a model, or its name on the server.
        server: address of an OpenAI-compatible server, such as http://127.0.0.1:8000; replies come
            from it, and attacks that need the weights are refused.
        send: what goes to the server: ids, text or chat.
        tokenizer: folder of the tokenizer, if it is not the model's.
        suite: quick, paper, one attack's name, or a YAML file with attacks by name; fine-tuning
            needs settings, so a file.
        format: of the data, if it is not to be told from its columns.
        targets: .json of prompt id -> what an answer begins with, for searches: HarmBench's
            harmbench_targets_text.json. Comes before a column `target` of the data.
        limit: only the first so many prompts; 0 takes all.
        judge: judges: keywords[:LIST], classifier:FOLDER:LABEL, judgezoo:NAME, score:MODEL,
            guard:MODEL, yes_no:MODEL:TEMPLATE, harmful_response:MODEL:TEMPLATE.
        judge_sees: whether judges see what was put into the model's mouth: hidden or shown.
        separator: between that and the reply, if it is shown.
        calibration: .csv or .jsonl with key and label of replies of the run: rates corrected for
            the judges' errors on these.
        mode: exact (a reply depends on its prompt alone) or fast.
        dtype: of the weights, such as bfloat16; auto takes the checkpoint's.
        device: cpu or cuda; "" takes a GPU if there is one.
        batch_size: rows at once in mode fast.
        system: system prompt; none is sent without it.
        chat: template, or plain for base models.
        samples: replies per prompt and setting.
        max_new_tokens: of replies; 0 leaves each attack its own.
        seed: of the run.
        chunk: prompts that are computed and written together; a run goes on with the same number.
        self_check: before the run, ask so many of its requests in mode exact and in mode fast; how
            many replies differ stands in manifest, summary and report.
        verify: replay so many random rows of a finished run and compare.
        paper: print the paper's numbers beside: initial or augmented (Llama-2-7B-Chat, HEx-PHI).
        title: of the model in tables and figures; without it the name of its folder.
        show_text: print prompts and replies of successes.
    """

    data: str
    out: str
    model: str
    server: str = ""
    send: str = "ids"
    tokenizer: str = ""
    suite: str = "quick"
    format: str = "auto"
    targets: str = ""
    limit: int = 0
    judge: tuple[str, ...] = ("keywords",)
    judge_sees: str = "hidden"
    separator: str = ""
    calibration: str = ""
    mode: str = "fast"
    dtype: str = "auto"
    device: str = ""
    batch_size: int = 64
    system: str | None = None
    chat: str = "template"
    samples: int = 1
    max_new_tokens: int = 0
    seed: int = 0
    chunk: int = 8
    self_check: int = 0
    verify: int = 0
    paper: str = ""
    title: str = ""
    show_text: bool = False


def run(options: Options) -> int:
    """Attack, judge, print; 1 if nothing could be scored, or `verify` finds a difference
    or nothing to compare."""
    if options.paper and options.paper not in paper.MODELS:
        raise near("paper", options.paper, paper.MODELS)
    check.count("chunk", options.chunk, 1)
    check.count("self_check", options.self_check, 0)
    if options.self_check and options.server:
        raise ValueError("self_check: a server has no mode exact; give a local model")
    labels = read_labels(options.calibration) if options.calibration else {}
    prompts = load_prompts(options.data, options.format)[: options.limit or None]
    if options.targets:
        prompts, lacking = with_targets(prompts, options.targets)
        if lacking:
            _say(f"{lacking} of {len(prompts)} prompts have no target in {options.targets}")
    attacks = attacks_of(options.suite, _shared(options))
    judges = [judge_of(j, View(options.judge_sees, options.separator)) for j in options.judge]
    folder, engine = Path(options.out), _engine(options)
    attacks, left_out, measured = _possible(options, engine, attacks)
    if not options.verify:  # which computes everything anew
        attacks = {name: with_state(a, str(folder / STATE)) for name, a in attacks.items()}
    about = _manifest(options, engine, attacks, prompts)
    about |= left_out
    with Run(folder, about, may_lack=("chunk",)) as opened:
        same_chunk(opened, attacks, prompts, options.chunk)
        if options.self_check:
            measured["self_check"] = _self_check(opened, options, engine, attacks, prompts)
        for entry, value in measured.items():
            opened.measured(entry, value)
        for line in told(read_manifest(folder)):
            _say(line)
        if options.verify:
            compared, wrong = verify(
                opened, engine, attacks, prompts, options.verify, chunk=options.chunk,
                seed=options.seed,
            )  # fmt: skip
            found = f"{len(wrong)} differ" if wrong else "no difference"
            print("\n".join([*wrong, f"{compared} rows replayed: {found}"]))
            if not compared:
                _say(f"error: {folder} has no finished rows of this suite: nothing was verified")
            return 1 if wrong or not compared else 0
        evaluate(opened, engine, attacks, prompts, chunk=options.chunk, say=_say)
        records = loaded(read_records(folder))
        about = json.dumps({j.name: j.about() for j in judges}, indent=1)
        write_private(folder / "judges.json", about + "\n")
        judge_run(opened, judges, records=records, say=_say)
    text = summary(folder, model=options.paper, records=records, labels=labels)
    write_private(folder / "summary.txt", text + "\n")
    print(text)
    if options.show_text:
        _show(folder)
    if any(v.data["success"] is not None for v in read_verdicts(folder)):
        return 0
    _say("error: nothing could be scored; the reasons are counted above")
    return 1


def _possible(
    options: Options, engine: Any, attacks: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, list[str]], dict[str, Any]]:
    """(attacks that the engine is enough for, names of the others by entry of the manifest, what
    was measured of the engine to know)."""
    left_out, measured = {}, {}
    if options.server:
        attacks, left_out["left_out"] = for_server(options.suite, attacks)
    if options.server and any(a.continues for a in attacks.values()):
        known = _known(Path(options.out), "continues")
        found = engine.continues() if known is None else known
        if options.send == "chat":
            measured["continues"] = found
        if found is False:
            attacks, left_out["not_continued"] = for_server(options.suite, attacks, "continues")
    return attacks, {entry: names for entry, names in left_out.items() if names}, measured


def _known(folder: Path, entry: str) -> Any:
    """What a run found out before it was stopped; None if there is none, or it did not."""
    there = (folder / MANIFEST).is_file()
    return read_manifest(folder).get(MEASURED, {}).get(entry) if there else None


def _self_check(
    run: Run, options: Options, engine: Any, attacks: dict[str, Any], prompts: list[Prompt]
) -> dict[str, int]:
    known = _known(run.folder, "self_check")
    if known and known["asked"] == options.self_check:
        return known
    return self_check(
        engine, attacks, prompts, options.self_check, chunk=options.chunk, seed=options.seed
    )


def _shared(options: Options) -> dict[str, Any]:
    names = ("system", "chat", "samples", "seed")
    out = {name: getattr(options, name) for name in names}
    return out | ({"max_new_tokens": options.max_new_tokens} if options.max_new_tokens else {})


def _engine(options: Options) -> Any:
    if not options.server:
        return local_engine(
            options.model, mode=options.mode, dtype=options.dtype, device=options.device,
            batch_size=options.batch_size,
        )  # fmt: skip
    from transformers import AutoTokenizer

    from deepalign_kernels.generate.server import ServerEngine

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.model)
    return ServerEngine(options.server, options.model, tokenizer, send=options.send)


def _manifest(
    options: Options, engine: Any, attacks: dict[str, Any], prompts: list[Prompt]
) -> dict[str, Any]:
    from deepalign_kernels.fingerprint import model_hash

    template = getattr(engine.tokenizer, "chat_template", None)
    if options.chat == "template" and template:
        probe = [{"role": "user", "content": "PROMPT"}]
        if options.system is not None:
            probe.insert(0, {"role": "system", "content": options.system})
        rendered = engine.tokenizer.apply_chat_template(
            probe, tokenize=False, add_generation_prompt=True
        )
    else:
        rendered = "PROMPT\n\n"
    return ({"title": options.title} if options.title else {}) | {
        "engine": engine.about(),
        "weights": model_hash(engine.model) if hasattr(engine, "model") else None,
        "template": rendered,
        "attacks": {name: plain(a) for name, a in attacks.items()},
        "data": {"hash": data_hash(prompts), "prompts": len(prompts)},
        "seed": options.seed,
        "chunk": options.chunk,  # units of another size are other units, with the same records
    }


def _show(folder: Path) -> None:
    good = {v.data["of"] for v in read_verdicts(folder) if v.data["success"]}
    for record in read_records(folder, "sample"):
        if record.key in good:
            print(f"\n{record.name} {dict(record.cell)} {record.item}\n{_text(record)}")


def _text(record: Any) -> str:
    return "\n".join(f"{name}: {value}" for name, value in record.text.items())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
