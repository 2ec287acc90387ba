"""Attacks and judges by name, from a suite, a YAML file or a word on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from deepalign_kernels.attack.attack import Asking
from deepalign_kernels.attack.compose import Compose
from deepalign_kernels.attack.decoding import Decoding
from deepalign_kernels.attack.gcg import GCG
from deepalign_kernels.attack.prefill import Direct, Insertion, Prefill, RankAssisted
from deepalign_kernels.attack.random_search import RandomSearch
from deepalign_kernels.generate.server import BEGINS_ANEW
from deepalign_kernels.judge import Judge, Keywords, View

ATTACKS: dict[str, type] = {
    a.name: a for a in (Direct, Prefill, Insertion, RankAssisted, Decoding, GCG, RandomSearch)
}
TRAINING = ("finetune", "worst_case")  # in attack/finetune.py, which needs the trainer
SUITES: dict[str, dict[str, Any]] = {
    "quick": {
        "direct": {},
        "prefill": {},
        "decoding": {
            "temperatures": [0.5, 1.0],
            "top_ks": [5, 50],
            "top_ps": [0.5, 0.9],
            "max_new_tokens": 128,
        },
    },
    "paper": {
        "direct": {},
        "prefill": {},
        "insertion": {},
        "rank_assisted": {},
        "decoding": {},
        "gcg": {"universal": True, "train": 50},
        "random_search": {"transfer": True},
    },
}


def near(what: str, name: str, known: Any) -> ValueError:
    """An error that names the nearest of the known names."""
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"
    return ValueError(f"{what}: {name!r} is unknown; {hint}")


def attack_of(spec: Mapping[str, Any], shared: Mapping[str, Any], where: str) -> Any:
    """An attack from its settings: {"attack": name, ...}, or {"first": ..., "then": ...}.

    Args:
        spec: the settings, as in YAML.
        shared: settings of `Asking` that hold where the spec has none.
        where: for messages.

    Raises:
        ValueError: an unknown attack or setting (the nearest is named), a bad value.
    """
    spec = dict(spec)
    if "first" in spec or "then" in spec:
        if set(spec) != {"first", "then"}:
            raise ValueError(f"{where}: expected first and then alone, got {', '.join(spec)}")
        first, then = (attack_of(spec[k], shared, f"{where}.{k}") for k in ("first", "then"))
        if not hasattr(first, "prepare"):
            raise ValueError(f"{where}.first: {first.name} leaves nothing for another attack")
        return Compose(first, then)
    name = spec.pop("attack", where)
    kinds: dict[str, type] = dict(ATTACKS)
    if name in TRAINING:
        from deepalign_kernels.attack import finetune

        kinds |= {"finetune": finetune.Finetune, "worst_case": finetune.WorstCase}
    if name not in kinds:
        raise near("attack", str(name), (*ATTACKS, *TRAINING))
    known = {f.name for f in fields(kinds[name])}
    for key in spec:
        if key not in known:
            raise near(where, key, sorted(known))
    values = {k: _tuples(v) for k, v in {**shared, **spec}.items()}
    if isinstance(values.get("judge"), str):
        values["judge"] = judge_of(values["judge"], View())
    try:
        return kinds[name](**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def attacks_of(suite: str, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Attacks by name: of a suite, of a YAML file {name: settings}, or one attack's defaults.

    Raises:
        ValueError: as `attack_of`; no such suite, or a file that is not as it should be.
    """
    if suite in SUITES:
        specs: Any = SUITES[suite]
    elif suite in ATTACKS:
        specs = {suite: {}}
    elif Path(suite).suffix in (".yaml", ".yml"):
        import yaml

        try:
            specs = yaml.safe_load(Path(suite).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"suite: {suite}: {error}") from error
        if not isinstance(specs, dict) or not specs:
            raise ValueError(f"suite: {suite}: expected attacks by name")
    elif suite in TRAINING:
        raise ValueError(
            f"suite: {suite!r} needs training data, so a YAML file: a line such as"
            f" `{suite}: {{attack: {suite}, data: train.jsonl}}`, then --suite FILE.yaml"
        )
    else:
        raise near("suite", suite, (*SUITES, *ATTACKS, "FILE.yaml"))
    out: dict[str, Any] = {}
    for name, spec in specs.items():
        if not isinstance(spec, (dict, type(None))):
            raise ValueError(f"{name}: expected settings, got {spec!r}")
        attack = attack_of(spec or {}, shared, str(name))
        out[str(name)] = attack
    return out


