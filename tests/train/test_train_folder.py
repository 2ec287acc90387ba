"""The folder of a run: what is in it is whole, right, and of one run; whatever happens."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from tiny_chat import RECORDS, build_model, build_tokenizer
from train_runs import RUN, Bigram, log_of

import deepalign_kernels as dak
from deepalign_kernels.train import Example, RecoveryAugmentation, TrainConfig, TrainingRun
from deepalign_kernels.train import folder as folders
from deepalign_kernels.train.checkpoint import checkpoints

ROWS = [Example((1, 2, 3, n), (-100, 2, 3, n), (0, 1, 2, 3)) for n in range(4, 12)]


def bigram_run(out, data=ROWS, callbacks=(), model=None, **options):
    """A run that takes milliseconds."""
    base = {**RUN, "objective": "sft", "head": "logits", "batch_size": 4, "max_steps": 6}
    base |= {"learning_rate": 0.1}
    config = TrainConfig(out, **{**base, **options})
    return TrainingRun(model or Bigram(), None, config, data, callbacks=callbacks)


def stop_at(step):
    def callback(run, record):
        if record["step"] == step:
            raise KeyboardInterrupt

    return callback


def stopped(out, at=3, **options):
    run = bigram_run(out, callbacks=[stop_at(at)], **options)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    return run


def names(out, pattern="checkpoint-*"):
    return sorted(path.name for path in out.glob(pattern))


def flip(path, where=0.5):
    """Eight bytes of a file become others."""
    content = bytearray(path.read_bytes())
    at = int(len(content) * where)
    content[at : at + 8] = bytes(255 - x for x in content[at : at + 8])
    path.write_bytes(content)


def test_a_run_saves_without_being_asked(tmp_path):
    config = TrainConfig(tmp_path, objective="sft", head="logits", epochs=2, progress=False)
    run = TrainingRun(Bigram(), None, config, ROWS)
    run.train()
    assert names(tmp_path) == ["checkpoint-0000002.pt"]


def test_two_runs_in_one_folder_are_refused(tmp_path):
    seen = []

    def second(run, record):
        with pytest.raises(ValueError, match="output_dir: another run is in"):
            bigram_run(tmp_path).train(resume="auto")
        seen.append(record["step"])

    bigram_run(tmp_path, callbacks=[second], max_steps=2).train()
    assert seen == [1, 2]
    assert [r["event"] for r in log_of(tmp_path)] == ["start", "ops", "step", "step", "end"]
    bigram_run(tmp_path, max_steps=2).train()  # the lock went with the run


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(ValueError, match="output_dir: expected a folder, .*out is a file"):
        bigram_run(tmp_path / "out").train()


def test_the_log_of_another_run_is_kept(tmp_path):
    for _ in range(3):
        bigram_run(tmp_path).train()
    assert names(tmp_path, "*.jsonl") == [
        "train_log-1.jsonl", "train_log-2.jsonl", "train_log.jsonl",
    ]  # fmt: skip
    first, last = (tmp_path / n for n in names(tmp_path, "*.jsonl")[::2])
    assert first.read_text().count("\n") == last.read_text().count("\n") == 9


@pytest.mark.parametrize("damage", ("torn", "flipped bytes", "empty"))
def test_a_torn_newest_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    whole = bigram_run(tmp_path / "whole")
    whole.train()
    stopped(tmp_path / "parts", at=5, save_every=2)
    assert names(tmp_path / "parts") == ["checkpoint-0000004.pt", "checkpoint-0000005.pt"]
    newest = tmp_path / "parts" / "checkpoint-0000005.pt"
    if damage == "flipped bytes":
        flip(newest)
        torch.load(newest, weights_only=True)  # torch alone would not have seen it
    else:
        newest.write_bytes(newest.read_bytes()[: 0 if damage == "empty" else 2000])
    again = bigram_run(tmp_path / "parts", save_every=2)
    with pytest.warns(UserWarning, match="checkpoint-0000005.pt is not a readable file of a run"):
        again.train(resume=True)
    assert torch.equal(again.model.table, whole.model.table)
    assert [r["step"] for r in log_of(tmp_path / "parts") if r["event"] == "step"] == [*range(1, 7)]
    flip(newest)
    older = tmp_path / "parts" / "checkpoint-0000006.pt"
    older.write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in checkpoints(tmp_path / "parts"):
            path.write_bytes(b"x")
        with pytest.raises(ValueError, match="resume: no checkpoint in .* can be read"):
            bigram_run(tmp_path / "parts", save_every=2).train(resume=True)


def test_resume_auto_goes_on_if_there_is_something(tmp_path):
    whole = bigram_run(tmp_path / "whole")
    whole.train(resume="auto")
    stopped(tmp_path / "parts")
    again = bigram_run(tmp_path / "parts")
    again.train(resume="auto")
    assert torch.equal(again.model.table, whole.model.table)
    assert "resume" in [r["event"] for r in log_of(tmp_path / "parts")]
    with pytest.raises(ValueError, match="resume: expected True, False or 'auto', got 'yes'"):
        again.train(resume="yes")


class Poisoned(Bigram):
    """Its gradient is NaN in one step."""

    def __init__(self, at):
        super().__init__()
        calls = iter(range(1, 100))
        self.table.register_hook(lambda g: g * float("nan") if next(calls) == at else g)


@pytest.mark.parametrize("at", (3, 4))
def test_what_is_not_finite_is_never_saved(tmp_path, at):
    """Also between two lines of the log, where the loop does not look."""
    run = bigram_run(tmp_path, model=Poisoned(at), save_every=1, log_every=6)
    with pytest.raises(FloatingPointError, match=f"step {at}: grad_norm is nan; .*, the last chec"):
        run.train()
    assert names(tmp_path) == [f"checkpoint-{n:07d}.pt" for n in (at - 2, at - 1)]
    for path in checkpoints(tmp_path):
        assert torch.load(path, weights_only=True)["model"]["table"].isfinite().all()
    again = bigram_run(tmp_path, save_every=1, log_every=6)
    again.train(resume=True)
    whole = bigram_run(tmp_path / "whole")
    whole.train()
    assert torch.equal(again.model.table, whole.model.table)


def test_weights_that_are_not_finite_are_not_saved_either(tmp_path):
    def spoil(run, record):
        if record["step"] == 3:
            with torch.no_grad():
                run.model.table[19, 19] = float("inf")  # no row of the data uses it

    with pytest.raises(FloatingPointError, match="step 4: a weight is nan"):
        bigram_run(tmp_path, callbacks=[spoil], save_every=2).train()
    assert names(tmp_path) == ["checkpoint-0000002.pt"]


def test_what_killed_writes_left_is_removed_and_nothing_else(tmp_path):
    rubble = [".checkpoint-0000003.pt.4711", ".reference-0123.pt.4711", ".train_log.jsonl.12"]
    others = [".checkpoint-notes", "checkpoint.pt.4711", ".lock"]
    for name in rubble + others:
        (tmp_path / name).write_text("x")
    bigram_run(tmp_path).train()
    there = {path.name for path in tmp_path.iterdir()}
    assert not there & set(rubble) and there >= set(others)


def test_a_full_disk_says_so_and_loses_nothing(tmp_path, monkeypatch):
    bigram_run(tmp_path / "a", save_every=2).train()
    before = names(tmp_path / "a")

    class Full:
        free = 100

    run = bigram_run(tmp_path / "b", save_every=2)
    real = folders.shutil.disk_usage
    usage = lambda path: Full if list(tmp_path.glob("b/checkpoint-*")) else real(path)  # noqa: E731
    monkeypatch.setattr(folders.shutil, "disk_usage", usage)
    with pytest.raises(OSError, match=r"no room for checkpoint-0000004.pt: it takes 0.0 MB, ") as e:
        run.train()
    assert e.value.errno == errno.ENOSPC and names(tmp_path / "b") == ["checkpoint-0000002.pt"]
    assert before == names(tmp_path / "a")
    monkeypatch.undo()

    def fills_up(value, file):  # others wrote meanwhile: the system says it, in the middle
        file.write(b"x" * 100)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders.torch, "save", fills_up)
    with pytest.raises(OSError, match="no room for checkpoint-0000004.pt"):
        bigram_run(tmp_path / "b", save_every=2).train(resume=True)
    assert names(tmp_path / "b", "*checkpoint*") == ["checkpoint-0000002.pt"]
    monkeypatch.undo()
    bigram_run(tmp_path / "b", save_every=2).train(resume=True)


def test_sigterm_is_a_checkpoint_and_a_clean_end(tmp_path):
    def terminate(run, record):
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    run = bigram_run(tmp_path / "parts", callbacks=[terminate])
    with pytest.raises(dak.train.Terminated):
        run.train()
    assert names(tmp_path / "parts") == ["checkpoint-0000003.pt"] and run.step == 3
    assert signal.getsignal(signal.SIGTERM) == before
    again = bigram_run(tmp_path / "parts")
    again.train(resume=True)
    whole = bigram_run(tmp_path / "whole")
    whole.train()
    assert torch.equal(again.model.table, whole.model.table)


CHILD = """
import sys
sys.path[:0] = {paths!r}
import test_train_folder as t
t.bigram_run(t.Path({out!r}), save_every=1, max_steps=400).train(resume="auto")
"""


def child(out):
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "support")]
    code = CHILD.format(paths=paths, out=str(out))
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_goes_on(tmp_path):
    """SIGKILL, mostly in the middle of writing a checkpoint, and again and again."""
    whole = bigram_run(tmp_path / "whole", max_steps=400)
    whole.train()
    out, seen = tmp_path / "parts", []
    for wait in (0.013, 0.15, 0.4):
        process = child(out)
        while not names(out) or names(out)[-1:] == seen[-1:]:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)
        time.sleep(wait)
        process.kill()
        process.communicate()
        seen += names(out)[-1:]
    assert len(set(seen)) == 3 and seen[-1] < "checkpoint-0000400.pt"
    process = child(out)
    assert process.wait(120) == 0, process.communicate()[1]
    state = torch.load(out / "checkpoint-0000400.pt", weights_only=True)
    assert torch.equal(state["model"]["table"], whole.model.table)
    assert not [n for n in names(out, ".*") if n != ".lock"]


def test_a_finished_run_goes_on_for_longer(tmp_path):
    """With rates that do not depend on the end; others say so."""
    options = {"lr_schedule": "constant", "warmup_steps": None, "save_every": 100}
    whole = bigram_run(tmp_path / "whole", max_steps=40, **options)
    whole.train()
    for steps in (15, 25, 40):
        run = bigram_run(tmp_path / "parts", max_steps=steps, **options | {"warmup_steps": 8})
        assert run.train(resume="auto").steps == steps
    assert torch.equal(run.model.table, whole.model.table) and whole.warmup_steps == 8
    assert [r["step"] for r in log_of(tmp_path / "parts") if r["event"] == "step"] == [
        *range(1, 41)
    ]
    with pytest.raises(ValueError, match="warmup_steps was 8, is 10"):
        bigram_run(tmp_path / "parts", max_steps=50, **options).train(resume=True)
    bigram_run(tmp_path / "linear", max_steps=3, save_every=3).train()
    with pytest.raises(ValueError, match="max_steps was 3, is 4.* lr_schedule='constant' can go"):
        bigram_run(tmp_path / "linear", max_steps=4).train(resume=True)


def test_changed_data_are_refused_by_name(tmp_path):
    stopped(tmp_path)

    def refused(why, **options):
        with pytest.raises(ValueError, match=why):
            bigram_run(tmp_path, **options).train(resume=True)

    moved = [Example(e.input_ids, e.labels, (0, 1, 2, 9), e.part, e.where) for e in ROWS]
    refused("other training data than data gives now: its positions changed", data=moved)
    refused("its tokens changed", data=[ROWS[0], *ROWS[2:], ROWS[1]])
    refused("its parts and their weights changed", data=Parts(0.2))
    refused("step_size was 4, is 8", gradient_accumulation_steps=2)
    refused("objective was 'sft', is 'dft'", objective="dft")
    refused("max_grad_norm was None, is 1.0", max_grad_norm=1.0)
    # Another cut of the same step is the same up to rounding.
    again = bigram_run(tmp_path, batch_size=2, gradient_accumulation_steps=2)
    again.train(resume=True)
    whole = bigram_run(tmp_path / "whole")
    whole.train()
    torch.testing.assert_close(again.model.table, whole.model.table, rtol=1e-5, atol=1e-7)


class Parts:
    """ROWS in two parts, mixed by alpha."""

    def __init__(self, alpha):
        self.part_weights = {0: 1 - alpha, 1: alpha}

    def examples(self, epoch):
        return [Example(e.input_ids, e.labels, e.positions, n % 2) for n, e in enumerate(ROWS)]


def test_another_alpha_is_refused(tmp_path):
    stopped(tmp_path, data=Parts(0.2))
    with pytest.raises(ValueError, match="its parts and their weights changed"):
        bigram_run(tmp_path, data=Parts(0.9)).train(resume=True)
    bigram_run(tmp_path, data=Parts(0.2)).train(resume=True)


def schedule(first):
    return lambda positions: torch.where(positions == 1, first, 0.1)


def cubed(power):
    def rule(logp, ref_logp, beta):
        delta = ref_logp - logp
        return beta * delta**power, power * beta * delta ** (power - 1)

    return rule


def test_functions_are_compared_by_what_they_compute(tmp_path):
    """A lambda of another process is the same one; the same name with other numbers is not."""
    options = {"objective": cubed(3), "beta": schedule(2.0)}
    stopped(tmp_path, **options)

    def refused(why, **changed):
        with pytest.raises(ValueError, match=why):
            bigram_run(tmp_path, **{**options, **changed}).train(resume=True)

    refused("beta was 2 at position 1, is 0.7", beta=schedule(0.7))
    refused("beta was 2 at position 1, is 0.3", beta=dak.BetaSchedule(first=0.3, prefix=0.1))
    changed = dak.BetaSchedule(table=[2.0, 0.1, 0.4, 0.1])
    refused("beta was 0.1 at position 3, is 0.4", beta=changed)
    refused("objective: .*rule computes other values than it did", objective=cubed(5))
    refused("objective was 'cubed.<locals>.rule', is 'sft'", objective="sft")
    # The same numbers under another name are the same schedule.
    table = dak.BetaSchedule(table=[2.0, 0.1])
    bigram_run(tmp_path, **{**options, "objective": cubed(3), "beta": table}).train(resume=True)


def test_a_damaged_reference_is_computed_again_at_a_fresh_start(tmp_path):
    config = TrainConfig(tmp_path, **RUN)
    first = TrainingRun(build_model(0), build_tokenizer(), config, RECORDS).train()
    (path,) = tmp_path.glob("reference-*/logp.bin")
    whole = path.read_bytes()
    flip(path)
    with pytest.warns(UserWarning, match="computing the reference again"):
        again = TrainingRun(build_model(0), build_tokenizer(), config, RECORDS).train()
    assert again.metrics["objective"] == first.metrics["objective"]
    assert whole == path.read_bytes()


def test_lora_checkpoints_hold_the_adapter(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")

    def run(out, callbacks=(), **options):
        torch.manual_seed(0)  # of the adapter
        model = peft.get_peft_model(
            build_model(0), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        )
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        base = {**RUN, "max_steps": 4, "learning_rate": 1e-2, "save_every": 2, **options}
        return TrainingRun(
            model, build_tokenizer(), TrainConfig(out, **base), RECORDS, None, callbacks
        )

    whole = run(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", [stop_at(3)]).train()
    state = torch.load(checkpoints(tmp_path / "parts")[-1], weights_only=True)
    assert state["model"] and all("lora_" in name for name in state["model"])
    again = run(tmp_path / "parts")
    again.train(resume=True)
    for (name, a), b in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    # A base that is not the one it began with is another model.
    other = run(tmp_path / "other", [stop_at(3)])
    with pytest.raises(KeyboardInterrupt):
        other.train()
    other = run(tmp_path / "other")
    with torch.no_grad():
        other.model.base_model.model.model.norm.weight[0] += 1
    with pytest.raises(ValueError, match="another model: its frozen parameters"):
        other.train(resume=True)


def test_a_warm_up_never_eats_a_run_unnoticed(tmp_path):
    """The paper's 10 steps, but a fifth of a short run."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = bigram_run(tmp_path, max_steps=7, warmup_steps=None)
        assert short.warmup_steps == 1 and short.lr_at(1) == short.config.learning_rate
        assert bigram_run(tmp_path, max_steps=3, warmup_steps=None).warmup_steps == 0
        assert bigram_run(tmp_path, max_steps=60, warmup_steps=None).warmup_steps == 10
        bigram_run(tmp_path, max_steps=11, warmup_steps=10)
    with pytest.warns(UserWarning, match="warmup_steps: 10 of 7 steps; the learning rate never"):
        bigram_run(tmp_path, max_steps=7, warmup_steps=10)


def test_recovery_alpha_is_part_of_the_run(tmp_path):
    rows = [{"prompt": "a", "answer": "bcd", "refusal": "no"}]
    source = RecoveryAugmentation(rows, build_tokenizer(), anchors=RECORDS, alpha=0.4)
    run = TrainingRun(build_model(), build_tokenizer(), TrainConfig(tmp_path, **RUN), source)
    assert re.search(r"0\.6.*0\.4", run._identity()["data"]["parts and their weights"])
