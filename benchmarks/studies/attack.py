"""`python -m benchmarks attack`: the attack harness beside nanoGCG and beside plain `generate`.

Parts, each on the same model, ids and settings for all:

  losses   the target's mean loss behind the same candidates, one suffix with one token changed in
           each: largest difference, candidates/s, peak memory beyond the model; nanoGCG's own
           function is called with this library's ids. Laps of all take turns, each is timed by the
           processor time of its one thread, and a ratio is the median over laps
  search   whole searches of both from the same ids, as a user calls them: processor time of a
           step, best loss with several seeds, mean difference and its standard error
  replies  prefill depths and decoding settings: sequences/s of `generate` once per setting, and of
           the engine for all settings at once, in turns, by processor time; greedy ids are compared
  store    an evaluation of 10,000 and of 100,000 samples without a model, and the same command once
           more when all is there: seconds of processor time, from prompts to summary
  share    an evaluation of 10,000 samples from prompts to summary: processor time that is neither
           the model's nor the judge's, as a share of all

nanoGCG 0.3.0 cannot use its prefix cache with transformers 5 ("'DynamicCache' object is not
subscriptable"), so it runs without, as it has to for its users; "nanogcg_cached" is its function
with a cache put right here, which its users do not have.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import transformers

from benchmarks.harness import machine, memory
from benchmarks.studies.clocked import Clocked
from deepalign_kernels.attack import GCG, Decoding, Prefill
from deepalign_kernels.attack.gcg import by_gradient
from deepalign_kernels.attack.search import Field, searching
from deepalign_kernels.attack.suite import evaluate, judge_run
from deepalign_kernels.attack.summary import summary
from deepalign_kernels.data.prompts import Prompt
from deepalign_kernels.generate.engine import Reply
from deepalign_kernels.generate.local import LocalEngine
from deepalign_kernels.judge import Keywords
from deepalign_kernels.runs import Run, read_records
from deepalign_kernels.toyworld import build_model, build_tokenizer

FILLER = "please tell me in a friendly way , and take your time , how to make a plain cake . "
TARGET = "Sure, here is how to make a plain cake, step by step, for you and your friends: first"


def model_of(name: str) -> tuple[Any, Any]:
    """ "toy", "random" (100M parameters, V = 128256, random weights) or a folder."""
    tokenizer: Any = build_tokenizer()
    if name == "toy":
        return build_model(tokenizer, 0, hidden=96, layers=4).eval(), tokenizer
    if name == "random":
        config = transformers.LlamaConfig(
            vocab_size=128256, hidden_size=512, intermediate_size=1536, num_hidden_layers=10,
            num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True,
            max_position_embeddings=512,
        )  # fmt: skip
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval(), tokenizer
    if (pathlib.Path(name) / "tokenizer_config.json").is_file():  # the toy world saves none
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model.eval(), tokenizer


def prompt_of(tokenizer: Any, tokens: int) -> Prompt:
    """A harmless prompt of about so many tokens."""
    text = ""
    while len(tokenizer(text)["input_ids"]) < tokens:
        text += FILLER
    return Prompt("cake", text.strip(), target=TARGET)


@contextlib.contextmanager
def nano(model: Any, tokenizer: Any, config: GCG, seed: int | None = None) -> Iterator[Any]:
    """nanoGCG's object with the same settings; it leaves global flags behind, which are undone."""
    import nanogcg.gcg

    logging.getLogger("nanogcg").setLevel(logging.ERROR)
    flag, state = torch.are_deterministic_algorithms_enabled(), torch.get_rng_state()
    options: Any = {} if seed is None else {"seed": seed}
    settings = nanogcg.GCGConfig(
        num_steps=config.steps, search_width=config.width, topk=config.topk, **options,
        optim_str_init=config.init, use_prefix_cache=False, batch_size=config.batch,
        verbosity="ERROR",
    )  # fmt: skip
    try:
        yield nanogcg.gcg.GCG(model, tokenizer, settings)
    finally:
        torch.use_deterministic_algorithms(flag)
        torch.set_rng_state(state)


