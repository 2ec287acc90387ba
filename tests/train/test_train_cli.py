"""`python -m deepalign_kernels.train`: from a folder with a model to one with a trained model."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_chat import RECORDS, RECOVERIES, build_model, build_tokenizer
from transformers import AutoModelForCausalLM

from deepalign_kernels.train.__main__ import build, main, parser
from deepalign_kernels.train.config import TrainConfig


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
    assert "error: output_dir: " in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0  # nothing left to do


def test_recovery_data_and_another_reference(tmp_path):
    arguments, out = prepare(tmp_path)
    build_model(1).save_pretrained(tmp_path / "reference")
    arguments += ["--recovery", write(tmp_path / "recovery.jsonl", RECOVERIES), "--alpha", "0.4"]
    arguments += ["--ref-model", str(tmp_path / "reference"), "--reference", "frozen"]
    trainer = build(parser().parse_args([*arguments, "--max-steps", "1"]))
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
    options = vars(parser().parse_args(["--model", "m", "--data", "d", "--output", "o"]))
    for name, value in vars(TrainConfig(tmp_path)).items():
        if name not in ("output_dir", "beta", "epochs"):
            assert options[name] == value, name
    assert options["epochs"] is None  # one epoch if neither is given


@pytest.mark.slow
def test_help_and_light_import():
    code = "import sys, deepalign_kernels.train; print('transformers' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
    text = " ".join(parser().format_help().split())
    assert "--objective {sft,constrained,exact," in text and "--on-too-long" in text
