"""`deepalign plan`: its bytes against those that torch's allocator counts in a real run."""

import json

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from tiny_chat import build_tokenizer

from deepalign_kernels import plan
from deepalign_kernels._memory import measure
from deepalign_kernels.data import Example
from deepalign_kernels.plan import command
from deepalign_kernels.train import TrainConfig, TrainingRun
from deepalign_kernels.train.lora import Lora

BATCH, LENGTH = 4, 64


def config(kind="Llama", **options):
    sizes = {
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    return getattr(transformers, f"{kind}Config")(**{**sizes, **options})


def peak_of_a_run(model_config, setting, folder, adapt=None):
    """Most bytes allocated from building the model to the end of its second step."""
    ids = torch.randint(10, 8000, (BATCH, LENGTH)).tolist()
    rows = [Example(row, [-100] + row[1:], list(range(LENGTH))) for row in ids]
    options = TrainConfig(
        folder, max_steps=2, batch_size=BATCH, gradient_accumulation_steps=1, save_every=None,
        progress=False, gradient_checkpointing=setting.gradient_checkpointing, warmup_steps=0,
        autocast_dtype="bfloat16" if setting.autocast else None, optimizer=setting.optimizer,
        release_gradients=setting.release_gradients, learning_rate=1e-2,
        kl_coef=0.3 * setting.anchored, reference_dtype="float32",
    )  # fmt: skip

    def run():
        dtype = getattr(torch, setting.dtype)
        model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=dtype)
        model = model if adapt is None else adapt(model)
        TrainingRun(model, build_tokenizer(), options, rows).train()

    return measure(run)[1].peak


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind,tied,options",
    [
        ("Llama", True, {"gradient_checkpointing": True}),
        ("Qwen3", False, {"autocast": True}),
        ("Llama", False, {"release_gradients": True, "gradient_checkpointing": True}),
        ("Qwen2", False, {"dtype": "bfloat16"}),
        ("Llama", False, {"anchored": True, "reference_head": True}),
        ("Llama", True, {"rank": 8}),
    ],
    ids=str,
)
def test_peak_is_within_a_tenth(kind, tied, options, tmp_path):
    options = dict(options)
    rank = options.pop("rank", None)
    adapt = Lora(rank).adapt if rank else None
    model, setting = config(kind, tie_word_embeddings=tied), plan.Setting(**options)
    sizes = {"batch": BATCH, "length": LENGTH, "device": "cpu"}
    expected = plan.estimate(plan.shape_of(model, adapt), setting, **sizes)
    measured = peak_of_a_run(model, setting, tmp_path, adapt)
    assert measured == pytest.approx(expected.peak, rel=0.1)