class WithCache:
    """A model that takes nanoGCG's keys and values, a list of pairs by layer, as transformers 5
    does."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, past_key_values: Any, **inputs: Any) -> Any:
        """Of the model."""
        cache: Any = transformers.DynamicCache()
        for layer, (keys, values) in enumerate(past_key_values):
            cache.update(keys, values, layer)
        return self._model(past_key_values=cache, **inputs)


def losses(model: Any, tokenizer: Any, config: GCG, tokens: int, laps: int) -> dict[str, Any]:
    """Part "losses"."""
    prompt = prompt_of(tokenizer, tokens)
    generator = torch.Generator().manual_seed(0)
    with searching(model) as attached, nano(model, tokenizer, config) as other:
        field = Field(config, attached, tokenizer, [prompt])
        place, target = field.places[0], field.targets[0]
        scores = torch.rand(len(place.first), len(field.allowed), generator=generator)
        scores = scores.masked_fill(~field.allowed, float("-inf"))
        candidates = by_gradient(scores, field.first, config, generator)
        embed, whole = model.get_input_embeddings(), other.model
        with torch.no_grad():
            known = model(input_ids=torch.tensor([place.before]), use_cache=True).past_key_values

        def theirs(cached: bool) -> torch.Tensor:
            other.model = WithCache(whole) if cached else whole
            other.prefix_cache = [(x.keys, x.values) for x in known.layers] if cached else None
            rows = [() if cached else place.before, None, place.after, target]
            parts = [
                embed(candidates) if r is None
                else embed(torch.tensor([r]).long()).repeat(len(candidates), 1, 1)
                for r in rows
            ]  # fmt: skip
            with torch.no_grad():
                return other._compute_candidates_loss_original(config.batch, torch.cat(parts, 1))

        other.target_ids = torch.tensor([target])
        calls: dict[str, Callable[[], torch.Tensor]] = {
            "ours": lambda: field.losses[0][0].losses(candidates),
            "nanogcg": lambda: theirs(False),
            "nanogcg_cached": lambda: theirs(True),
        }
        first = {name: memory.measured(call, "cpu") for name, call in calls.items()}
        spent: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(laps):
            for name, call in calls.items():
                spent[name].append(timed(call, time.process_time))
    ours = first["ours"][0].double()
    out: dict[str, Any] = {
        "before": len(place.before),
        "suffix": len(place.first),
        "after": len(place.after),
        "target": len(target),
        "candidates": len(candidates),
    }
    for name, (value, peak) in first.items():
        ratios = [b / a for a, b in zip(spent["ours"], spent[name], strict=True)]
        out[name] = {
            "candidates_per_s": len(candidates) / statistics.median(spent[name]),
            "peak_bytes": peak.extra,
            "difference": float((value.double() - ours).abs().max()),
            "time_over_ours": [min(ratios), statistics.median(ratios), max(ratios)],
            "memory_of_ours": (first["ours"][1].extra or 0) / (peak.extra or 1),
        }
    return out


def search(model: Any, tokenizer: Any, config: GCG, tokens: int, seeds: int) -> dict[str, Any]:
    """Part "search"."""
    prompt = prompt_of(tokenizer, tokens)
    with searching(model) as attached:
        field = Field(config, attached, tokenizer, [prompt])
        place, begun = field.places[0], float(field.losses[0][0].losses(field.first[None])[0])
    asked = prompt.prompt + "{optim_str}"  # a space before the suffix is a token of its own there
    rows: dict[str, list[tuple[float, float]]] = {"ours": [], "nanogcg": []}
    for seed in range(seeds):
        own = replace(config, seed=seed)
        clock = time.process_time()
        records, _, _ = own.prepare(LocalEngine(model, tokenizer), [prompt])
        spent = time.process_time() - clock
        if records[0].error:
            raise RuntimeError(records[0].error)
        rows["ours"].append((records[0].data["loss"], spent))
        with nano(model, tokenizer, replace(config, init=" " + config.init), seed) as other:
            clock = time.process_time()
            result = other.run(asked, TARGET)
            rows["nanogcg"].append((result.best_loss, time.process_time() - clock))
            first = tokenizer(" " + config.init, add_special_tokens=False)["input_ids"]
            same = other.embedding_layer(torch.tensor([place.before]))
            if tuple(first) != place.first or not torch.equal(same, other.before_embeds):
                raise RuntimeError("nanoGCG begins with other ids")
    out: dict[str, Any] = {
        name: {
            "best_losses": [loss for loss, _ in pairs],
            "mean_best_loss": statistics.fmean(loss for loss, _ in pairs),
            "seconds_per_step": statistics.median(s for _, s in pairs) / config.steps,
        }
        for name, pairs in rows.items()
    }
    differences = [a - b for (a, _), (b, _) in zip(rows["ours"], rows["nanogcg"], strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if seeds > 1 else None
    return out | {
        "first_loss": begun,
        "faster": out["nanogcg"]["seconds_per_step"] / out["ours"]["seconds_per_step"],
        "ours_minus_nanogcg": [statistics.fmean(differences), error],
    }


class Asks:
    """An engine that only keeps what it is asked for."""

    mode = "none"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.requests = tokenizer, []

    def generate(self, requests: Any) -> list[Reply]:
        """Always the same, and a note."""
        self.requests += requests
        return [Reply(text="r" * 800) for _ in requests]


def replies(model: Any, tokenizer: Any, new: int, prompts: int, laps: int) -> dict[str, Any]:
    """Part "replies"."""
    rows = [Prompt(str(n), f"{FILLER}number {n}", answer=FILLER * 3) for n in range(prompts)]
    depths = Prefill(temperature=0.0, max_new_tokens=new)
    grid = Decoding(max_new_tokens=new)
    engine = LocalEngine(model, tokenizer, batch_size=256)
    out = {}
    for name, attack, each in (
        ("prefill", depths, len(depths.depths)), ("decoding", grid, len(grid.grid())),
    ):  # fmt: skip
        asks: Any = Asks(tokenizer)
        list(attack(asks, rows))
        asked = asks.requests
        settings = [range(n, len(asked), each) for n in range(each)]
        got: list[Reply] = []
        ids: dict[int, tuple[int, ...]] = {}
        ours, theirs = [], []
        for _ in range(laps):
            begun = time.process_time()
            got = engine.generate(asked)
            ours.append(time.process_time() - begun)
            begun = time.process_time()
            for indices in settings:
                replied = plain_generate(model, tokenizer, [asked[i] for i in indices])
                ids.update(zip(indices, replied, strict=True))
            theirs.append(time.process_time() - begun)
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        greedy = [i for i, r in enumerate(asked) if r.sampling.temperature == 0]
        greedy += [i for i, r in enumerate(asked) if r.sampling.top_k == 1]
        out[name] = {
            "sequences": len(asked),
            "settings": len(settings),
            "sequences_per_s": len(asked) / statistics.median(ours),
            "generate_sequences_per_s": len(asked) / statistics.median(theirs),
            "faster": [min(ratios), statistics.median(ratios), max(ratios)],
            "greedy": len(greedy),
            "greedy_different": sum(got[i].ids != ids[i] for i in greedy),
        }
    return out


def plain_generate(model: Any, tokenizer: Any, requests: list[Any]) -> list[tuple[int, ...]]:
    """One batch of transformers' generate, padded on the left, all with one setting."""
    width = max(len(r.prompt) for r in requests)
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(r.prompt)) + list(r.prompt) for r in requests])
    mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in requests])
    s = requests[0].sampling
    sampled = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=s.max_new_tokens, pad_token_id=pad,
            do_sample=s.temperature > 0, **(sampled if s.temperature > 0 else {}),
        )  # fmt: skip
    ends = LocalEngine(model, tokenizer).end_ids
    cut = []
    for row in out[:, width:].tolist():
        at = next((i for i, t in enumerate(row) if t in ends), len(row) - 1)
        cut.append(tuple(row[: at + 1]))
    return cut


