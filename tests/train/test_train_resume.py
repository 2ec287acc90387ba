"""Stopping and going on: bit for bit the same run, whatever stopped it; and what is refused."""

import json
import os
import signal

import pytest
import torch
from tiny_chat import RECORDS, build_model, build_tokenizer
from train_runs import log_of, same_weights

from deepalign_kernels.fingerprint import model_hash
from deepalign_kernels.train import Example, TrainConfig, TrainingRun
from deepalign_kernels.train import reference as reference_module

STEPS = 9  # of 4 and 3 conversations in turn: four and a half epochs


def make(out, data=RECORDS, model=None, ref_model=None, callbacks=(), **options):
    base = {"batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS, "seed": 3}
    base |= {"learning_rate": 3e-3, "warmup_steps": 2, "save_every": None, "progress": False}
    config = TrainConfig(out, **{**base, **options})
    # Dropout, so that a random state that is not restored is seen.
    model = model or build_model(0, attention_dropout=0.2)
    return TrainingRun(
        model, build_tokenizer(), config, data, ref_model=ref_model, callbacks=callbacks
    )


def steps_of(out):
    """The log's lines about steps, without what the clock says."""
    lines = [r for r in log_of(out) if r["event"] == "step"]
    return [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in lines]


def stop_after(step, how):
    def callback(trainer, record):
        if record["step"] == step:
            how()

    return callback


def raise_interrupt():
    raise KeyboardInterrupt


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def interrupted(out, how="in a callback", at=4, **options):
    """A run that stops in or after step `at`."""
    stop = press_ctrl_c if how == "Ctrl-C" else raise_interrupt
    callbacks = [stop_after(at, stop)] if how == "in a callback" else []
    trainer, calls = make(out, callbacks=callbacks, **options), 0

    def forward_hook(*_):
        nonlocal calls
        calls += trainer.model.training
        if how != "in a callback" and calls == 2 * at:  # the second micro-batch of step `at`
            stop()

    handle = trainer.model.register_forward_hook(forward_hook)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("how", ("in a callback", "Ctrl-C", "in a forward"))
@pytest.mark.parametrize("log_every", (1, 4))
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, how, log_every):
    whole = make(tmp_path / "whole", log_every=log_every)
    result = whole.train()
    stopped = interrupted(tmp_path / "parts", how, log_every=log_every)
    # Ctrl-C lets the step end; what is raised inside it undoes it.
    assert stopped.step == (3 if how == "in a forward" else 4)
    assert [p.name for p in sorted((tmp_path / "parts").glob("[!.]*[!l]"))] == [
        f"checkpoint-{stopped.step:07d}.pt",
        f"reference-{stopped.reference.keys[0]}",
    ]
    again = make(tmp_path / "parts", log_every=log_every)
    more = again.train(resume=True)
    assert same_weights(again.model, whole.model)
    assert not same_weights(again.model, stopped.model)
    assert steps_of(tmp_path / "parts") == steps_of(tmp_path / "whole")
    assert more.steps == result.steps == STEPS
    assert more.step0_max_log_ratio == result.step0_max_log_ratio
    events = [r["event"] for r in log_of(tmp_path / "parts") if r["event"] != "step"]
    assert events == ["start", "ops", "resume", "ops", "end"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    (
        {"objective": "sft"},
        {"reference": "frozen"},
        {"head": "logits"},
        {"lr_schedule": "cosine", "gradient_checkpointing": True},
    ),
    ids=str,
)
def test_every_kind_of_run_resumes(tmp_path, options):
    whole = make(tmp_path / "whole", **options)
    whole.train()
    interrupted(tmp_path / "parts", **options)
    again = make(tmp_path / "parts", **options)
    again.train(resume=True)
    assert same_weights(again.model, whole.model)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    """No handler runs when a process is killed: the log is ahead of the checkpoint."""

    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    whole = make(tmp_path / "whole")
    whole.train()
    with pytest.raises(Killed):
        make(tmp_path / "parts", save_every=3, callbacks=[stop_after(8, kill)]).train()
    log = tmp_path / "parts" / "train_log.jsonl"
    with log.open("a") as file:
        file.write('5\n{"step": 1}\n{"event": "step", "step": "x"}\n')  # damaged lines
        file.write('{"event": "step", "st')  # half a line
    with log.open("ab") as file:
        file.write(b"\n\xff\n")
    again = make(tmp_path / "parts", save_every=3)
    again.train(resume=True)
    assert same_weights(again.model, whole.model)
    assert steps_of(tmp_path / "parts") == steps_of(tmp_path / "whole")


def test_half_an_update_is_never_saved(tmp_path):
    def break_the_update(trainer, record):
        if record["step"] == 3:
            trainer.optimizer.step = raise_interrupt

    trainer = make(tmp_path, callbacks=[break_the_update])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.step == 3 and not list(tmp_path.glob("checkpoint-*"))


def test_the_last_checkpoints_are_kept_and_are_whole(tmp_path, monkeypatch):
    trainer = make(tmp_path, save_every=2, keep_checkpoints=2)
    trainer.train()
    names = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-0000008.pt", "checkpoint-0000009.pt"]

    real, broken = torch.save, []

    def dies_half_way(value, file):
        real({"step": value["step"]}, file)
        broken.append(file.name)
        raise OSError("disk full")

    monkeypatch.setattr(reference_module.torch, "save", dies_half_way)
    with pytest.raises(OSError, match="disk full"):
        trainer.save_checkpoint()
    assert broken and not os.path.exists(broken[0])
    assert sorted(p.name for p in tmp_path.glob("*checkpoint-*")) == names
    torch.load(tmp_path / names[-1], weights_only=True)["optimizer"]


