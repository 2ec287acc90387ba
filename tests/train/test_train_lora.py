"""LoRA from the command line, against peft used by hand."""

import json
import re

import pytest

pytest.importorskip("peft", reason="needs peft")

import peft
import torch
from tiny_chat import RECORDS, build_model, build_tokenizer
from train_runs import log_of
from transformers import AutoModelForCausalLM

from deepalign_kernels.train import command
from deepalign_kernels.train.__main__ import main
from deepalign_kernels.train.folder import read
from deepalign_kernels.train.lora import Lora

LORA = ["--lora-rank", "2", "--lora-alpha", "6", "--lora-target-modules", "q_proj", "v_proj"]
IDS = torch.tensor([[1, 9, 40, 7, 200, 31]])


@pytest.fixture
def arguments(tmp_path):
    build_model(0).save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    base = ["--model", str(tmp_path / "base"), "--data", str(data), "--no-progress"]
    base += ["--batch-size", "7", "--gradient-accumulation-steps", "1", "--max-steps", "3"]
    return [*base, "--learning-rate", "1e-2", "--warmup-steps", "0", "--device", "cpu"]


def numbers(folder):
    """Of the log's lines about steps, but for the speed."""
    rows = [r for r in log_of(folder) if r["event"] == "step"]
    return [{k: v for k, v in r.items() if k not in ("tokens_per_s", "event")} for r in rows]


def test_what_is_trained_and_saved_are_adapters(arguments, tmp_path):
    """The folder is peft's, or whole with --lora-merge; both references say the same; a cut run
    ends with the same bits."""
    kept, live = tmp_path / "kept", tmp_path / "live"
    merged = [*arguments, *LORA, "--lora-merge", "--save-every", "2", "--output", str(kept)]
    assert main(merged) == 0
    assert main([*arguments, *LORA, "--reference", "adapter_off", "--output", str(live)]) == 0
    for a, b in zip(numbers(kept), numbers(live), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    assert numbers(live)[-1]["nll"] < numbers(live)[0]["nll"]

    state = read(live / "checkpoint-0000003.pt")["model"]
    assert len(state) == 2 * 2 * 2 and all("lora_" in name for name in state)
    model = peft.PeftModel.from_pretrained(build_model(0), live / "model")
    own = model.peft_config["default"]
    assert (own.r, own.lora_alpha, own.target_modules) == (2, 6, {"q_proj", "v_proj"})
    assert own.base_model_name_or_path == str(tmp_path / "base")
    found = dict(model.state_dict())
    assert all(torch.equal(found[name], x) for name, x in state.items())
    loaded = AutoModelForCausalLM.from_pretrained
    logits = model(IDS).logits
    assert (logits - build_model(0)(IDS).logits).abs().max() > 1e-3
    torch.testing.assert_close(loaded(live / "model")(IDS).logits, logits)  # as transformers does
    whole = loaded(kept / "model")
    assert not any("lora" in name for name in whole.state_dict())
    torch.testing.assert_close(whole(IDS).logits, logits, rtol=1e-4, atol=1e-4)

    straight = read(kept / "checkpoint-0000003.pt")["model"]
    (kept / "checkpoint-0000003.pt").unlink()
    assert main([*merged, "--resume"]) == 0
    again = read(kept / "checkpoint-0000003.pt")["model"]
    assert all(torch.equal(again[name], x) for name, x in straight.items())


def test_adapters_are_fp32_and_change_nothing_at_first():
    plain = build_model(0).bfloat16()
    model = Lora(rank=3).adapt(build_model(0).bfloat16(), seed=5)
    assert torch.equal(plain(IDS).logits, model(IDS).logits)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert not any("lm_head" in name for name in trained) and len(trained) == 2 * 7 * 2
    again = dict(Lora(rank=3).adapt(build_model(0).bfloat16(), seed=5).named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in trained.items())
    assert model.peft_config["default"].lora_alpha == 6


@pytest.mark.parametrize(
    "more,said",
    [
        (["--lora-alpha", "3"], "lora_alpha: without lora_rank all weights are trained"),
        (["--lora-rank", "0"], "lora_rank: expected an int >= 1, got 0"),
        (["--lora-rank", "2", "--lora-dropout", "1"], "lora_dropout: "),
        (["--reference", "adapter_off"], "reference: 'adapter_off' is a model without its"),
        ([*LORA[:2], "--lora-target-modules", "q_pro"], "no layer 'q_pro'; did you mean 'q_proj'"),
        ([*LORA, "--lora-merge", "--parallel", "fsdp"], "lora_merge: not with parallel='fsdp'"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    more, said, arguments, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("weights were read"))
    assert main([*arguments, *more, "--output", str(tmp_path / "out")]) == 2
    assert re.search(said, capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_other_adapters_are_another_run(arguments, tmp_path, capsys):
    out = ["--output", str(tmp_path / "out")]
    assert main([*arguments, *LORA, *out]) == 0
    for at, value, said in (
        (3, "7", "of its adapters lora_alpha was 6.0, is 7.0"),
        (1, "4", "of its adapters r was 2, is 4"),
    ):
        other = [*LORA[:at], value, *LORA[at + 1 :]]
        assert main([*arguments, *other, *out, "--resume"]) == 2
        assert said in capsys.readouterr().err
    assert main(["--model", str(tmp_path / "out" / "model"), *arguments[2:], "--output", "x"]) == 2
    assert "holds adapters of a model, not a model" in capsys.readouterr().err


@pytest.mark.clean_memory  # a model is made on the meta device
def test_a_dry_run_counts_adapters(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("weights were read"))
    out = ["--output", str(tmp_path / "out"), "--dry-run"]
    assert main([*arguments, *LORA, "--reference", "adapter_off", "--kl-coef", "0.1", *out]) == 0
    shown = capsys.readouterr().out
    trained = 2 * 2 * (32 + 32 + 32 + 16)  # of q_proj [32, 32] and v_proj [16, 32] in two layers
    assert f"trained: adapters of {trained / 1e6:.3g} million, fp32" in shown
    assert "reference adapter_off" in shown
