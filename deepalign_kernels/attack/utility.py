"""What a model is still good for: its greedy answers to benign prompts against given ones, or tasks
of lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import torch

from deepalign_kernels.attack.attack import Asking
from deepalign_kernels.attack.chat import Ask, Chat, begun, replies
from deepalign_kernels.data.prompts import Prompt
from deepalign_kernels.generate.engine import Engine
from deepalign_kernels.modes import evaluating
from deepalign_kernels.runs.record import Record


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def rouge1(reply: str, answer: str) -> float:
    """ROUGE-1 F1 in [0, 1]: words in common, each as often as both have it; no stemming."""
    got, wanted = Counter(words(reply)), Counter(words(answer))
    common = sum((got & wanted).values())
    return 2 * common / (sum(got.values()) + sum(wanted.values())) if common else 0.0


def utility(
    name: str,
    asking: Asking,
    engine: Engine,
    prompts: Sequence[Prompt],
    cell: Mapping[str, Any],
) -> list[Record]:
    """Records of kind "metric": "exact_match" and "rouge1", means over the prompts in [0, 1].

    Raises:
        ValueError: a prompt without an answer, or no prompt.
    """
    if not prompts:
        raise ValueError("utility: no prompt")
    if without := [p.id for p in prompts if p.answer is None]:
        raise ValueError(f"utility: no answer for {without[0]}")
    asking = replace(asking, temperature=0.0, top_k=0, top_p=1.0)
    chat = Chat(engine.tokenizer, asking)
    asks = [Ask(p, ids, {}, 0, error=why) for p, ids, why in begun(chat, prompts)]
    got = list(replies(name, asking, chat, engine, asks))
    pairs = [(r.text["reply"], p.answer or "") for r, p in zip(got, prompts, strict=True)]
    values = {
        "exact_match": [float(words(reply) == words(answer)) for reply, answer in pairs],
        "rouge1": [rouge1(reply, answer) for reply, answer in pairs],
    }
    failed = sum(r.error is not None for r in got)
    return [
        Record(
            "metric",
            name,
            {**cell, "metric": metric},
            data={"value": fmean(v), "n": len(v), "failed": failed},
        )
        for metric, v in values.items()
    ]


HARNESS = "lm_eval:"


def harness_utility(
    name: str, engine: Any, tasks: Sequence[Any], cell: Mapping[str, Any], limit: int | None = None
) -> list[Record]:
    """Records of kind "metric", one per number that lm-evaluation-harness gives for its `tasks`,
    such as "gsm8k/exact_match,strict-match".

    Args:
        name: of the attack.
        engine: local.
        tasks: names, or task configs.
        cell: of the records.
        limit: documents of each task; None takes all.

    Raises:
        ValueError: without the package `lm_eval`, or an unknown task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError("utility: lm_eval: needs `pip install lm_eval`") from error
    with evaluating(engine.model), _random_states():
        model: Any = HFLM(pretrained=engine.model, tokenizer=engine.tokenizer, batch_size=16)
        try:
            found: Any = simple_evaluate(model=model, tasks=list(tasks), limit=limit)
        except KeyError as error:
            raise ValueError(f"utility: lm_eval: {error}") from error
    return [
        Record(
            "metric",
            name,
            {**cell, "metric": f"{task}/{key.removesuffix(',none')}"},
            data={"value": float(value), "n": found["n-samples"][task]["effective"]},
        )
        for task, values in found["results"].items()
        for key, value in sorted(values.items())
        if isinstance(value, (int, float)) and "stderr" not in key and "," in key
    ]


@contextlib.contextmanager
def _random_states() -> Iterator[None]:
    """The harness seeds every generator of the process; afterwards they are as before."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
