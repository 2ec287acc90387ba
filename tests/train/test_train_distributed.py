"""Two gloo processes against one: gradients, weights, log, checkpoints; nothing but time differs.

All cases share one spawn; every test reads its line of the result. RECORDS are seven conversations
of 2 to 60 trained tokens, so shares are uneven and the last step of an epoch leaves a process
without a row.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parallel_runs import compute_before, distance, run_case
from tiny_chat import RECORDS, build_model, build_tokenizer
from train_runs import log_of
from two_processes import WORLD, run_cases, spawn, start

from deepalign_kernels.train import TrainConfig, TrainingRun
from deepalign_kernels.train.__main__ import main
from deepalign_kernels.train.ranks import way_of

BUDGET = 1e-5
BEFORE = "compute_reference"
CASES = {
    "ddp": {"parallel": "ddp"},
    "ddp, accumulation": {"parallel": "ddp", "batch_size": 1, "gradient_accumulation_steps": 2},
    "ddp, a process without a row": {"parallel": "ddp", "batch_size": 3, "max_steps": 3},
    "ddp, frozen reference": {"parallel": "ddp", "reference": "frozen", "kl_coef": 0.3},
    "ddp, packed": {"parallel": "ddp", "packing": True, "max_batch_tokens": 130},
    "ddp, whole logits, clipped": {"parallel": "ddp", "head": "logits", "max_grad_norm": 0.1},
    "fsdp, head of its own": {"parallel": "fsdp"},
    "fsdp, tied head": {"parallel": "fsdp", "tied": True},
    "fsdp, accumulation": {
        "parallel": "fsdp", "batch_size": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1,
    },
    "fsdp, a process without a row": {"parallel": "fsdp", "batch_size": 3, "max_steps": 3},
    "fsdp, frozen reference, offload": {
        "parallel": "fsdp", "reference": "frozen", "cpu_offload": True,
    },
    "ddp, kept anchors": {"parallel": "ddp", "kl_coef": 0.3, "kl_positions": 3},
    "fsdp, kept anchors, a process without a row": {
        "parallel": "fsdp", "kl_coef": 0.3, "batch_size": 3, "max_steps": 3,
    },
    "ddp, LoRA, adapters off": {
        "parallel": "ddp", "lora": True, "reference": "adapter_off", "kl_coef": 0.3,
    },
    "fsdp, LoRA, adapters off": {
        "parallel": "fsdp", "lora": True, "reference": "adapter_off", "kl_coef": 0.3,
    },
}  # fmt: skip


def work(rank, folder, names):
    start(rank, folder)
    before = CASES["fsdp, kept anchors, a process without a row"]
    cases = {BEFORE: (compute_before, folder, before)}
    cases |= {name: (run_case, folder, name, CASES[name]) for name in names}
    run_cases(rank, folder, cases, lambda rank, case, *about: case(rank, *about))


@pytest.fixture(scope="module")
def results():
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    present = importlib.util.find_spec("peft") is not None
    names = [name for name in CASES if present or "LoRA" not in name]
    return spawn(work, names, limit=400.0)


@pytest.mark.slow
def test_a_reference_that_two_processes_compute_before_a_run(results):
    gap, other = results.get(BEFORE, ["a process hung or died", None])
    assert other is None and isinstance(gap, float) and gap <= 1e-6, gap


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(results, name):
    if "LoRA" in name:
        pytest.importorskip("peft", reason="needs peft")
    lines = results.get(name, [])
    print(f"{name:34s} {lines}")
    assert len(lines) == WORLD, f"a process hung or died: {lines}"
    assert isinstance(lines[0], list) and lines[1] is None, lines
    gradients, weights, log, resumed = lines[0]
    assert gradients <= BUDGET and weights <= BUDGET and log <= 1e-4 and resumed <= BUDGET


def launch(tmp_path, *more, records=RECORDS, steps=3):
    """`torchrun` with two processes of the command line."""
    base = tmp_path / "base"
    if not base.exists():
        build_model(0).save_pretrained(base)
        build_tokenizer().save_pretrained(base)
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in records))
    run = ["--model", str(base), "--data", str(data), "--device", "cpu", "--no-progress"]
    run += ["--max-steps", str(steps), "--batch-size", "2", "--gradient-accumulation-steps", "1"]
    run += ["--output", str(tmp_path / "out"), *more]
    root = str(Path(__file__).parents[2])
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": root}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "deepalign_kernels.train", *run]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True), run


@pytest.mark.slow
def test_torchrun_runs_the_command_line(tmp_path):
    """One log, one model, that of one process; and a resume with another number of processes."""
    process, run = launch(tmp_path, "--save-every", "1", "--keep-checkpoints", "9")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert out.count("3 steps, nll ") == 1
    lines = [r["event"] for r in log_of(tmp_path / "out")]
    assert lines == ["start", "ops", "step", "step", "step", "end"]
    alone = tmp_path / "alone"
    one = [*run, "--output", str(alone), "--gradient-accumulation-steps", "2"]
    (tmp_path / "out" / "checkpoint-0000003.pt").unlink()
    shutil.rmtree(tmp_path / "out" / "model")
    two = torch.load(tmp_path / "out" / "checkpoint-0000002.pt", weights_only=True)["model"]
    assert main([*run, "--resume", "--gradient-accumulation-steps", "2"]) == 0
    assert main(one) == 0
    gold = torch.load(alone / "checkpoint-0000002.pt", weights_only=True)["model"]
    assert distance(two, gold) < 1e-4


@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_a_message(tmp_path):
    process, _ = launch(tmp_path, "--save-every", "2", steps=100000)
    wait_for(process, tmp_path / "out" / "checkpoint-0000002.pt")
    begun = time.monotonic()
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and time.monotonic() - begun < 60
    assert "another process of this run ended" in errors or "Signal 9" in errors, errors
    assert not [p for p in children(process.pid) if os.path.exists(f"/proc/{p}")]


@pytest.mark.slow
def test_sigterm_to_the_launcher_is_a_checkpoint_of_all(tmp_path):
    process, _ = launch(tmp_path, "--save-every", "50000", steps=100000)
    wait_for(process, tmp_path / "out" / "train_log.jsonl", lines=4)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert errors.count("stopped; --resume yes goes on from") == 1, errors
    assert len(list((tmp_path / "out").glob("checkpoint-*.pt"))) == 1


def wait_for(process, path, lines=0):
    deadline = time.monotonic() + 90
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return [int(x) for x in found.split()]


def refuse(rank, folder, what):
    """What a process is told when something is wrong in one of them only."""
    out = Path(folder) / what
    data = RECORDS[rank:] if what == "other data" else RECORDS
    config = TrainConfig(out, batch_size=1, max_steps=1, progress=False, warmup_steps=0)
    if what == "a file" and rank == 0:
        out.write_text("x")
    run = TrainingRun(build_model(0), build_tokenizer(), config, data)
    run.train()


def work_refusals(rank, folder, cases):
    start(rank, folder)
    run_cases(rank, folder, {case: (folder, case) for case in cases}, refuse)


@pytest.mark.slow
def test_what_is_wrong_in_one_process_ends_all(tmp_path):
    lines = spawn(work_refusals, ("other data", "a file"), limit=120.0)
    why = "ValueError: data: process 1 of 2 has other ones than process 0; each must read the"
    assert len(lines["other data"]) == 2 and all(why in line for line in lines["other data"])
    why = "ValueError: output_dir: expected a folder"
    assert len(lines["a file"]) == 2 and all(line.startswith(why) for line in lines["a file"])


ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
STATES = {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}


@pytest.mark.parametrize(
    "environment, arguments, expected",
    (
        ({}, ("auto", False, False), ("ddp", False)),
        ({}, ("fsdp", True, False), ("fsdp", True)),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, ("auto", False, False),
         ("fsdp", False)),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
         ("auto", False, False), ("fsdp", True)),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, ("auto", False, False),
         "parallel: accelerate is configured for FSDP1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, ("ddp", False, False),
         ("ddp", False)),
        (ZERO, ("auto", False, False), ("zero2", False)),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, ("auto", False, False), ("zero3", False)),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, ("auto", False, False), ".*stage 1; set"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, ("ddp", False, False), ("ddp", False)),
        (ZERO | STATES, ("auto", False, False), ("zero2", True)),
        (ZERO | STATES | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, ("auto", False, False),
         "cpu_offload: .*states on cpu, weights on none"),
        (ZERO | STATES | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                          "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
         ("auto", False, False), ("zero3", True)),
        (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, ("auto", False, False),
         "cpu_offload: .*states on nvme"),
        (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "x.json"}, ("auto", False, False),
         "parallel: .*deepspeed_config_file"),
        (ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, ("auto", False, False),
         "max_grad_norm: .*gradient_clipping 1.0"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ("auto", False, True), ("ddp", False)),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ("auto", False, False), "autocast_dtype: "),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, ("auto", False, True), "autocast_dtype: "),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, ("auto", False, False), ("ddp", False)),
    ),
)  # fmt: skip
def test_what_accelerate_launch_says_is_done_or_refused(
    monkeypatch, environment, arguments, expected
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            way_of(*arguments)
    else:
        assert way_of(*arguments) == expected


@pytest.mark.parametrize("file", ("ddp.yaml", "fsdp2.yaml", "zero3.yaml"))
def test_the_launch_files_are_what_accelerate_reads(file, monkeypatch):
    """As `accelerate launch` puts them into the environment of each process."""
    commands = pytest.importorskip("accelerate.commands.launch", reason="needs accelerate")
    path = str(Path(__file__).parents[2] / "examples" / "launch" / file)
    arguments = commands.launch_command_parser().parse_args(["--config_file", path, "x"])
    read = commands._validate_launch_command(arguments)[0]
    from accelerate.utils import launch as launchers

    if read.use_deepspeed:
        read.deepspeed_fields_from_accelerate_config = ""
        environment = launchers.prepare_deepspeed_cmd_env(read)[1]
    else:
        environment = launchers.prepare_multi_gpu_env(read)
    assert read.num_processes > 1 and read.mixed_precision == "no"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert way_of("auto", False, True) == (file.removesuffix(".yaml").removesuffix("2"), False)
