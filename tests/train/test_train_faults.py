"""What may befall a run at any moment: afterwards it ends with the weights of one that was left
alone, or says what is wrong and keeps its last good state."""

import os
import signal

import pytest
import torch
from tiny_chat import RECORDS, build_model, build_tokenizer
from train_runs import RUN, in_child, needs_optimizer, same_weights

from deepalign_kernels.train import TrainConfig, TrainingRun
from deepalign_kernels.train import folder as folders
from deepalign_kernels.train.checkpoint import checkpoints
from deepalign_kernels.train.optimizers import OPTIMIZERS

RECIPES = [
    (name, dtype, {})
    for name, kind in OPTIMIZERS.items()
    for dtype in (torch.float32, torch.bfloat16)
    if not kind.host and (dtype == torch.float32 or kind.keeps_small_steps)
]
RECIPES += [
    ("adamw", torch.float32, {"release_gradients": True}),
    ("adamw_bf16_sr", torch.bfloat16, {"release_gradients": True}),
    ("adamw", torch.float32, {"objective": "constrained", "autocast_dtype": "bfloat16"}),
    ("adamw", torch.float32, {"kl_coef": 0.5, "packing": True, "gradient_checkpointing": True}),
]
STEPS = {"max_steps": 5, "save_every": 1, "keep_checkpoints": 2, "learning_rate": 1e-2}


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_forward(trainer):
    """The second step of this process has begun."""
    calls = []

    def look(*_):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 2:
            kill()

    trainer.model.register_forward_hook(look)


def in_the_update(trainer):
    """Some parameters have moved, others have not."""
    real, calls = trainer._make_optimizer, []

    def make():
        real()
        step = trainer.optimizer.step

        def half(*args):
            calls.append(1)
            if len(calls) >= 2:
                for p in trainer.params[::2]:
                    p.data.add_(1.0)
                kill()
            return step(*args)

        trainer.optimizer.step = half

    trainer._make_optimizer = make


def in_a_file(trainer):
    """Half of a checkpoint is written."""
    real = torch.save

    def save(value, file):
        if value.get("step", 0) > 1:
            file.write(b"x" * 1000)
            file.flush()
            kill()
        real(value, file)

    folders.torch.save = save


def behind_the_file(trainer):
    """The new checkpoint has its name, the oldest one is not removed yet."""
    folders._sync_folder = lambda folder: len(checkpoints(folder)) > 2 and kill()


@pytest.mark.slow
@pytest.mark.parametrize("name, dtype, options", RECIPES, ids=str)
def test_a_recipe_that_is_killed_anywhere_ends_as_one_that_was_not(
    tmp_path, one_thread, name, dtype, options
):
    """SIGKILL in a forward, an update, a checkpoint and behind one; each resumes the one before."""
    needs_optimizer(name)

    def make(out):
        config = {**RUN, "objective": "sft", "optimizer": name, **STEPS, **options}
        model = build_model(0, attention_dropout=0.1).to(dtype)
        return TrainingRun(model, build_tokenizer(), TrainConfig(out, **config), RECORDS)

    whole = make(tmp_path / "whole")
    with torch.compiler.set_stance("force_eager"):
        whole.train()
        assert not same_weights(whole.model, build_model(0).to(dtype))
        newest = []
        for break_off in (in_a_file, in_the_update, behind_the_file, in_the_forward):
            trainer = make(tmp_path / "parts")

            def act(trainer=trainer, break_off=break_off):
                break_off(trainer)
                trainer.train(resume="auto")

            assert in_child(act)() == -signal.SIGKILL, break_off
            newest.append(checkpoints(tmp_path / "parts")[-1].name)
        again = make(tmp_path / "parts")
        again.train(resume=True)
    assert newest[0][-4:] == "1.pt" and newest[-1][-4:] == "4.pt"
    assert same_weights(again.model, whole.model)
