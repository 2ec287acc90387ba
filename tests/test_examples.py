"""Every example runs as it stands, and the README's Python is cut out of examples."""

import importlib
import json
import os
import pathlib
import re
import runpy
import socket
import subprocess
import sys
import textwrap
import types

import pytest

pytest.importorskip("transformers")

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("[0-9]*.py"))}
MARK = re.compile(r"^[ ]*# --8<-- \[(start|end):(\w+)\]\n", re.M)


def snippets(text: str) -> dict[str, str]:
    """What stands between `# --8<-- [start:NAME]` and `# --8<-- [end:NAME]`, by name."""
    marks = list(MARK.finditer(text))
    found = {}
    for start, end in zip(marks[::2], marks[1::2], strict=True):
        assert (start[1], end[1], start[2]) == ("start", "end", end[2])
        found[start[2]] = textwrap.dedent(text[start.end() : end.start()]).strip("\n")
    return found


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(name) -> what the example leaves behind; it runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(sys, "argv", ["example"])
    return lambda name: runpy.run_path(str(EXAMPLES[name]), run_name="__main__")


def test_logits(run):
    left = run("01_logits")
    trained = left["labels"] != -100
    assert left["loss"].isfinite() and not left["weight"][~trained].any()
    assert left["weight"][trained].mean() < 1  # 20 steps towards the data: the weights fall


def test_hidden_states(run):
    left = run("02_hidden_states")
    assert left["hidden"].shape == (4, 64, 64) and left["head"].weight.grad.any()
    assert left["need"].peak < 3.1 * 2**30  # less than the logits and their gradient


def test_hugging_face(run):
    left = run("03_hugging_face")
    assert left["out"].logp.shape == (1, left["labels"].shape[1] - 1)  # positions with a target
    assert left["out"].loss.isfinite() and left["out"].parts["log_ratio"].abs().max() > 1e-3
    assert left["loss"].isfinite() and "forward" not in vars(left["model"])  # detached


def test_lora(run):
    pytest.importorskip("peft")
    left = run("04_lora_kl")
    assert left["kl"] > 1e-3 and left["out"].parts["kl"].sum() > 0


def test_trainer(run, tmp_path):
    left = run("05_trainer")
    assert left["result"].steps == 3 and (tmp_path / "out" / "train_log.jsonl").exists()
    assert left["result"].step0_max_log_ratio < 1e-4


def test_token_kl(run):
    left = run("06_token_kl")
    kl = left["by_position"]
    assert kl[0] > kl[1] > kl[2] > 5 * kl[3:].max()  # the change was made in the first tokens
    assert left["stats"].entropy.shape == left["labels"].shape and not left["kl"][:32, 15:].any()


def test_custom_loss(run):
    left = run("07_custom_loss")
    assert left["policy_logits"].grad[0, 2].any() and not left["policy_logits"].grad[0, 0].any()
    assert left["official"].isfinite() and left["out"].loss > 0


@pytest.mark.slow
def test_tensor_parallel():
    """As torchrun starts it, less its search for a host name: a minute without a DNS."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(EXAMPLES["08_tensor_parallel"])]
    ranks = [
        subprocess.Popen(command, env={**env, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        said = rank.communicate(timeout=300)[1]
        assert rank.returncode == 0, said[-2000:]


def test_hf_trainer(run):
    pytest.importorskip("accelerate")
    left = run("09_hf_trainer")
    example = left["rows"][0]
    out = left["model"](**{name: column[None] for name, column in example.items()})
    assert out.loss.isfinite() and example["ref_logp"].shape == example["labels"].shape
    assert left["trainer"].state.global_step == 2


def test_lightning(run):
    pytest.importorskip("pytorch_lightning", reason="pip install pytorch-lightning runs it")
    left = run("14_lightning")
    assert left["trainer"].global_step == 2
    assert 0 < abs(left["trainer"].callback_metrics["log_ratio"].item()) < 0.1


def test_accelerate(run):
    pytest.importorskip("accelerate")
    left = run("15_accelerate")
    assert 0 < left["out"].parts["log_ratio"].abs().max() < 0.1  # the second step has moved


def play(modules, monkeypatch):
    """Modules of a package that is not here, with these members."""
    for name, members in modules.items():
        parents = [".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 2)]
        for parent in parents:
            module = sys.modules.get(parent) or types.ModuleType(parent)
            monkeypatch.setitem(sys.modules, parent, module)
        vars(sys.modules[name]).update(members)


def test_axolotl(run, monkeypatch, tmp_path):
    """The plugin as Axolotl would use it, whose classes are played: it wants a GPU to be installed.
    Its trainer is one of transformers."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("pydantic")  # comes with Axolotl
    played = {
        "axolotl.core.trainers.base": {"AxolotlTrainer": transformers.Trainer},
        "axolotl.integrations.base": {"BasePlugin": object},
    }
    play(played, monkeypatch)
    left, tiny = run("16_axolotl"), importlib.import_module("tiny")
    model, tokenizer = tiny.load()
    arguments = transformers.TrainingArguments("out", max_steps=2, report_to="none", use_cpu=True)
    cfg, plugin = types.SimpleNamespace(constrained_data=tiny.CHATS * 2), left["Plugin"]()
    trainer = plugin.get_trainer_cls(cfg)(
        model, arguments, train_dataset=[{"input_ids": [1]}], processing_class=tokenizer
    )
    plugin.post_trainer_create(cfg, trainer)
    trainer.train()
    assert trainer.state.global_step == 2 and left["Arguments"](constrained_data="x")