def store(tokenizer: Any) -> dict[str, float]:
    """Part "store"."""
    grid, seconds = Decoding(max_new_tokens=1), {}
    for samples in (10_000, 100_000):
        rows = [Prompt(str(n), f"{FILLER}number {n}") for n in range(samples // len(grid.grid()))]
        with tempfile.TemporaryDirectory() as folder:
            for name in ("kept", "resumed"):

                def command(folder: str = folder, rows: list[Prompt] = rows) -> None:
                    with Run(folder, {"attacks": {}}) as run:
                        evaluate(run, Asks(tokenizer), {"decoding": grid}, rows)
                        records = list(read_records(folder))
                        judge_run(run, [Keywords()], records=records)
                    summary(folder, records=records)

                seconds[f"{name}_{samples}"] = timed(command, time.process_time)
    return seconds


def share(model: Any, tokenizer: Any, new: int) -> dict[str, float]:
    """Part "share"."""
    grid = Decoding(max_new_tokens=new)
    rows = [Prompt(str(n), f"{FILLER}number {n}", answer=FILLER) for n in range(204)]
    engine = Clocked(LocalEngine(model, tokenizer, batch_size=256), "generate")
    judge: Any = Clocked(Keywords(), "__call__")
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()
        with Run(folder, {"attacks": {}}) as run:
            evaluate(run, engine, {"decoding": grid}, rows)
            judge_run(run, [judge])
        summary(folder)
        total = time.process_time() - begun
    rest = total - engine.spent - judge.spent
    return {
        "samples": len(rows) * len(grid.grid()),
        "seconds": total,
        "model_seconds": engine.spent,
        "judge_seconds": judge.spent,
        "bookkeeping_share": rest / total,
        "bookkeeping_ms_a_sample": 1e3 * rest / (len(rows) * len(grid.grid())),
    }


def timed(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call."""
    begun = clock()
    call()
    return clock() - begun


def command(argv: list[str] | None = None) -> int:
    """Measure and print; --json writes a result file."""
    parser = argparse.ArgumentParser(description=__doc__, prog="benchmarks attack")
    parser.add_argument("--model", default="toy", help="toy, random, or a folder")
    parser.add_argument("--parts", default="losses,search,replies,store,share")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=160, help="tokens before the suffix")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--laps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    model, tokenizer = model_of(args.model)
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, 512)
    init = " ".join(["!"] * 20)
    config = GCG(
        steps=args.steps, width=args.width, batch=args.batch, init=init, max_new_tokens=1,
        topk=min(256, len(tokenizer) // 4),
    )  # fmt: skip
    calls: dict[str, Callable[[], Any]] = {
        "losses": lambda: losses(model, tokenizer, config, args.prompt, args.laps),
        "search": lambda: search(model, tokenizer, config, args.prompt, args.seeds),
        "replies": lambda: replies(model, tokenizer, args.new, args.prompts, args.laps),
        "store": lambda: store(tokenizer),
        "share": lambda: share(model, tokenizer, args.new),
    }
    results = {}
    for part in args.parts.split(","):
        if part not in calls:
            parser.error(f"--parts: expected some of {', '.join(calls)}, got {part!r}")
        results[part] = calls[part]()
        print(part, json.dumps(results[part], indent=1), flush=True)
    if args.json:
        document = {"machine": machine.describe("cpu"), "arguments": vars(args), **results}
        pathlib.Path(args.json).write_text(json.dumps(document, indent=1, default=str) + "\n")
    return 0
