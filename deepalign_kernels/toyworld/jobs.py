"""The demo's fine-tunings of one aligned model: independent of each other, so side by side.

A job runs on one thread wherever it runs, so its result does not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deepalign_kernels.analyze.dynamics import Dynamics
from deepalign_kernels.toyworld import claims
from deepalign_kernels.toyworld.judging import attack_success
from deepalign_kernels.toyworld.measure import compare, table_row
from deepalign_kernels.toyworld.stages import (
    ALL_TWO,
    PAPER,
    UNIFORM,
    Recipes,
    StepCallback,
    task_records,
    train_deep,
    train_stage,
)
from deepalign_kernels.toyworld.tokenizer import build_tokenizer
from deepalign_kernels.toyworld.world import World

ATTACKS = {
    claims.ATTACK_SFT: None,
    claims.ATTACK_PAPER: PAPER,
    claims.ATTACK_TWO: ALL_TWO,
    claims.ATTACK_UNIFORM: UNIFORM,
}
TASKS = {claims.TASK_SFT: None, claims.TASK_PAPER: PAPER}
NAMES = (claims.DEEP, *ATTACKS, *TASKS)  # rows of the table, in its order
LONGEST_FIRST = (claims.DEEP, *TASKS, *ATTACKS)  # so that no core is idle at the end


def slug(name: str) -> str:
    """A name for a folder."""
    return "-".join(re.findall(r"[0-9A-Za-z]+", name))


def attack_folder(runs: Path, name: str) -> Path:
    """Where the prefilling attack on a row of the table is kept."""
    return runs / f"prefill-{slug(name)}"


@dataclass(frozen=True)
class Job:
    """What one fine-tuning begins with."""

    name: str  # one of NAMES
    world: World
    recipes: Recipes
    models: bytes  # pickled: base and aligned. By value; a pool would share memory of its own
    out: Path  # folder for the trainer's log
    runs: Path  # folder for runs that the report reads


@dataclass(frozen=True)
class Outcome:
    """What one fine-tuning shows."""

    name: str
    row: dict[str, Any]  # of the table
    curve: list[tuple[int, float]]  # (step, attack success without prefill); attacks only
    kl: list[float]  # KL(model || base) by position; the deep model only
    trained: float  # seconds
    measured: float  # seconds


def run_jobs(jobs: Sequence[Job], workers: int) -> Iterator[Outcome]:
    """The outcome of each job, in their order as soon as it is there; bit for bit the same for any
    number of worker processes (1: none, all here)."""
    if workers == 1:
        yield from map(run_job, jobs)
        return
    # Spawned: a fork would inherit the locks of torch's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        queued = {
            name: pool.submit(run_job, job)
            for name in LONGEST_FIRST
            for job in jobs
            if job.name == name
        }
        try:
            for job in jobs:
                yield queued[job.name].result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # one that failed ends the others
            raise


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Threads wait for each other at matrices as small as these: on a busy machine of two cores,
    four steps of the base model took 3 s of processor time on one thread and 20 s on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def run_job(job: Job) -> Outcome:
    """Train and measure, on one thread."""
    base, aligned = pickle.loads(job.models)
    tokenizer, world, recipes = build_tokenizer(), job.world, job.recipes
    begun = time.perf_counter()
    curve, kl = [], []
    if job.name == claims.DEEP:
        model = train_deep(aligned, tokenizer, world, recipes, job.out)
    else:
        attack = job.name in ATTACKS
        recipe, beta = (
            (recipes.attack, ATTACKS[job.name]) if attack else (recipes.task, TASKS[job.name])
        )
        data = world.records("attack") if attack else task_records(world)
        watch = _watch(curve, job, aligned, recipe.steps) if attack else None
        model = train_stage(
            aligned, tokenizer, recipe, data, job.out, beta=beta, seed=world.seed, on_step=watch
        )
    trained = time.perf_counter()
    row = table_row(job.name, model, tokenizer, world, attack_folder(job.runs, job.name))
    if job.name == claims.DEEP:
        kl = compare(job.runs / "analysis-deep", job.name, model, base, tokenizer, world)
    return Outcome(job.name, row, curve, kl, trained - begun, time.perf_counter() - trained)


def _watch(
    points: list[tuple[int, float]], job: Job, aligned: PreTrainedModel, steps: int
) -> StepCallback:
    """Attack success without prefill now and, by the callback, at every fifth step; curves by
    position too."""
    tokenizer, world = build_tokenizer(), job.world
    probe = world.records("attack")[:32]
    folder = job.runs / f"dynamics-{NAMES.index(job.name)}"
    curves = Dynamics(aligned, tokenizer, probe, every=5, share=None, folder=folder, title=job.name)

    def look(model: PreTrainedModel, step: int) -> None:
        points.append((step, attack_success(model, tokenizer, world, depths=(0,))[0]))

    def on_step(model: PreTrainedModel, step: int) -> None:
        curves.step(model, step)
        if step % 5 == 0 or step == steps:
            look(model, step)

    look(aligned, 0)
    return on_step
