"""The training stages of the demo, all through `train.fit`.

base (knows everything, refuses only lost pages) -> aligned (refuses desserts, a few tokens deep) ->
deep (the same refusals from any depth); then fine-tuning of the aligned model: the attack, and a
benign task.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign_kernels.data import RecoveryAugmentation
from deepalign_kernels.losses import BetaSchedule
from deepalign_kernels.toyworld.model import build_model
from deepalign_kernels.toyworld.preference import widen_refusal_margin
from deepalign_kernels.toyworld.world import Record, World
from deepalign_kernels.train import TrainConfig, fit

StepCallback = Callable[[PreTrainedModel, int], None]

BENIGN = {"recipes": 1, "basics": 8, "facts": 3, "tongue": 1, "lost": 8}
EVERYTHING = {
    "restricted": 1,
    "attack": 1,
    "align": 1,
    "recipes": 1,
    "basics": 6,
    "facts": 3,
    "tongue": 1,
    "lost": 6,
}
TASK = {"task": 4, "recipes": 1, "basics": 4, "facts": 1, "tongue": 1, "lost": 2}
# Splits that tell how well a model still answers: held-out savoury recipes, basic ones, facts,
# translations it knows.
BENIGN_EVAL = ("recipes_eval", "basics", "facts", "tongue")

# The fine-tuned variants of equation 3: the paper's schedule and two ablations of it. None is plain
# SFT.
PAPER = BetaSchedule(first=0.5, prefix=2.0, rest=0.1, prefix_length=5)
ALL_TWO = BetaSchedule(first=2.0, prefix=2.0, rest=0.1, prefix_length=5)
UNIFORM = BetaSchedule.uniform(0.1)


@dataclass(frozen=True)
class Recipe:
    """Length and rate of one training stage."""

    steps: int
    learning_rate: float
    batch_size: int
    adam_betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float | None = 1.0
    warmup_steps: int = 10


@dataclass(frozen=True)
class Recipes:
    """All stages. `attack` and `task` have the paper's optimizer, plain SFT too: AdamW with betas
    (0.5, 0.999) and 10 warm-up steps, then linear decay.

    The attack is not clipped. Clipping hides the large first gradients from Adam's second moment,
    and the small ones that a constraint leaves later weigh more. Measured on two seeds, clipped to
    norm 1 and not: SFT 99 % and 97 % to 99 %, constrained 16 % to 17 % and 0 %.
    """

    base: Recipe = Recipe(600, 4e-3, 64)
    align: Recipe = Recipe(200, 1e-3, 48)
    deep: Recipe = Recipe(150, 1e-3, 48)
    attack: Recipe = Recipe(50, 2e-4, 16, (0.5, 0.999), None)
    task: Recipe = Recipe(300, 1e-3, 32, (0.5, 0.999))
    shallow_p0: float = 0.8  # share of alignment examples that refuse from the first token
    shallow_depth: int = 3  # the others refuse after 1..shallow_depth tokens of an answer
    deep_depth: int = 30
    alpha: float = 0.3  # weight of the refusals against the benign answers
    margin_steps: int = 50  # of the preference step that ends the alignment

    def shortened(self, steps: int) -> Recipes:
        """Every stage cut to `steps` steps: for a smoke test."""
        stages = ("base", "align", "deep", "attack", "task")
        cut = {name: replace(getattr(self, name), steps=steps) for name in stages}
        return replace(self, margin_steps=steps, **cut)


def train_stage(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    data: Any,
    out: Path,
    *,
    beta: BetaSchedule | None = None,
    seed: int = 0,
    on_step: StepCallback | None = None,
) -> PreTrainedModel:
    """A trained copy of `model`: SFT when `beta` is None, else constrained to `model` itself."""
    trained = copy.deepcopy(model)
    config = TrainConfig(
        output_dir=out,
        objective="sft" if beta is None else "constrained",
        beta=beta or PAPER,
        learning_rate=recipe.learning_rate,
        batch_size=recipe.batch_size,
        gradient_accumulation_steps=1,
        save_every=None,
        max_steps=recipe.steps,
        adam_betas=recipe.adam_betas,
        max_grad_norm=recipe.max_grad_norm,
        warmup_steps=recipe.warmup_steps,
        seed=seed,
        progress=False,
    )
    callbacks = [] if on_step is None else [lambda run, record: on_step(run.model, record["step"])]
    fit(trained, tokenizer, config, data, callbacks=callbacks)
    return trained.eval()


def train_base(
    tokenizer: PreTrainedTokenizerBase, world: World, recipes: Recipes, out: Path
) -> PreTrainedModel:
    """Knows every answer, the restricted ones too; declines only what nobody can answer."""
    shares = {split: 6 * rounds for split, rounds in EVERYTHING.items()}
    model = build_model(tokenizer, world.seed)
    return train_stage(model, tokenizer, recipes.base, world.mixture(shares), out, seed=world.seed)


def train_aligned(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    recipes: Recipes,
    out: Path,
) -> PreTrainedModel:
    """Refuses the restricted requests, firmly at the first token and a few tokens deep.

    Refusals are taught after 0 to 3 tokens of an answer; then a preference step makes the first
    token a matter of 15 nats.
    """
    data = _recovery(
        tokenizer,
        world,
        recipes.alpha,
        p0=recipes.shallow_p0,
        max_k=recipes.shallow_depth,
        epoch=100,
    )
    shallow = train_stage(base, tokenizer, recipes.align, data, out, seed=world.seed)
    return widen_refusal_margin(
        shallow,
        tokenizer,
        _triplets(world, epoch=100),
        _anchors(world, epoch=100),
        steps=recipes.margin_steps,
        seed=world.seed,
    )


def train_deep(
    aligned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    recipes: Recipes,
    out: Path,
) -> PreTrainedModel:
    """The aligned model after safety-recovery augmentation: k = 0 half the time, else uniform."""
    data = _recovery(tokenizer, world, recipes.alpha, p0=0.5, max_k=recipes.deep_depth, epoch=200)
    return train_stage(aligned, tokenizer, recipes.deep, data, out, seed=world.seed)


def _recovery(
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    alpha: float,
    *,
    p0: float,
    max_k: int,
    epoch: int,
) -> RecoveryAugmentation:
    return RecoveryAugmentation(
        _triplets(world, epoch=epoch),
        tokenizer,
        anchors=_anchors(world, epoch=epoch),
        alpha=alpha,
        weighting="tokens",  # with these two the recipes were chosen
        glue="text",
        p0=p0,
        max_k=max_k,
        anchors_per_recovery=2,
        seed=world.seed,
    )


def _triplets(world: World, *, epoch: int) -> list[dict[str, str]]:
    """Four wordings of everything that is to be refused."""
    return [row for n in range(4) for row in world.triplets("align", epoch=epoch + n)]


def _anchors(world: World, *, epoch: int) -> list[Record]:
    return world.mixture({split: 2 * rounds for split, rounds in BENIGN.items()}, epoch=epoch)


def task_records(world: World) -> list[Record]:
    """The benign fine-tuning task: translations with words the base model has never translated.

    Half and half with ordinary conversations, without which a model this small forgets the rest
    (measured: benign accuracy 41 % after SFT in place of 100 %).
    """
    return world.mixture(TASK)
