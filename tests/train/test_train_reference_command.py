"""`deepalign reference`: its pass alone, and that `deepalign train` then has none to make."""

import json
import os
import re
import signal

import pytest
from tiny_chat import RECORDS, build_model, build_tokenizer
from train_runs import in_child, log_of

from deepalign_kernels.data.examples import tokenize_chat
from deepalign_kernels.train import command, log
from deepalign_kernels.train.objective import BatchObjective

HELD_OUT = RECORDS[:3]
SAID = re.compile(
    r"(\w+) +(\d+) tokens, ([\d,]+) bytes, (computed in \S+ s|was there already): (.*)"
)


def deepalign(*words):
    pytest.importorskip("tyro", reason="needs tyro")
    from deepalign_kernels.cli.main import main

    return main([str(word) for word in words])


@pytest.fixture
def given(tmp_path, one_thread, capsys):
    """The options of a run, but for where it writes."""
    build_model(0).save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    for name, records in (("chat", RECORDS), ("held_out", HELD_OUT)):
        text = "".join(json.dumps(r) + "\n" for r in records)
        (tmp_path / f"{name}.jsonl").write_text(text)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tmp_path}/base\ndata: {tmp_path}/chat.jsonl\n"
        f"eval_data: {tmp_path}/held_out.jsonl\n"
        "device: cpu\nprogress: false\nbatch_size: 2\nmax_steps: 2\nkl_coef: 0.5\nkl_positions: 4\n"
    )
    capsys.readouterr()  # the bars of save_pretrained
    return ["--config", recipe]


@pytest.fixture
def forwards(monkeypatch):
    """A list that grows with every forward of a reference's pass."""
    seen, real = [], BatchObjective.reference
    monkeypatch.setattr(BatchObjective, "reference", lambda *a: (seen.append(1), real(*a))[1])
    return seen


def files(folder):
    return {p.name: p.read_bytes() for p in folder.glob("reference-*/*.bin")}


def told(capsys):
    """(name, tokens, bytes, how, folder) of each line."""
    lines = [SAID.fullmatch(line).groups() for line in capsys.readouterr().out.splitlines()]
    return [(*line[:2], line[2].replace(",", ""), *line[3:]) for line in lines]


def test_training_finds_what_was_computed_before(given, tmp_path, capsys, forwards):
    shared = tmp_path / "shared"
    assert deepalign("reference", *given, "--reference-cache", shared) == 0
    assert len(forwards) == 4 + 2
    lines = told(capsys)
    for (name, tokens, size, how, path), records in zip(lines, (RECORDS, HELD_OUT), strict=True):
        labels = [x for e in tokenize_chat(build_tokenizer(), records) for x in e.labels[1:]]
        assert int(tokens) == sum(label != -100 for label in labels), name
        held = [p.stat().st_size for p in (shared / path.split("/")[-1]).iterdir()]
        assert int(size) == sum(held) and how.startswith("computed")
    # Again, with what changes no number: nothing is computed.
    assert deepalign("reference", *given, "--reference-cache", shared, "--batch-size", 3) == 0
    again = [(*line[:3], "was there already", line[4]) for line in lines]
    assert told(capsys) == again and len(forwards) == 6
    for name, cache in (("a", shared), ("b", tmp_path / "b")):
        where = ["--output", tmp_path / name, "--reference-cache", cache]
        assert deepalign("train", *given, "--learning-rate", 1e-3, *where) == 0
        assert len(forwards) == (6 if name == "a" else 12)
    # The same as what a run computes itself.
    assert files(shared) == files(tmp_path / "b") and len(files(shared)) == 2
    steps = [[r for r in log_of(tmp_path / n) if r["event"] == "step"] for n in "ab"]
    assert [r["objective"] for r in steps[0]] == [r["objective"] for r in steps[1]]


def test_a_killed_pass_goes_on_and_says_how_far_it_is(
    given, tmp_path, capsys, monkeypatch, forwards
):
    words = ["reference", *given, "--output", tmp_path / "out"]
    counted = BatchObjective.reference

    def kill(*given):
        if len(forwards) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return counted(*given)

    with monkeypatch.context() as patch:
        patch.setattr(BatchObjective, "reference", kill)
        assert in_child(lambda: deepalign(*words))() == -signal.SIGKILL
    capsys.readouterr()
    monkeypatch.setattr(log.Progress, "EVERY", -1.0)  # a line for every forward
    assert deepalign(*words, "--progress") == 0
    assert len(forwards) == 3 + 2
    expected = []
    for records, first in ((RECORDS, 2), (HELD_OUT, 0)):
        lengths = [len(e.input_ids) for e in tokenize_chat(build_tokenizer(), records)]
        lengths.sort(reverse=True)
        for end in range(first + 2, len(lengths) + 2, 2):
            expected.append(f"{sum(lengths[:end])}/{sum(lengths)}")
    shown = [x for x in capsys.readouterr().err.splitlines() if x.startswith("reference: token ")]
    assert [re.split(r"[ ,]+", line)[2] for line in shown] == expected
    assert [line.endswith(" left") for line in shown] == [True, True, False, True, False]
    assert deepalign("train", *given, "--output", tmp_path / "silent") == 0
    assert "reference" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "more,said",
    [
        ("", "reference_cache: expected a folder to keep the reference in, or output"),
        (
            "--output o --objective sft --kl-coef 0 --kl-positions None",
            "'sft' without kl_coef or eval_kl asks",
        ),
        ("--output o --reference frozen", "reference: 'frozen' runs along and keeps nothing"),
        ("--output o --learning-rate -1", "learning_rate: expected"),
    ],
)
def test_what_has_no_reference_to_keep_is_refused(given, more, said, capsys, monkeypatch):
    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("weights were read"))
    assert deepalign("reference", *given, *more.split()) == 2
    assert said in capsys.readouterr().err


@pytest.mark.clean_memory  # a model is made on the meta device
def test_a_dry_run_tells_what_would_be_kept(given, tmp_path, capsys):
    words = ["reference", *given, "--output", tmp_path / "out"]
    assert deepalign(*words, "--dry-run") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "nothing was written, no weights were read" and not (tmp_path / "out").exists()
    kind = r"(\w+) +(\d+) tokens, hidden states of \d+ and the output head: about ([\d,]+) bytes"
    planned = [re.fullmatch(kind, line).groups() for line in lines]
    assert deepalign(*words) == 0
    for (name, tokens, size), line in zip(planned, told(capsys), strict=True):
        assert (name, tokens) == line[:2]
        assert (
            0 < int(line[2]) - int(size.replace(",", "")) < 4000
        )  # about.json, and what torch.save adds