@pytest.mark.parametrize("kind,tied", [("Llama", True), ("Mistral", False), ("Gemma3Text", True)])
def test_a_shape_is_the_models(kind, tied):
    shape = plan.shape_of(config(kind, tie_word_embeddings=tied))
    model = transformers.AutoModelForCausalLM.from_config(shape.config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    layers = model.get_decoder().layers
    assert shape.layer == sum(p.numel() for p in layers[0].parameters())
    assert (shape.tied, shape.head, shape.layers) == (tied, 8192 * 256, len(layers))


def test_what_is_shared_and_what_is_not():
    shape, sizes = plan.shape_of(config()), {"batch": BATCH, "length": LENGTH}
    plain = plan.Setting(autocast=True)
    one, four = (plan.estimate(shape, plain, **sizes, gpus=n) for n in (1, 4))
    assert four.weights == one.weights // 4 and four.activations == one.activations
    assert four.gathered == 2 * (2 * shape.layer + shape.head) and one.gathered == 0
    offload = plan.estimate(shape, plan.Setting(cpu_offload=True), **sizes)
    assert offload.host == 16 * shape.parameters and offload.states == 0
    frozen = plan.Setting(autocast=True, frozen_reference=True)
    two_models = plan.estimate(shape, frozen, **sizes)
    assert two_models.peak - one.peak == 4 * shape.parameters
    twice = plan.estimate(shape, plain, **sizes, accumulate=True)
    assert twice.peak - one.peak <= one.gradients  # at the end of the forward they are there too
    bits = plan.estimate(shape, plan.Setting(dtype="bfloat16", optimizer="adamw_8bit"), **sizes)
    assert bits.weights + bits.states == 4 * shape.parameters


def told(capsys, folder, **options):
    status = command.run(command.Options(str(folder), seq=64, **options))
    return status, capsys.readouterr().out


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    config(hidden_size=1024, intermediate_size=4096, num_hidden_layers=40).save_pretrained(tmp_path)
    status, roomy = told(capsys, tmp_path, gpu_memory=80)
    assert status == 0 and "fp32: fp32 weights, bf16 products" in roomy
    status, tight = told(capsys, tmp_path, gpu_memory=5, json=True)
    answer = json.loads(tight)
    recipe = next(r for r in plan.RECIPES if r.name == answer["recipe"])
    assert status == 0 and recipe.name != "fp32" and "whole" not in tight
    assert answer["bytes"][recipe.name]["peak"] <= 4 * 2**30 < answer["bytes"]["fp32"]["peak"]
    status, none = told(capsys, tmp_path, gpu_memory=1.1)
    assert status == 1 and "GiB over. Shorter sequences" in none
    status, none = told(capsys, tmp_path, gpu_memory=2, host_memory=1)
    assert status == 1 and "GiB of host memory" in none


def test_its_command_line_is_the_trainers(tmp_path):
    config().save_pretrained(tmp_path)
    from deepalign_kernels.train.__main__ import parser

    for recipe in plan.RECIPES:
        for gpus in (1, 2):
            options = command.Options(str(tmp_path), gpus=gpus)
            words = command.command(options, recipe).split(" --model ")[1].split()
            parsed = vars(parser().parse_args(["--model", *words]))
            for name in ("optimizer", "release_gradients", "gradient_checkpointing", "dtype"):
                assert parsed[name] == getattr(recipe.setting, name), recipe.name


def test_adapters_in_the_place_of_all_weights(tmp_path, capsys):
    config(hidden_size=1024, intermediate_size=4096, num_hidden_layers=40).save_pretrained(tmp_path)
    options = {"lora_rank": 8, "lora_target_modules": ("q_proj", "down_proj"), "gpu_memory": 4}
    status, said = told(capsys, tmp_path, **options)
    trained = 40 * 8 * (1024 + 1024 + 4096 + 1024)  # [r, in] and [out, r] of both, 40 times
    assert status == 0 and f"trained: adapters of {trained / 1e6:.3g} million" in said
    assert "--lora-rank 8 --lora-target-modules q_proj down_proj" in said
    status, said = told(capsys, tmp_path, gpu_memory=1.8, **{k: options[k] for k in ("lora_rank",)})
    assert (
        status == 1 and "more devices (--gpus)" in said and "adapters" not in said.split("over")[1]
    )
    with pytest.raises(ValueError, match="lora_target_modules: without lora_rank"):
        told(capsys, tmp_path, lora_target_modules=("q_proj",))


def test_deepspeed_keeps_a_copy_of_the_weights():
    """Bytes per parameter of each of four, as the docs have it."""
    shape, sizes = plan.shape_of(config()), {"batch": BATCH, "length": LENGTH, "gpus": 4}
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        for way, shared in (("zero2", 1), ("zero3", 4)):
            setting = plan.Setting(dtype=dtype, parallel=way)
            found = plan.estimate(shape, setting, **sizes)
            n = shape.parameters
            assert found.weights == n * size // shared
            assert found.states == n * (4 + 8) // 4 and found.gradients == n * 4 // 4
    two = plan.estimate(shape, plan.Setting(parallel="zero2", cpu_offload=True), **sizes)
    assert two.weights == 4 * n and two.host == n * (4 + 8 + 4) // 4
    alone = plan.estimate(shape, plan.Setting(parallel="ddp"), **sizes)
    assert alone == plan.estimate(shape, plan.Setting(), **{**sizes, "gpus": 1})


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="model: no config of /nowhere"):
        plan.shape_of("/nowhere")
    with pytest.raises(ValueError, match="T5Config is not that of a decoder-only"):
        plan.shape_of(transformers.T5Config())
    with pytest.raises(ValueError, match="optimizer: expected one of"):
        plan.Setting(optimizer="adam")
    shape = plan.shape_of(config())
    with pytest.raises(ValueError, match="batch: expected an integer >= 1, got 0"):
        plan.estimate(shape, plan.Setting(), batch=0, length=8)
    with pytest.raises(ValueError, match="release_gradients: a gradient that is gone"):
        release = plan.Setting(release_gradients=True)
        plan.estimate(shape, release, batch=1, length=8, accumulate=True)
    with pytest.raises(ValueError, match="gpu_memory"):
        command.run(command.Options(str(tmp_path), gpu_memory=0.5))
