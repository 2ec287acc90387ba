"""The reference on disk: gone on with after a kill, shared by runs, refused by name when stale."""

import errno
import json
import multiprocessing
import os
import signal
import warnings

import pytest
import torch
from tiny_chat import RECORDS, build_model, build_tokenizer
from train_runs import RUN, in_child, log_of, same_weights

from deepalign_kernels.data.examples import tokenize_chat
from deepalign_kernels.train import Example, TrainConfig, TrainingRun
from deepalign_kernels.train import cache as caches

ANCHORED = {**RUN, "objective": "constrained", "kl_coef": 0.5, "kl_positions": 4}
ANCHORED |= {"batch_size": 2, "max_steps": 3, "learning_rate": 1e-2, "save_every": 1}


def make(out, data=RECORDS, model=None, ref_model=None, callbacks=(), **options):
    config = TrainConfig(out, **{**ANCHORED, **options})
    tokenizer, model = build_tokenizer(), model or build_model(0)
    return TrainingRun(model, tokenizer, config, data, ref_model, callbacks)


def files(folder, pattern="reference-*/*"):
    """What the cache holds, byte for byte; two heads of the same numbers are the same."""
    out = {}
    for path in folder.glob(pattern):
        if path.name == "head.pt":
            out[path.name] = torch.load(path)["weight"].tolist()
        else:
            out[path.name] = path.read_bytes()
    return out


def forwards_of(run, then=lambda count: None):
    """A list that grows with every forward without gradient, that is, of the reference."""
    seen = []

    def look(*_):
        if not torch.is_grad_enabled():
            seen.append(1)
            then(len(seen))

    run.model.register_forward_hook(look)
    return seen


def kill_at(count):
    return lambda n: n == count and os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def gold(tmp_path, one_thread):
    run = make(tmp_path / "gold")
    run.train()
    return run


def test_a_killed_reference_pass_goes_on_where_it_was(tmp_path, gold):
    """SIGKILL in the third forward of four, then in the fourth."""
    out = tmp_path / "out"
    for count in (3, 2):
        run = make(out)
        forwards_of(run, kill_at(count))
        assert in_child(run.train)() == -signal.SIGKILL
    (part,) = out.glob(".reference-*.part")
    assert len((part / "done-0").read_text().splitlines()) == 3
    assert not list(out.glob("reference-*"))
    again = make(out)
    seen = forwards_of(again)
    again.train(resume="auto")
    # One of the pass, and the first batch, which is looked at before the first step.
    assert len(seen) == 2 and not list(out.glob(".reference-*.part"))
    assert files(out) == files(tmp_path / "gold")
    assert same_weights(again.model, gold.model)


@pytest.mark.parametrize("damage", ("torn bytes", "torn line", "other batches", "no head"))
def test_what_a_killed_pass_left_is_not_trusted(tmp_path, gold, damage):
    out = tmp_path / "out"
    run = make(out)
    forwards_of(run, kill_at(3))
    assert in_child(run.train)() == -signal.SIGKILL
    (part,) = out.glob(".reference-*.part")
    if damage == "torn bytes":  # a power cut: the line is there, the numbers are not
        for name in ("logp.bin", "hidden.bin"):
            size = (part / name).stat().st_size
            (part / name).write_bytes(bytes(size))
    elif damage == "torn line":
        (part / "done-0").write_text((part / "done-0").read_text()[:-4] + "\n0")
    elif damage == "no head":
        (part / "head.pt").write_bytes(b"x")
    again = (
        make(out, batch_size=1, gradient_accumulation_steps=2) if "other" in damage else make(out)
    )
    seen = forwards_of(again)
    again.train()
    expected = {"torn bytes": 4, "torn line": 3, "other batches": 7, "no head": 4}[damage]
    assert len(seen) == expected + 1
    if damage != "other batches":
        assert files(out) == files(tmp_path / "gold")


