"""What an analysis allocates whatever the vocabulary and the data, and what curves during a
training take of it.

    python -m benchmarks analysis --out FILE [--model FOLDER]

Peaks are of torch's allocator, beyond both models. The training is of the toy world's model, by the
thin loop and by trl's trainer, and with `--model` of that one by the loop; times are of the
processor, as the machine may be shared.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness import machine, report
from benchmarks.studies.profile import CONTEXT, MIB, draw, measured, models
from deepalign_kernels.analyze import profile
from deepalign_kernels.analyze.dynamics import Dynamics

HIDDEN, LAYERS, ANSWERS = 640, 2, 16
VOCABS, POSITIONS = (32768, 262144), (20, 200)
RECORDS = pathlib.Path(__file__).resolve().parents[1] / "results"
STORED = "analysis-cpu-2core-2026-11-29.json"
PROFILES = {"SmolLM2-135M": "profile-smollm2-2026-11-29.json",
            "random weights, H = 512, 8 layers": "profile-128k-2026-11-29.json"}  # fmt: skip


def memory(vocab: int, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Peaks of an analysis of so many positions of each answer."""
    model, base = models(None, vocab, HIDDEN, LAYERS)
    out = []
    for positions in lengths:
        pairs = draw(vocab, ANSWERS, positions)
        call = functools.partial(profile, model, base, None, pairs, positions=positions)
        _, _, busy, mib = measured(call, 1)
        logits = 4 * ANSWERS * (CONTEXT + positions) * vocab / MIB
        out.append({"vocab": vocab, "positions": positions, "MiB": mib, "cpu_seconds": busy,
                    "logits MiB": logits})  # fmt: skip
    return out


class Timed(Dynamics):
    """With the processor time of its looks since training began."""

    busy = 0.0

    def begin(self) -> None:
        super().begin()
        self.busy = 0.0

    def look(self, model: Any, number: int) -> Any:
        begun = time.process_time()
        try:
            return super().look(model, number)
        finally:
            self.busy += time.process_time() - begun


def watched(way: str, path: str | None, steps: int, every: int, share: float | None) -> dict:
    """One training with its looks: steps, looks, part of the processor time that they took."""
    from deepalign_kernels.toyworld import World, build_tokenizer
    from deepalign_kernels.toyworld.model import build_model

    world, toy = World(0), build_tokenizer()
    probe, data = world.records("attack")[:32], world.records("align")
    if path:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        toy = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        probe = probe[:8]
    else:
        model = build_model(toy, 0)
    watch = Timed(model, toy, probe, every=every, share=share)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train = {"loop": _loop, "trl": _trl}[way]
        begun = time.process_time()
        train(model, toy, data, steps, watch, folder, 4 if path else 48)
        took = time.process_time() - begun
    return {
        "model": "SmolLM2-135M" if path else "toy world",
        "way": way,
        "steps": steps,
        "probe": len(probe),
        "every": every,
        "limit": share,
        "looks": len(watch.records) - 1,
        "share": watch.busy / took,
        "cpu_seconds": took,
    }


def _loop(
    model: Any, tokenizer: Any, data: Any, steps: int, watch: Timed, folder: str, batch: int
) -> None:
    from deepalign_kernels.train import TrainConfig, fit

    config = TrainConfig(
        folder, objective="sft", learning_rate=1e-4, max_steps=steps, batch_size=batch,
        gradient_accumulation_steps=1, save_every=None, progress=False,
    )  # fmt: skip
    watch.begin()
    fit(model, tokenizer, config, data, callbacks=[watch])


def _trl(
    model: Any, tokenizer: Any, data: Any, steps: int, watch: Timed, folder: str, batch: int
) -> None:
    from datasets import Dataset

    from deepalign_kernels.trl import ConstrainedSFTConfig, ConstrainedSFTTrainer

    config = ConstrainedSFTConfig(
        folder, per_device_train_batch_size=batch, max_steps=steps, learning_rate=1e-4,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, bf16=False,
    )  # fmt: skip
    rows = Dataset.from_list(list(data))
    trainer = ConstrainedSFTTrainer(
        model, config, train_dataset=rows, processing_class=tokenizer,
        callbacks=[watch.for_trainer()],
    )  # fmt: skip
    trainer.train()


