"""The Python of the README runs as printed, block after block in one namespace."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from tiny_chat import build_model, build_tokenizer  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def block(word: str) -> str:
    """The one block that holds `word`."""
    (found,) = (b for b in BLOCKS if word in b)
    return found


@pytest.fixture(scope="module")
def names():
    """What the blocks before left behind, and what each takes for granted."""
    return {"torch": torch, "AutoModelForCausalLM": AutoModelForCausalLM}


def run(names, word):
    exec(compile(block(word), f"README: {word}", "exec"), names)
    return names


def test_every_block_is_run_here():
    text = pathlib.Path(__file__).read_text()
    words = re.findall(r'(?:run\(names|block\()\W*"(.+?)"', text)
    assert {block(word) for word in words} == {*BLOCKS}


def test_logits_level(names):
    run(names, "policy_logits = torch.randn(2, 6, 1000, requires_grad=True)  # [B, T, V]")
    assert names["policy_logits"].grad[0, 2].any() and names["loss"].isfinite()
    run(names, "stats = dak.token_stats")
    assert names["stats"].entropy.shape == (2, 6) and names["loss"].isfinite()
    run(names, "dak.estimate_memory")
    assert names["hidden"].grad[0, 2].any()


def test_shards(tmp_path):
    """As torchrun starts it, less its search for a host name: a minute without a DNS."""
    script = tmp_path / "shards.py"
    script.write_text(block("dist.init_process_group"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(script)]
    ranks = [
        subprocess.Popen(command, env={**env, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        said = rank.communicate(timeout=300)[1]
        assert rank.returncode == 0, said[-2000:]


def test_training(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "three"}]
    line = json.dumps({"messages": turns})
    (tmp_path / "chats.jsonl").write_text(f"{line}\n" * 8)
    names |= {"model": build_model(), "tokenizer": build_tokenizer()}
    run(names, "ConstrainedSFTTrainer(model")
    assert any((tmp_path / "out").iterdir())


def test_hugging_face(names, tmp_path):
    run(names, "policy_logits = torch.randn(2, 6, 1000, requires_grad=True)  # [B, T, V]")
    build_model().save_pretrained(tmp_path)
    ids = torch.randint(6, 200, (2, 9))
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    names |= {"name": str(tmp_path), "input_ids": ids, "ids": ids, "labels": labels}
    names["attention_mask"] = torch.ones_like(ids)
    run(names, "hf.verify(model, input_ids)")
    assert names["out"].logp.shape == (2, 8)  # positions that predict a token

    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    plain, names["model"] = names["model"], peft.get_peft_model(names["model"], config)
    run(names, "model.disable_adapter()")
    assert names["out"].loss.isfinite()
    run(names, "def focal(head)")
    out = names["model"](input_ids=ids, labels=labels, dak_loss=names["focal"])
    assert out.loss > 0

    names["ref_logp"] = torch.full(ids.shape, -3.0)
    run(names, "[:, :-1], labels[:, 1:]")
    assert names["loss"].isfinite()
    names["model"] = plain
    run(names, "model.loss_function")
    positions = names["dak"].response_positions(labels)
    out = plain(
        input_ids=ids, labels=labels, ref_logp=names["ref_logp"], response_positions=positions
    )
    assert out.loss.isfinite()