def test_resuming_what_is_not_the_same_run_is_refused(tmp_path):
    def refused(why, **options):
        before = times()
        trainer = make(tmp_path / "out", **options)
        untouched = build_model(0)
        with pytest.raises(ValueError, match=why):
            trainer.train(resume=True)
        assert same_weights(trainer.model, untouched)
        assert times() == before

    def times():  # of all files but the lock, which some versions of filelock write to
        files = [p for p in tmp_path.rglob("*") if p.name != ".lock"]
        return {p: p.stat().st_mtime_ns for p in files}

    refused("resume: no checkpoint in")
    interrupted(tmp_path / "out")
    refused("another configuration: learning_rate was 0.003, is 0.1", learning_rate=0.1)
    refused("another configuration: beta was", beta=0.7)
    refused("other training data", data=RECORDS[:-1])
    *first, last = RECORDS
    said = [{**m, "weight": 0.5} if m["role"] == "assistant" else m for m in last["messages"]]
    refused("data gives now: its weights changed", data=[*first, {"messages": said}])
    scaled = [*first, {**last, "beta_scale": 2.0}]
    refused("data gives now: its scales of beta changed", data=scaled)
    # Saving and logging may change.
    with pytest.raises(KeyboardInterrupt):
        make(
            tmp_path / "out", log_every=2, save_every=5, callbacks=[stop_after(6, raise_interrupt)]
        ).train(resume=True)

    (kept,) = (tmp_path / "out").glob("reference-*")
    content = (kept / "logp.bin").read_bytes()
    (kept / "logp.bin").write_bytes(content[:-4])
    refused(f"logp.bin: expected {len(content)} bytes, found {len(content) - 4}")
    (kept / "logp.bin").write_bytes(content[:-1] + b"x")
    refused("logp.bin is damaged: its checksum is wrong")
    (kept / "logp.bin").write_bytes(content)
    kept.rename(tmp_path / "elsewhere")
    refused("is missing; it holds the reference of this run")


def test_a_new_run_does_not_overwrite_another(tmp_path):
    interrupted(tmp_path)
    before = (tmp_path / "train_log.jsonl").read_text()
    with pytest.raises(ValueError, match="output_dir: .*holds the checkpoints of a run"):
        make(tmp_path).train()
    assert (tmp_path / "train_log.jsonl").read_text() == before


def test_a_frozen_reference_must_be_the_one_the_run_began_with(tmp_path):
    stopped = interrupted(tmp_path, reference="frozen")
    moved = make(tmp_path, reference="frozen", model=stopped.model)
    with pytest.raises(ValueError, match="the frozen reference is not the one"):
        moved.train(resume=True)
    given = make(tmp_path, reference="frozen", model=stopped.model, ref_model=build_model(0))
    given.train(resume=True)
    whole = make(tmp_path / "whole", reference="frozen")
    whole.train()
    assert same_weights(given.model, whole.model)


def test_the_reference_is_computed_once_and_kept_small(tmp_path, monkeypatch):
    calls = []
    real = reference_module.compute
    monkeypatch.setattr(reference_module, "compute", lambda *a: calls.append(1) or real(*a))
    data = [Example([1] * 200, [-100] + [1] * 199, [0, *range(1, 200)]) for _ in range(40)]
    options = {"data": data, "max_steps": 1}
    make(tmp_path, **options).train()
    assert calls
    (path,) = tmp_path.glob("reference-*")
    assert {p.name for p in path.iterdir()} == {"about.json", "logp.bin"}
    assert (path / "logp.bin").stat().st_size == 40 * 199 * 4  # 4 bytes per trained token

    def again(entries, computed=True, **changed):
        calls.clear()
        make(tmp_path, **{**options, **changed}).train()
        assert bool(calls) == computed and len(list(tmp_path.glob("reference-*"))) == entries

    again(1, computed=False)  # the same model and data: read, not computed
    other = build_model(0, attention_dropout=0.2)
    with torch.no_grad():
        other.model.norm.weight[3] += 0.5
    again(2, model=other)
    again(3, data=data[1:])
    again(4, head="logits")  # it rounds otherwise


def test_the_hash_sees_weights_names_and_the_computation():
    base = model_hash(build_model(0))
    assert base == model_hash(build_model(0)) != model_hash(build_model(1))
    assert base != model_hash(build_model(0).double())
    assert base != model_hash(build_model(0, rms_norm_eps=1e-3))
    cached = build_model(0)
    cached.config.use_cache = not cached.config.use_cache
    assert base == model_hash(cached.train())
    assert base == model_hash(build_model(0, attention_dropout=0.2))  # the reference runs in eval


def test_dropout_follows_the_seed_alone(tmp_path):
    """The random stream is the same whether the reference was computed or read."""
    first = make(tmp_path)
    first.train()
    second = make(tmp_path)
    second.train()
    assert same_weights(first.model, second.model)
    other = make(tmp_path, seed=4)
    other.train()
    assert not same_weights(first.model, other.model)


def test_checkpoint_says_what_it_is(tmp_path):
    interrupted(tmp_path)
    (path,) = tmp_path.glob("checkpoint-*.pt")
    state = torch.load(path, weights_only=True)  # nothing but tensors and plain values
    assert state["format"] == 2 and state["step"] == 4
    assert json.loads(json.dumps(state["identity"]["config"]))["adam_betas"] == [0.5, 0.999]
