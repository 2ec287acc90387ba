"""`deepalign analyze` beside scripts that take a whole softmax: seconds, MiB beyond the models.

    whole     every position of every sequence through both heads and a log-softmax in fp32, as the
              paper's published script does it, of which 20 positions are kept
    careful   sequences cut behind position 20, those 20 rows of the logits alone
    ours      deepalign_kernels.analyze.profile

All three give KL both ways, Jensen-Shannon, entropies, log-probabilities and agreement; ours gives
ranks, margins and gradient norms of the head as well. `--model` names a model; without it a Llama
with random weights and a vocabulary of `--vocab` is taken.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import machine
from deepalign_kernels import _memory
from deepalign_kernels.analyze import Pair, profile

CONTEXT, KEPT = 40, 20
MIB = 1 << 20


def models(path: str | None, vocab: int, hidden: int, layers: int) -> tuple[Any, Any]:
    """A model and one a little way from it, both in fp32."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if path:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        heads = hidden // 64
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden * 11 // 4,
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
            )
        )  # fmt: skip
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p), alpha=0.02 * float(p.std()))
    return model.eval(), other.eval()


def draw(vocab: int, answers: int, length: int) -> list[Pair]:
    """Random contexts and answers; a script of the first kind reads the answers whole."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab, (answers, CONTEXT + length), generator=generator).tolist()
    return [Pair(tuple(x[:CONTEXT]), tuple(x[CONTEXT:])) for x in ids]


@torch.no_grad()
def script(model: Any, base: Any, pairs: Sequence[Pair], batch: int, careful: bool) -> Tensor:
    """KL(model || base) [N, 20], with the other quantities computed beside it."""
    out = []
    for a in range(0, len(pairs), batch):
        rows = torch.tensor([[*p.context, *p.answer] for p in pairs[a : a + batch]])
        at = slice(CONTEXT - 1, CONTEXT - 1 + KEPT)
        target = rows[:, CONTEXT : CONTEXT + KEPT, None]
        if careful:
            ids = rows[:, : CONTEXT + KEPT - 1]
            p, q = (m(ids, logits_to_keep=KEPT).logits.float().log_softmax(-1)
                    for m in (model, base))  # fmt: skip
        else:
            p, q = (m(rows).logits.float().log_softmax(-1) for m in (model, base))
            p, q = p[:, at], q[:, at]
        kl = (p.exp() * (p - q)).sum(-1)
        _ = (q.exp() * (q - p)).sum(-1), -(p.exp() * p).sum(-1), -(q.exp() * q).sum(-1)
        mix = ((p.exp() + q.exp()) / 2).log()
        _ = ((p.exp() * (p - mix)).sum(-1) + (q.exp() * (q - mix)).sum(-1)) / 2
        _ = p.gather(-1, target), q.gather(-1, target), p.argmax(-1) == q.argmax(-1)
        out.append(kl)
    return torch.cat(out)


def measured(call: Callable[[], Any], laps: int) -> tuple[Any, float, float, float]:
    """(result, seconds and seconds of processors of the fastest of some laps, MiB at the peak)."""
    result, allocated = _memory.measure(call)
    seconds, busy = [], []
    for _ in range(laps):
        begun, used = time.perf_counter(), time.process_time()
        call()
        seconds.append(time.perf_counter() - begun)
        busy.append(time.process_time() - used)
    return result, min(seconds), min(busy), allocated.peak / MIB


def command(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks profile", description=__doc__)
    parser.add_argument("--model", help="folder of a model; default: random weights")
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--answers", type=int, default=16)
    parser.add_argument("--length", type=int, default=216, help="tokens of an answer")
    parser.add_argument("--batch", type=int, default=16, help="sequences at a time in the scripts")
    parser.add_argument("--laps", type=int, default=3)
    parser.add_argument("--only-ours", action="store_true", help="where whole logits do not fit")
    parser.add_argument("--out", help="JSON file")
    options = parser.parse_args(argv)
    model, base = models(options.model, options.vocab, options.hidden, options.layers)
    vocab = model.config.vocab_size
    pairs = draw(vocab, options.answers, options.length)
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: profile(model, base, None, pairs, positions=KEPT)
    }
    if not options.only_ours:
        for name in ("careful", "whole"):
            calls[name] = lambda name=name: script(
                model, base, pairs, options.batch, name == "careful"
            )
    rows, kl = {}, None
    for name, call in calls.items():
        result, seconds, busy, mib = measured(call, options.laps)
        found = torch.from_numpy(result.kl_model_base) if name == "ours" else result
        kl = found if kl is None else kl
        gap = float((found - kl).abs().max())
        rows[name] = {
            "seconds": seconds,
            "cpu_seconds": busy,
            "MiB": mib,
            "largest difference of KL, nats": gap,
        }
        about = f"{seconds:8.2f} s, {busy:8.2f} s of processors, {mib:6.0f} MiB"
        print(f"{name:8} {about}   KL differs by at most {gap:.1e} nats")
    if options.out:
        about = {**vars(options), "vocab": vocab, "machine": machine.describe("cpu")}
        pathlib.Path(options.out).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return 0