def values(document: dict[str, Any] | None = None) -> dict[str, str]:
    """What the page's template asks for."""
    found = document or json.loads((RECORDS / STORED).read_text())
    head = ["vocabulary", "positions of each answer", "MiB beyond the models",
            "one model's logits, MiB", "processor seconds"]  # fmt: skip
    lines = [
        [str(r["vocab"]), str(r["positions"]), f"{r['MiB']:.0f}", f"{r['logits MiB']:.0f}",
         f"{r['cpu_seconds']:.1f}"]
        for r in found["memory"]
    ]  # fmt: skip
    rows, ways = found["dynamics"], {"loop": "thin loop", "trl": "trl"}
    told = ["model", "trainer", "steps", "answers looked at", "limit", "looks", "of the time, %"]
    looks = [
        [r["model"], ways[r["way"]], str(r["steps"]), str(r["probe"]),
         "none" if r["limit"] is None else f"{100 * r['limit']:g} %", str(r["looks"]),
         f"{100 * r['share']:.1f}"]
        for r in rows
    ]  # fmt: skip
    limited = [100 * r["share"] for r in rows if r["limit"] is not None]
    peaks = [r["MiB"] for r in found["memory"]]
    return {
        "memory": report.table(head, lines, markdown=True),
        "answers": str(ANSWERS),
        "hidden": str(HIDDEN),
        "context": str(CONTEXT),
        "least": f"{min(peaks):.0f}",
        "most": f"{max(peaks):.0f}",
        "logits": f"{max(r['logits MiB'] for r in found['memory']) / 1024:.1f}",
        "dynamics": report.table(told, looks, markdown=True),
        "largest": f"{max(limited):.1f}",
        "machine": report.machine_text({"packages": {}, **found["machine"]}),
        "scripts": _scripts(),
        "file": STORED,
    }


def _scripts() -> str:
    """The stored runs of `python -m benchmarks profile`."""
    ways = ("ours", "careful", "whole")
    lines = []
    for name, file in PROFILES.items():
        d = json.loads((RECORDS / file).read_text())
        rows = d["rows"]
        shown = []
        for way in ways:
            busy, mib = rows[way]["cpu_seconds"], rows[way]["MiB"]
            shown.append(f"{busy:.1f} s, {mib:.0f} MiB")
        lines.append([f"{name}, V = {d['vocab']}, {d['answers']} answers", *shown])
    return report.table(["model", *ways], lines, markdown=True)


def command(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks analysis",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="folder of a model that is trained with looks as well")
    parser.add_argument("--steps", type=int, default=150, help="of the toy world's trainings")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file")
    parser.add_argument("--only", choices=("memory", "dynamics"), help="this half alone")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = json.loads(options.out.read_text()) if options.out.is_file() else {}
    about = machine.describe("cpu")  # before this run's own file makes the tree dirty

    def keep(name: str, row: dict[str, Any]) -> None:
        print(row, flush=True)
        found.setdefault(name, []).append(row)
        found["machine"] = about
        options.out.write_text(json.dumps(found, indent=1) + "\n")

    if options.only != "dynamics":
        found["memory"] = []
        for vocab in VOCABS:
            for row in memory(vocab, POSITIONS):
                keep("memory", row)
    if options.only != "memory":
        found["dynamics"] = []
        calls = [("loop", None, options.steps, 5, 0.05), ("loop", None, options.steps, 5, None),
                 ("trl", None, options.steps, 5, 0.05)]  # fmt: skip
        if options.model:
            calls.append(("loop", options.model, 24, 4, 0.05))
        for call in calls:
            keep("dynamics", watched(*call))
    return 0
