"""`python -m deepalign_kernels.train`: from a folder with a model to one with a trained model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from tiny_chat import RECORDS, RECOVERIES, TEMPLATES, build_model, build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepalign_kernels.train import TrainConfig, TrainingRun, command, tokenize_chat
from deepalign_kernels.train.__main__ import main, parser
from deepalign_kernels.train.cache import Part
from deepalign_kernels.train.command import build, options_of, settle


def signal_term():
    os.kill(os.getpid(), signal.SIGTERM)


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def prepare(tmp_path):
    build_model(0).save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    data = write(tmp_path / "chat.jsonl", RECORDS)
    out = tmp_path / "out"
    base = ["--model", str(tmp_path / "base"), "--data", data, "--output", str(out)]
    return [*base, "--no-progress", "--batch-size", "3", "--device", "cpu"], out


def test_a_run_from_the_command_line(tmp_path, capsys):
    arguments, out = prepare(tmp_path)
    arguments += ["--max-steps", "2", "--beta-prefix", "3", "--adam-betas", "0.4", "0.99"]
    arguments += ["--save-every", "2", "--warmup-steps", "0", "--learning-rate", "1e-3"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("2 steps, nll ") and "train_log.jsonl" in shown
    start = json.loads((out / "train_log.jsonl").read_text().splitlines()[0])
    assert start["config"]["beta"] == {"first": 0.5, "prefix": 3.0, "rest": 0.1, "prefix_length": 5}
    assert start["config"]["adam_betas"] == [0.4, 0.99] and start["total_steps"] == 2
    trained = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    saved = torch.load(out / "checkpoint-0000002.pt", weights_only=True)["model"]
    assert all(torch.equal(trained[k], saved[k]) for k in trained)
    before = build_model(0).state_dict()
    assert not all(torch.equal(trained[k], before[k]) for k in trained)

    assert main(arguments) == 2  # would overwrite
    assert "model is there already; choose another folder" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0  # nothing left to do
    shutil.rmtree(out / "model")
    assert main(arguments) == 2
    assert "error: output_dir: " in capsys.readouterr().err
    assert main([*arguments, "--resume", "auto"]) == 0


def test_recovery_data_and_another_reference(tmp_path):
    arguments, out = prepare(tmp_path)
    build_model(1).save_pretrained(tmp_path / "reference")
    arguments += ["--recovery", write(tmp_path / "recovery.jsonl", RECOVERIES), "--alpha", "0.4"]
    arguments += ["--ref-model", str(tmp_path / "reference"), "--reference", "frozen"]
    arguments += ["--objective", "constrained", "--max-steps", "1"]
    trainer = build(parser().parse_args(arguments))
    assert trainer.source.table(0).part_weights == {0: 0.6, 1: 0.4}
    assert trainer.train().step0_max_log_ratio > 0.1


def test_wrong_data_end_with_one_line(tmp_path, capsys):
    arguments, out = prepare(tmp_path)
    (tmp_path / "chat.jsonl").write_text('{"messages": []}\n')
    capsys.readouterr()  # the bars of save_pretrained
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"error: {tmp_path}/chat.jsonl:1: no assistant" in error
    assert not out.exists()


def test_options_have_the_configs_defaults(tmp_path):
    given = parser().parse_args(["--model", "m", "--data", "d", "--output", "o"])
    assert settle(given) is None
    options = vars(given)
    for name, value in vars(TrainConfig(tmp_path)).items():
        if name not in ("output_dir", "beta", "epochs"):
            assert options[name] == value, name
    assert options["epochs"] is None  # three epochs if neither is given


def test_recovery_alone_trains_what_the_paper_trains_and_says_so(tmp_path, capsys):
    """Held to the model as it was, it could not learn to refuse."""
    arguments, out = prepare(tmp_path)
    arguments += ["--recovery", write(tmp_path / "recovery.jsonl", RECOVERIES), "--max-k", "3"]
    trainer = build(parser().parse_args([*arguments, "--max-steps", "4", "--p0", "0"]))
    assert trainer.config.objective == "sft" and not trainer.objective.needs_reference
    assert trainer.config.adam_betas == (0.9, 0.999) and trainer.warmup_steps == 0
    told = capsys.readouterr().err
    assert "--recovery: as in the paper, objective sft, adam_betas (0.9, 0.999), warmup" in told
    assert all(1 <= trainer.source._data.draw_k(0, index) <= 3 for index in range(2))
    chosen = build(parser().parse_args([*arguments, "--objective", "constrained"]))
    assert chosen.config.objective == "constrained" and chosen.config.adam_betas == (0.9, 0.999)


def test_a_stop_says_what_is_saved(tmp_path, capsys, monkeypatch):
    arguments, out = prepare(tmp_path)
    arguments += ["--max-steps", "3"]

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("deepalign_kernels.train.reference.compute", stop)
        assert main(arguments) == 130
    assert "nothing was saved yet" in capsys.readouterr().err
    real = TrainingRun._report
    monkeypatch.setattr(TrainingRun, "_report", lambda *a: (real(*a), signal_term()))
    assert main([*arguments, "--resume", "auto"]) == 143
    assert "--resume yes goes on from" in (told := capsys.readouterr().err)
    assert told.strip().endswith("checkpoint-0000001.pt")
    assert main([*arguments, "--resume", "auto"]) == 143  # one step more
    assert sorted(p.name for p in out.glob("c*")) == [f"checkpoint-000000{n}.pt" for n in (1, 2)]


@pytest.mark.parametrize("number,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_before_the_first_step_keeps_the_reference(
    number, status, tmp_path, capsys, monkeypatch
):
    """The same command then asks only for what is missing."""
    arguments, out = prepare(tmp_path)
    arguments += ["--max-steps", "1"]
    real, put = Part.put, []

    def look(part, at, *rest):
        put.append(at)
        real(part, at, *rest)
        if len(put) == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Part, "put", look)
    found = signal.getsignal(number)
    # A shell has SIGINT ignored in what it starts in the background.
    plain = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, plain)
    try:
        before = signal.getsignal(number)
        assert main(arguments) == status and signal.getsignal(number) == before
    finally:
        signal.signal(number, found)
    told = capsys.readouterr().err
    assert f"before the first step; what is computed of the reference is kept in {out}" in told
    assert len(put) == 2 and not list(out.glob("*.jsonl"))
    assert main(arguments) == 0
    assert len(put) == 3 and sorted(put) == [0, 1, 2]  # seven rows, three at a time


@pytest.mark.slow
def test_help_and_light_import():
    code = "import sys, deepalign_kernels.train; print('transformers' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
    text = " ".join(parser().format_help().split())
    assert "--objective {sft,constrained,exact," in text and "--on-too-long" in text


def test_deepalign_train_reads_yaml_and_flags(tmp_path, capsys):
    """The same options as `python -m`, from a file, with a flag that wins."""
    pytest.importorskip("tyro", reason="needs tyro")
    from deepalign_kernels.cli.main import main as deepalign

    arguments, out = prepare(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {arguments[1]}\ndata: {arguments[3]}\noutput: {out}\nbatch_size: 3\n"
        "max_steps: 9\nadam_betas: [0.4, 0.99]\nprogress: false\ndevice: cpu\n"
        "beta_table: [0.5, 3, 1e-1]\n"
    )
    words = ["train", "--config", str(recipe), "--max-steps", "2", "--optimizer", "adamw"]
    assert deepalign(words) == 0
    assert "2 steps, nll" in capsys.readouterr().out
    start = json.loads((out / "train_log.jsonl").read_text().splitlines()[0])["config"]
    assert start["adam_betas"] == [0.4, 0.99] and start["max_steps"] == 2
    assert start["beta"] == {"table": [0.5, 3.0, 0.1]} and start["batch_size"] == 3
    recipe.write_text("learning_rat: 1\n")
    assert deepalign(["train", "--config", str(recipe)]) == 2
    assert "did you mean 'learning_rate'?" in capsys.readouterr().err


def test_every_option_says_what_it_is():
    assert all(len(option.text) > 10 for option in options_of()), options_of()


@pytest.mark.clean_memory  # a model is made on the meta device
def test_a_dry_run_tells_and_writes_nothing(tmp_path, capsys, monkeypatch):
    arguments, out = prepare(tmp_path)
    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("weights were read"))
    before = sorted(tmp_path.rglob("*"))
    dry = [*arguments, "--dry-run", "--data-cache", str(tmp_path / "cache"), "--epochs", "2"]
    write(tmp_path / "chat.jsonl", [{**RECORDS[0], "beta_scale": 2}, *RECORDS[1:]])
    dry += ["--beta-table", "0.5", "7", "0.2"]
    assert main([*dry, "--eval-data", arguments[3], "--save-every", "1"]) == 0
    shown = capsys.readouterr().out
    assert (
        "data      7 conversations, 7 held out; 421 tokens, 155 trained, the longest 104" in shown
    )
    assert "steps     2, 1 an epoch, of 12 conversations; 1 process, 3 a forward" in shown
    assert "a device (weights" in shown and "predicted for 3 x 104 tokens" in shown
    assert "beta {'table': [0.5, 7.0, 0.2]}" in shown
    betas = [line.split()[-3:-1] for line in shown.splitlines() if " yes " in line]
    assert betas[:4] == [["1", "1"], ["2", "14"], ["3", "0.4"], ["4", "0.4"]]
    assert "'<|im_end|>'" in shown and shown.count(" yes ") == 59
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "more,said",
    [
        (["--eval-data", "gone.jsonl"], "eval_data: gone.jsonl: no such file"),
        (["--ref-model", "./gone"], "ref_model: no config of ./gone: no such folder"),
        (["--device", "cuda:77"], "device: 'cuda:77' cannot be used here: "),
        (["--device", "nothing"], "device: 'nothing' cannot be used here: "),
        (["--recovery", "gone.jsonl"], "recovery: gone.jsonl: no such file"),
        (["--beta-prefix", "-1"], "prefix: expected"),
        (["--beta-table", "1", "-1"], "table, token 2: expected"),
        (["--beta-table", "1", "2", "--beta-first", "0.5"], "beta_table: .*leave out beta_first"),
    ],
)
def test_what_is_not_there_is_said_before_a_model_is_loaded(
    more, said, tmp_path, capsys, monkeypatch
):
    arguments, out = prepare(tmp_path)
    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("weights were read"))
    assert main([*arguments, *more]) == 2
    assert re.search(said, capsys.readouterr().err) and not out.exists()


def test_another_chat_template_is_trained_with_and_saved(tmp_path, capsys, monkeypatch):
    """Of a model that has none."""
    arguments, out = prepare(tmp_path)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    for file in (tmp_path / "base").glob("*template*"):
        file.unlink()
    tokenizer.save_pretrained(tmp_path / "base")
    with monkeypatch.context() as patch:
        patch.setattr(command, "load_model", lambda *_: pytest.fail("weights were read"))
        assert main(arguments) == 2
        assert "has no chat template; set --chat-template" in capsys.readouterr().err
        assert main([*arguments, "--chat-template", "./gone"]) == 2
        assert "chat_template: ./gone: " in capsys.readouterr().err
    (tmp_path / "own.jinja").write_text(text := TEMPLATES["unmarked"].replace("assistant", "bot"))
    more = ["--chat-template", str(tmp_path / "own.jinja"), "--max-steps", "1"]
    assert main([*arguments, *more]) == 0
    saved = AutoTokenizer.from_pretrained(out / "model")
    assert saved.chat_template == text
    examples = tokenize_chat(saved, RECORDS)
    log = json.loads((out / "train_log.jsonl").read_text().splitlines()[0])
    trained = sum(label != -100 for e in examples for label in e.labels[1:])
    assert log["trained_tokens_per_epoch"] == trained


def test_the_model_of_an_early_stop_is_the_best(tmp_path, capsys):
    """At a rate that is too high the best is not the last; at a good one it is."""
    arguments, out = prepare(tmp_path)
    arguments += ["--objective", "sft", "--max-steps", "6", "--lr-schedule", "constant"]
    arguments += ["--eval-every", "1", "--early-stop", "2", "--best-by", "nll"]
    held_out = ["--eval-data", arguments[3]]
    capsys.readouterr()
    assert main(arguments) == 2
    assert "early_stop: it counts evaluations on eval_data, and there are none" in (
        capsys.readouterr().err
    )

    def lines(event):
        log = (out / "train_log.jsonl").read_text().splitlines()
        return [r for r in map(json.loads, log) if r["event"] == event]

    for rate, steps in (("0.3", 4), ("0.003", 6)):
        more = ["--learning-rate", rate, "--warmup-steps", "0"]
        assert main([*arguments, *held_out, *more]) == 0
        best = min(lines("eval"), key=lambda r: r["nll"])["step"]
        assert best == (2 if steps == 4 else 6) and len(lines("step")) == steps
        shown = capsys.readouterr().out
        assert f"{steps} steps, nll" in shown and f"model of step {best}, the best, in " in shown
        saved = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
        kept = torch.load(out / "best.pt", weights_only=True)["model"]
        assert all(torch.equal(saved[k], kept[k]) for k in saved)
        last = torch.load(out / f"checkpoint-000000{steps}.pt", weights_only=True)["model"]
        same = [torch.equal(saved[k], last[k]) for k in saved]
        assert all(same) if best == 6 else not any(same)
        shutil.rmtree(out)


def test_bad_records_are_named_in_log_and_dry_run(tmp_path, capsys):
    arguments, out = prepare(tmp_path)
    with open(arguments[3], "a") as file:
        file.write('{"messages": []}\n{"x": 1}\n')
    arguments += ["--on-bad-record", "skip", "--max-steps", "1", "--eval-data", arguments[3]]
    line = f"{arguments[3]}:9: expected the keys"
    with pytest.warns(
        UserWarning, match="data: 2 records are left out .* the first: .*chat.jsonl:8"
    ):
        assert main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "skipped   2 of data:\n" in shown and "skipped   2 of eval_data:\n" in shown
    assert shown.count(line) == 2 and "data      7 conversations, 7 held out" in shown
    with pytest.warns(UserWarning, match="2 records are left out"):
        assert main(arguments) == 0
    log = [json.loads(x) for x in (out / "train_log.jsonl").read_text().splitlines()]
    assert log[0]["skipped"] == 2 and log[0]["examples"] == 7
    skipped = [(r["data"], r["why"].split(": ")[0]) for r in log if r["event"] == "skipped"]
    files = [f"{arguments[3]}:{n}" for n in (8, 9)]
    assert skipped == [(name, at) for name in ("data", "eval_data") for at in files]
    recovery = ["--recovery", write(tmp_path / "recovery.jsonl", [*RECOVERIES, {"x": 1}])]
    with pytest.warns(UserWarning, match="data: 3 records are left out .*recovery.jsonl:4: exp"):
        assert main([*arguments, *recovery, "--output", str(tmp_path / "other"), "--dry-run"]) == 0
    assert "skipped   3 of data:\n" in capsys.readouterr().out