def test_two_runs_at_once_share_one_pass(tmp_path, gold):
    """Both begin together; the one waits for the other, and reads what it made."""
    shared, counts = tmp_path / "shared", tmp_path / "counts"
    meet = multiprocessing.get_context("fork").Barrier(2)

    def train(name):
        run = make(tmp_path / name, reference_cache=shared)
        seen = forwards_of(run)
        meet.wait(60)
        run.train()
        with counts.open("a") as file:
            file.write(f"{len(seen)}\n")

    waits = [in_child(lambda name=name: train(name)) for name in ("a", "b")]
    assert [wait() for wait in waits] == [0, 0]
    assert sorted(map(int, counts.read_text().split())) == [1, 5]  # four forwards, once
    assert files(shared) == files(tmp_path / "gold")
    ends = [torch.load(tmp_path / n / "checkpoint-0000003.pt")["model"] for n in ("a", "b")]
    assert all(torch.equal(end[k], x) for end in ends for k, x in gold.model.state_dict().items())


def stop_at(step):
    def callback(run, record):
        if record["step"] == step:
            raise KeyboardInterrupt

    return callback


def interrupted(out, **options):
    with pytest.raises(KeyboardInterrupt):
        make(out, callbacks=[stop_at(2)], **options).train()


def test_a_stale_reference_is_refused_by_what_changed(tmp_path, one_thread):
    """A resume takes what its checkpoint names, as long as that says what it did."""
    options = {"ref_model": build_model(1), "reference_cache": tmp_path / "shared"}
    interrupted(tmp_path / "out", **options)
    (entry,) = (tmp_path / "shared").glob("reference-*")
    kept = (entry / "about.json").read_text()

    def refused(why, **changed):
        with pytest.raises(ValueError, match=why):
            make(tmp_path / "out", **{**options, **changed}).train(resume=True)

    def changed(**about):
        says = json.loads(kept)
        says["about"] |= about
        (entry / "about.json").write_text(json.dumps(says))

    refused("is stale: made from other weights of the reference", ref_model=build_model(2))
    changed(data="others")
    refused("is stale: made from other tokens than data gives now")
    changed(temperature=2.0, head="logits")
    refused(r"other head \('logits', now 'fused'\) and other temperature \(2.0, now 1.0\)")
    changed(anchors={"positions": 9, "dtype": "bfloat16"})
    refused(r"other choice of positions or dtype \(kl_positions, reference_dtype, eval_kl\)")
    (entry / "about.json").write_text(kept[:50])
    refused("is not readable")
    (entry / "about.json").write_text(kept.replace('"format": 1', '"format": 7'))
    refused("format 7, expected 1")
    (entry / "about.json").write_text(kept)
    for name in ("hidden.bin", "head.pt"):
        whole = (entry / name).read_bytes()
        middle = len(whole) // 2
        flipped = bytes(255 - x for x in whole[middle : middle + 8])
        (entry / name).write_bytes(whole[:middle] + flipped + whole[middle + 8 :])
        refused("checksum")
        (entry / name).write_bytes(whole)
    (tmp_path / "shared").rename(tmp_path / "moved")
    refused("is missing; it holds the reference of this run")
    make(tmp_path / "out", **{**options, "reference_cache": tmp_path / "moved"}).train(resume=True)
    other = make(tmp_path / "whole", ref_model=build_model(1))
    other.train()
    ends = [torch.load(tmp_path / n / "checkpoint-0000003.pt")["model"] for n in ("out", "whole")]
    assert all(torch.equal(x, ends[1][name]) for name, x in ends[0].items())


