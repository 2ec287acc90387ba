"""What a type checker says of a user's project: right calls are clean, wrong ones are errors."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

import deepalign_kernels as dak

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = """
import torch
from transformers import LlamaForCausalLM

import deepalign_kernels as dak
from deepalign_kernels import hf
from deepalign_kernels.train import TrainConfig, fit


def right(x: torch.Tensor, y: torch.Tensor, model: LlamaForCausalLM) -> None:
    dak.constrained_loss(x, y, beta=0.5, ref_logp=x).backward()
    loss, parts = dak.constrained_loss(x, y, beta=0.5, ref_logits=x, return_parts=True)
    (loss + parts.weight.sum()).backward()
    total, more = dak.linear_constrained_loss(x, x, y, beta=0.5, ref_logp=x, return_parts=True)
    print(total.item(), more.logp.shape, dak.token_kl(x, x, direction="js").sum())
    dak.linear_constrained_loss(x, x, y, objective="dft", softcap=30.0, reduction="sum").backward()
    options: dak.LinearOptions = {"softcap": 30.0, "max_workspace_bytes": 2**20}
    direction: dak.Direction = "js"
    reduction: dak.Reduction = "sum"
    rule: dak.Rule = lambda logp, ref_logp, beta: (-logp, torch.ones_like(logp))
    dak.linear_token_kl(x, x, x, x, direction=direction, reduction=reduction).backward()
    dak.linear_constrained_loss(x, x, y, objective=rule).backward()
    profile: dak.TokenProfile = dak.linear_token_profile(x, x, x, x, y)
    print(profile.rank.shape, dak.attack.Prefill, dak.trl.ConstrainedSFTTrainer)
    dak.linear_token_logp(x, x, y, **options).sum().backward()
    hf.attach(model).save_pretrained("out")
    with dak.hf.attached(model) as attached:
        print(attached.config)
    print(fit(model, None, TrainConfig("out"), data="chats.jsonl").steps)


def wrong(x: torch.Tensor, y: torch.Tensor) -> None:
    dak.constrained_loss(x, y, beta=0.5, ref_logp=x, objective="exakt")  # error
    dak.token_kl(x, x, direction="forward")  # error
    dak.linear_constrained_loss(x, x, y, reduction="average")  # error
    dak.linear_token_logp(x, x, y, tempratur=2.0)  # error
    options: dak.LinearOptions = {"max_workspace": 2**20}  # error
    print(options)
    dak.linear_token_stats(x, x, x, x, grad_weight_dtype=torch.float32)  # error
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is not installed")
def test_a_users_project(tmp_path):
    (tmp_path / "project.py").write_text(PROJECT)
    settings = {"extraPaths": [str(ROOT)], "typeCheckingMode": "basic"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run([*command, "-p", str(tmp_path)], capture_output=True, text=True)
    found = json.loads(done.stdout)["generalDiagnostics"]
    lines = {d["range"]["start"]["line"] for d in found if d["severity"] == "error"}
    wanted = {i for i, line in enumerate(PROJECT.splitlines()) if line.endswith("# error")}
    assert lines == wanted, "\n".join(d["message"] for d in found)


@pytest.mark.slow
def test_rooms_that_are_imported_late_are_shown():
    """Each folder of the package but the insides and the command line is an attribute of it."""
    pytest.importorskip("trl", reason="of the room `trl`")
    folders = {file.parent.name for file in (ROOT / "deepalign_kernels").glob("*/__init__.py")}
    rooms = folders - {"cli", "ops", "reference", "triton_kernels"}
    assert {*rooms, *dak.__all__} <= set(dir(dak))
    assert "importlib" not in dir(dak)
    code = "import deepalign_kernels as dak\nprint(*(getattr(dak, n).__name__ for n in dak._LAZY))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == [f"deepalign_kernels.{room}" for room in sorted(rooms)]