def for_server(
    suite: str, attacks: Mapping[str, Any], lacks: str = "local"
) -> tuple[dict[str, Any], list[str]]:
    """(attacks that a server is enough for, names of the others, which a suite leaves out).

    Args:
        suite: which they are of.
        attacks: by name.
        lacks: what an attack may need and the server has not: "local", the model itself, or
            "continues", replies that go on behind a given beginning.

    Raises:
        ValueError: one that needs it and was asked for by name or in a file.
    """
    left_out = [name for name, attack in attacks.items() if getattr(attack, lacks)]
    if left_out and suite not in SUITES:
        why = {
            "local": "needs a local model, got a server",
            "continues": f"places the beginning of a reply, and the server {BEGINS_ANEW}",
        }
        raise ValueError(f"suite: {left_out[0]} {why[lacks]}")
    return {name: attack for name, attack in attacks.items() if name not in left_out}, left_out


def with_state(attack: Any, folder: str) -> Any:
    """The attack with a place for the state of its search, if it searches."""
    if isinstance(attack, Compose):
        return Compose(with_state(attack.first, folder), with_state(attack.then, folder))
    return replace(attack, state=folder) if hasattr(attack, "state") else attack


def judge_of(word: str, view: View) -> Judge:
    """A judge from KIND or KIND:DETAILS.

    keywords[:LIST or FILE]; classifier:FOLDER:LABEL[,LABEL]; judgezoo:NAME; and a judging model,
    local or "http://...#MODEL": score:MODEL (rubric), guard:MODEL, yes_no:MODEL:TEMPLATE,
    harmful_response:MODEL:TEMPLATE.

    Raises:
        ValueError: an unknown kind, details that are missing.
    """
    kind, _, details = word.partition(":")
    if kind == "keywords":
        listed = details or "refusals"
        return Keywords(listed, case=listed == "gcg", view=view)
    kinds = ("keywords", "classifier", "judgezoo", "score", "guard", "yes_no", "harmful_response")
    if kind not in kinds:
        raise near("judge", kind, kinds)
    if not details:
        raise ValueError(f"judge: {kind} needs details, as in {kind}:NAME")
    if kind == "judgezoo":
        from deepalign_kernels.judge.classifier import JudgeZoo

        return JudgeZoo(details, view=view)
    if kind == "classifier":
        return _classifier(details, view)
    from deepalign_kernels.judge.prompted import Prompted

    model, template = details, None
    if kind in ("yes_no", "harmful_response"):
        model, _, template = details.rpartition(":")
        if not model:
            raise ValueError(f"judge: {kind}:MODEL:TEMPLATE, got {word!r}")
    if model.startswith("http"):
        from deepalign_kernels.generate.server import ServerEngine

        url, _, name = model.partition("#")
        return Prompted(
            ServerEngine(url, name, _Messages(), send="chat"), kind, template, view=view
        )
    return Prompted(local_engine(model, mode="exact"), kind, template, view=view)


class _Messages:
    """In the place of a tokenizer, for a server that renders messages itself."""

    def apply_chat_template(self, messages: Any, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [0]}


def _classifier(details: str, view: View) -> Judge:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from deepalign_kernels.fingerprint import model_hash
    from deepalign_kernels.judge.classifier import Classifier

    folder, _, labels = details.rpartition(":")
    if not folder:
        raise ValueError(f"judge: classifier:FOLDER:LABEL, got 'classifier:{details}'")
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bad = labels.split(",")
    return Classifier(model, tokenizer, bad, version=model_hash(model), view=view)


def local_engine(
    path: str, *, mode: str = "fast", dtype: str = "auto", device: str = "", batch_size: int = 64
) -> Any:
    """An engine over a model that transformers can load."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deepalign_kernels.generate.local import LocalEngine

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = model.to(place).eval()
    return LocalEngine(model, tokenizer, mode=mode, batch_size=batch_size, name=path)


def _tuples(value: Any) -> Any:
    """Lists of plain values as tuples, as the configs have them; records and dicts as they are."""
    if isinstance(value, list) and not any(isinstance(v, (dict, list)) for v in value):
        return tuple(value)
    return value


SHARED = tuple(f.name for f in fields(Asking))