def test_a_cache_that_goes_while_it_is_used(tmp_path, gold):
    """Deleted: the run keeps its open file. Cut short: an error, the checkpoint before it whole."""

    def delete(run, record):
        for path in tmp_path.glob("gone/reference-*/*"):
            path.unlink(missing_ok=True)

    run = make(tmp_path / "gone", callbacks=[delete])
    run.train()
    assert same_weights(run.model, gold.model)

    def cut(run, record):
        (path,) = tmp_path.glob("cut/reference-*/hidden.bin")
        if record["step"] == 2:
            whole.append(path.read_bytes())
            os.truncate(path, 100)

    whole = []
    with pytest.raises(OSError, match="hidden.bin was cut short while it was in use: example"):
        make(tmp_path / "cut", callbacks=[cut]).train()
    with pytest.raises(ValueError, match=f"hidden.bin: expected {len(whole[0])} bytes, found 100"):
        make(tmp_path / "cut").train(resume=True)
    (path,) = tmp_path.glob("cut/reference-*/hidden.bin")
    path.write_bytes(whole[0])
    again = make(tmp_path / "cut")
    again.train(resume=True)
    assert same_weights(again.model, gold.model)
    assert [r["step"] for r in log_of(tmp_path / "cut") if r["event"] == "step"] == [1, 2, 3]


@pytest.mark.parametrize("made", ("in this run", "before"))
def test_tokens_that_are_cut_short_while_they_are_used(tmp_path, gold, made):
    """Without a look at its size, a mapped file ends the process: SIGBUS."""
    cache, out, data = tmp_path / "tokens", tmp_path / "out", tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    if made == "before":
        make(tmp_path / "first", str(data), data_cache=cache)

    def cut(run, record):
        if record["step"] == 2:
            (path,) = cache.glob("*/ids.bin")
            os.truncate(path, 0)

    def act():
        with pytest.raises(OSError, match="ids.bin was cut short while it was in use: 0 of"):
            make(out, str(data), data_cache=cache, callbacks=[cut]).train()

    assert in_child(act)() == 0
    with pytest.warns(UserWarning, match="tokenising again"):
        again = make(out, str(data), data_cache=cache)
    again.train(resume=True)
    assert same_weights(again.model, gold.model)


def test_a_full_disk_in_the_pass_loses_nothing(tmp_path, gold, monkeypatch):
    real, calls = os.pwrite, []

    def full(*args):
        calls.append(1)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="no room for the reference in .* it goes on from there"):
        make(tmp_path / "out").train()
    monkeypatch.undo()
    again = make(tmp_path / "out")
    seen = forwards_of(again)
    again.train()
    assert len(seen) == 4 and files(tmp_path / "out") == files(tmp_path / "gold")

    class Small:
        free = 100

    monkeypatch.setattr(caches.shutil, "disk_usage", lambda path: Small)
    with pytest.raises(OSError, match=r"no room for the reference: .* kl_positions keeps fewer"):
        make(tmp_path / "other").train()


def test_columns_change_with_the_epochs(tmp_path, one_thread):
    """Data that are drawn anew in every epoch: an entry each, and the first n positions of each."""
    examples = tokenize_chat(build_tokenizer(), RECORDS)

    class Turning:
        def examples(self, epoch):
            return examples[epoch:] + examples[:epoch]

    run = make(tmp_path, Turning(), batch_size=7)
    run.train()
    assert len(list(tmp_path.glob("reference-*"))) == 3
    counts = {len(path.read_bytes()) for path in tmp_path.glob("reference-*/hidden.bin")}
    anchored = sum(1 <= p <= 4 for e in examples for p in e.positions)
    assert counts == {anchored * build_model(0).config.hidden_size * 2}
    moved = [Example(e.input_ids, e.labels, [2 * p for p in e.positions]) for e in examples]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(tmp_path / "b", moved, reference_cache=tmp_path).train()  # other positions, other rows
    assert len(list(tmp_path.glob("reference-*"))) == 4
    longer = {"batch_size": 7, "lr_schedule": "constant"}
    make(tmp_path / "c", Turning(), **longer).train()
    with pytest.raises(ValueError, match="epochs: this run began with 3; its data change"):
        make(tmp_path / "c", Turning(), **longer | {"max_steps": 4}).train(resume=True)