def test_llamafactory(run, monkeypatch, tmp_path):
    """LLaMA-Factory's functions and trainer are played: it wants an older trl."""
    transformers = pytest.importorskip("transformers")
    tiny = importlib.import_module("tiny")
    model, tokenizer = tiny.load()

    class Theirs(transformers.Seq2SeqTrainer):
        def __init__(self, finetuning_args, processor, tokenizer, **options):
            super().__init__(processing_class=tokenizer, **options)

    how = {"max_steps": 2, "report_to": "none", "use_cpu": True, "predict_with_generate": False}
    arguments = transformers.Seq2SeqTrainingArguments("out", **how)
    tokens = {"tokenizer": tokenizer, "processor": None}
    parts = (None, None, arguments, None, None)
    played = {
        "llamafactory.hparams": {"get_train_args": lambda: parts},
        "llamafactory.model": {
            "load_model": lambda tokenizer, model_args, tuning, is_trainable: model,
            "load_tokenizer": lambda model_args: tokens,
        },
        "llamafactory.train.sft.trainer": {"CustomSeq2SeqTrainer": Theirs},
    }
    play(played, monkeypatch)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in tiny.CHATS * 2))
    monkeypatch.setattr(sys, "argv", ["", "arguments.yaml", str(tmp_path / "chats.jsonl")])
    left = run("18_llamafactory")
    assert left["trainer"].state.global_step == 2
    assert left["trainer"].compute_loss.__qualname__.startswith("ConstrainedMixin")
    assert list((tmp_path / "out").glob("*.safetensors"))


def test_trl(run):
    pytest.importorskip("trl")
    left = run("13_trl")
    assert left["trainer"].state.log_history[0]["weight"] == pytest.approx(1, abs=1e-4)


def test_anchored(run):
    said = run("17_anchored")["result"].metrics
    assert 0 < said["kl_first"] < 0.1 and said["nll"] > 1  # it has moved, a little
    assert len([*pathlib.Path("references").glob("reference-*/hidden.bin")]) == 2


def test_custom_rule(run):
    left = run("10_custom_rule")
    weight = left["parts"].weight
    assert weight[0] > 0.9 and weight[3] < 0.01 and weight[2] == 0  # likely, unlikely, ignored
    assert left["hidden"].grad[0].norm() > 100 * left["hidden"].grad[3].norm() > 0
    assert left["out"].loss.isfinite() and left["result"].steps == 2


def test_analyze(run, tmp_path):
    pytest.importorskip("scipy", reason="the report's intervals are scipy's")
    left = run("12_analyze")
    assert left["kl"].shape == (2, 8) and left["band"].mean[0] > 0.01
    assert [r.cell["step"] for r in left["watch"].records] == [0, 1, 2]
    text = (tmp_path / "out" / "report.html").read_text()
    assert 'data-key="layers-0"' in text and 'data-key="dynamics-nll-0"' in text


def test_each_example_is_short_and_has_a_test():
    text = pathlib.Path(__file__).read_text()
    for name, path in EXAMPLES.items():
        assert f'"{name}"' in text, name
        assert len(path.read_text().splitlines()) <= 60, name


def test_python_of_the_readme_is_cut_out_of_the_examples():
    blocks = re.findall(r"^```python\n(.*?)\n```", (ROOT / "README.md").read_text(), re.M | re.S)
    known = {text for path in EXAMPLES.values() for text in snippets(path.read_text()).values()}
    assert blocks
    for block in blocks:
        assert block in known, f"in no example between two marks:\n{block}"


@pytest.mark.slow
def test_attack(run):
    pytest.importorskip("scipy")
    table = run("12_attack")["table"]
    assert {c.attack for c in table} == {"prefill", "decoding", "gcg", "gcg+prefill"}
    assert len(table) == 2 * (3 + 2 + 1 + 1)
    assert all(c.rate.low <= c.rate.value <= c.rate.high and c.samples == 6 for c in table)
