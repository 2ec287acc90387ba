"""DeepSpeed's ZeRO-2 and ZeRO-3 in two gloo processes against one process without it.

In fp32, which is what DeepSpeed sums in; a larger epsilon keeps AdamW from making a whole step out
of the rounding of a gradient near 0.
"""

import contextlib
import importlib
import importlib.util
import math
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from parallel_runs import compute_before, distance, make, run_case, trained
from tiny_chat import RECORDS, build_model, build_tokenizer
from two_processes import WORLD, run_cases, spawn, start

from deepalign_kernels.train import TrainConfig, economy, prepare
from deepalign_kernels.train.checkpoint import checkpoints
from deepalign_kernels.train.folder import read
from deepalign_kernels.train.ranks import Ranks
from deepalign_kernels.train.state import full_state

BUDGET = 1e-5
BASE = {"dtype": torch.float32, "adam_eps": 1e-2}
PARTS = {"batch_size": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
CASES = {
    "zero2": {"parallel": "zero2"},
    "zero3": {"parallel": "zero3"},
    "zero2, accumulation, clipped": {"parallel": "zero2", **PARTS},
    "zero3, accumulation, clipped, tied head": {"parallel": "zero3", "tied": True, **PARTS},
    "zero2, a process without a row": {"parallel": "zero2", "batch_size": 3, "max_steps": 3},
    "zero3, a process without a row": {"parallel": "zero3", "batch_size": 3, "max_steps": 3},
    "zero2, frozen reference, offload": {
        "parallel": "zero2", "reference": "frozen", "kl_coef": 0.3, "cpu_offload": True,
    },
    "zero3, kept anchors, offload": {"parallel": "zero3", "kl_coef": 0.3, "cpu_offload": True},
    "zero3, LoRA, adapters off": {
        "parallel": "zero3", "lora": True, "reference": "adapter_off", "kl_coef": 0.3,
    },
    "zero2, LoRA, adapters off": {
        "parallel": "zero2", "lora": True, "reference": "adapter_off", "kl_coef": 0.3,
    },
    "zero3, checkpointing, decay": {
        "parallel": "zero3", "gradient_checkpointing": True, "weight_decay": 0.1,
    },
    "zero3, activations away": {
        "parallel": "zero3", "gradient_checkpointing": True, "offload_activations": True,
    },
    "zero2, whole logits, packed": {
        "parallel": "zero2", "head": "logits", "packing": True, "max_batch_tokens": 130,
    },
}  # fmt: skip


def kept(place, way, dtype, **options):
    """What two processes train, by checkpoint: {step: {name: tensor}}; and the run."""
    base = {"parallel": way, "dtype": dtype, "max_steps": 3, "save_every": 1, "keep_checkpoints": 9}
    run = make(place, 2, **base, **options)
    run.train(resume="auto")
    dist.barrier()
    saved = {path.stem: read(path)["model"] for path in checkpoints(place)}
    dist.barrier()
    return run, saved


def bf16(rank, folder, way):
    """[weights that moved, whether the model is the rounded fp32 copy, same bits after a resume]"""
    options = {"learning_rate": 2e-6, "warmup_steps": 0, "lr_schedule": "constant"}
    place = Path(folder) / f"bf16-{way}"
    run, saved = kept(place, way, torch.bfloat16, **options)
    model = full_state(run.model)
    first, _, last = saved.values()
    if rank == 0:
        (place / "checkpoint-0000003.pt").unlink()
    dist.barrier()
    again = kept(place, way, torch.bfloat16, **options)[1]
    if rank:
        return None
    moved = torch.cat([(last[n] != first[n]).flatten() for n in last]).float().mean().item()
    rounded = all(torch.equal(model[n], last[n].bfloat16()) for n in last)
    same = all(torch.equal(x, again["checkpoint-0000003"][n]) for n, x in last.items())
    return [moved, all(x.dtype == torch.float32 for x in last.values()) and rounded, same]


def elsewhere(rank, folder, way):
    """Goes on in other ways, and from them: the distance of the weights at the end, of each."""
    place, out = Path(folder) / f"elsewhere-{way}", []
    gold = kept(place, way, **BASE)[1]["checkpoint-0000003"]
    for first, second in ((way, "ddp"), (way, "fsdp"), ("ddp", way), ("fsdp", way)):
        there = place / f"{first}-{second}"
        kept(there, first, **BASE)
        if rank == 0:
            (there / "checkpoint-0000003.pt").unlink()
        dist.barrier()
        out.append(distance(kept(there, second, **BASE)[1]["checkpoint-0000003"], gold))
    if rank:
        return None
    (there / "checkpoint-0000003.pt").unlink()
    with mock.patch.object(Ranks, "here", lambda device: Ranks()):
        options = {**BASE, "max_steps": 3, "save_every": 1, "parallel": way}
        run = make(there, 1, **options)
        run.train(resume=True)
    return [*out, distance(full_state(run.model), gold)]


def autocast(rank, folder, way):
    """[distance of the gradients from DDP's with the same forwards, from those without autocast]"""
    seen, enabled = {}, torch.is_autocast_enabled
    for parallel, dtype in ((way, "bfloat16"), ("ddp", "bfloat16"), (way, None)):
        options = {**BASE, "parallel": parallel, "autocast_dtype": dtype, "max_steps": 1}
        place = Path(folder) / f"{way}-{parallel}-{dtype}"
        # DeepSpeed asks about the autocast of GPUs only, and puts an end to one that is not its.
        with mock.patch.object(torch, "is_autocast_enabled", lambda at="cpu": enabled(at)):
            seen[parallel, dtype] = trained(place, 2, **options)[0][0]
    ours, ddp, fp32 = seen.values()
    return [distance(ours, ddp), distance(ours, fp32)]


def infinite(logp, ref_logp, beta):
    """A rule with a loss that is finite and a gradient that is not."""
    return logp * 0, logp * 0 + math.inf


def not_finite(rank, folder, way):
    """[the error, whether anything was trained or saved]"""
    place = Path(folder) / f"infinite-{way}"
    run = make(place, 2, **BASE, parallel=way, objective=infinite, warmup_steps=0)
    before = {n: x.clone() for n, x in run.model.state_dict().items()}
    with pytest.raises(FloatingPointError) as error:
        run.train()
    after = full_state(run.model)
    same = all(torch.equal(x, after[n]) for n, x in before.items()) if after else True
    return [str(error.value), same and not checkpoints(place)]


def trls(folder, processes, loaded=None, second=False, **options):
    """(loss, norm of the gradient) of three steps of trl's trainer, each of four conversations.

    `loaded`: a folder with the model, for trl to load; `second`: a reference that runs along."""
    import datasets
    from transformers import AutoModelForCausalLM

    from deepalign_kernels.trl import ConstrainedSFTConfig, ConstrainedSFTTrainer

    config = ConstrainedSFTConfig(
        str(folder), max_steps=3, per_device_train_batch_size=4 // processes, report_to="none",
        use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", learning_rate=1e-3,
        warmup_steps=0, adam_epsilon=1e-2, gradient_checkpointing=False, disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"} if loaded else None,
        reference="model" if second else "precomputed", **options,
    )  # fmt: skip
    data = datasets.Dataset.from_list([r for r in RECORDS if "messages" in r][:4] * 2)
    tools: dict = {"train_dataset": data, "processing_class": build_tokenizer()}
    if second:
        tools["ref_model"] = (
            AutoModelForCausalLM.from_pretrained(loaded) if loaded else build_model(0)
        )
    model = str(loaded) if loaded else build_model(0)
    trainer = ConstrainedSFTTrainer(model, config, **tools)
    shares = [m for m in (trainer.model, trainer.ref_model) if loaded and m is not None]
    assert all(p.numel() == 0 for m in shares for p in m.parameters())
    trainer.train()
    return logged(trainer)


def logged(trainer):
    return [(x["loss"], float(x["grad_norm"])) for x in trainer.state.log_history if "loss" in x]


def transformers_own(folder, processes, loaded=None, **options):
    """As `trls` of transformers' trainer, in two forwards a step, which are of uneven lengths."""
    import transformers

    from deepalign_kernels import hf
    from deepalign_kernels.train import constrained_rows

    class Constrained(hf.ConstrainedMixin, transformers.Trainer):
        pass

    arguments = transformers.TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2 // processes,
        gradient_accumulation_steps=2, report_to="none", use_cpu=True, logging_steps=1,
        save_strategy="no", learning_rate=1e-3, adam_epsilon=1e-2, disable_tqdm=True, **options,
    )  # fmt: skip
    model = build_model(0)
    if loaded:
        model = transformers.AutoModelForCausalLM.from_pretrained(loaded)
        assert all(p.numel() == 0 for p in model.parameters())
    # Of seven, accelerate gives two processes eight, one of them twice.
    rows = constrained_rows(model, build_tokenizer(), [*RECORDS, RECORDS[0]])
    trainer = Constrained(model, arguments, train_dataset=rows)
    trainer.train()
    return logged(trainer)


TRAINERS = {  # of transformers and trl, as their own users ask for DeepSpeed
    "trl, zero2": (trls, {}),
    "trl, zero3": (trls, {}),
    "trl, zero3, loaded in shares, anchors": (trls, {"kl_coef": 0.3}),
    "trl, zero3, loaded in shares, a second model": (trls, {"second": True, "kl_coef": 0.3}),
    "transformers, zero2": (transformers_own, {}),
    "transformers, zero3": (transformers_own, {}),
    "transformers, zero3, loaded in shares": (transformers_own, {}),
}


def others(rank, folder, name):
    train, options = TRAINERS[name]
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"stage": 3 if "zero3" in name else 2, "stage3_param_persistence_threshold": 0}
    config = {"zero_optimization": zero} | dict.fromkeys(auto, "auto")
    if "loaded" in name:
        options = {**options, "loaded": Path(folder) / "model"}
        if rank == 0:
            build_model(0).save_pretrained(options["loaded"])
        dist.barrier()
    return train(Path(folder) / name.replace(" ", "-"), 2, deepspeed=config, **options)


def before(rank, folder, way):
    return compute_before(rank, Path(folder) / way, {**BASE, "parallel": way, "kl_coef": 0.3})


OTHERS = {
    f"{case.__name__} {way}": (case, way)
    for case in (bf16, elsewhere, autocast, not_finite, before)
    for way in ("zero2", "zero3")
}


def truly_shared():
    """DeepSpeed leaves parameters of fewer than 1e5 elements, here all of them, whole between
    steps: not in the block."""
    import deepspeed

    begin = deepspeed.initialize

    def initialize(*, config, **options):
        zero = {**config["zero_optimization"], "stage3_param_persistence_threshold": 0}
        return begin(config={**config, "zero_optimization": zero}, **options)

    return mock.patch.object(deepspeed, "initialize", initialize)


def away(x):
    """`economy.to_host` as on a GPU, a copy. The head's gradient, of a shape that no activation of
    these data has, must not go that way."""
    assert x.shape[-2:] != build_model(0).lm_head.weight.shape
    AWAY.append(x)
    return x.clone()


AWAY = []


def run(rank, folder, name):
    if name in TRAINERS:
        return others(rank, folder, name)
    with truly_shared():
        if "away" in name:
            small = mock.patch.object(economy, "SMALL", 64)
            with small, mock.patch.object(economy, "to_host", away):
                out = run_case(rank, folder, name, {**BASE, **CASES[name]})
            assert len(AWAY) > 20
            return out
        if name in CASES:
            return run_case(rank, folder, name, {**BASE, **CASES[name]})
        case, way = OTHERS[name]
        return case(rank, folder, way)


def work(rank, folder, names):
    own, size = str(rank), str(WORLD)
    os.environ.update({"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    os.environ.update({"RANK": own, "LOCAL_RANK": own, "WORLD_SIZE": size, "LOCAL_SIZE": size})
    # Else DeepSpeed compiles C++ for a minute, for faster reductions on a CPU.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    start(rank, folder)
    run_cases(rank, folder, {name: (folder, name) for name in names}, run)


@pytest.fixture(scope="module")
def results():
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    present = importlib.util.find_spec("peft") is not None
    names = [name for name in CASES if present or "LoRA" not in name]
    present = all(importlib.util.find_spec(name) for name in ("trl", "datasets"))
    names += [*OTHERS, *(name for name in TRAINERS if present or "trl" not in name)]
    return spawn(work, names, limit=400.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(results, name):
    if "LoRA" in name:
        pytest.importorskip("peft", reason="needs peft")
    lines = results.get(name, [])
    print(f"{name:40s} {lines}")
    assert len(lines) == WORLD, f"a process hung or died: {lines}"
    assert isinstance(lines[0], list) and lines[1] is None, lines
    gradients, weights, log, resumed = lines[0]
    assert gradients <= BUDGET and weights <= BUDGET and log <= 1e-4 and resumed <= BUDGET


@pytest.mark.slow
@pytest.mark.parametrize("way", ("zero2", "zero3"))
def test_bf16_weights_are_trained_as_an_fp32_copy(results, way):
    """Steps of 2e-6, which bf16 would lose; a quarter of the weights are embeddings that no token
    uses."""
    moved, rounded, same = results[f"bf16 {way}"][0]
    assert moved > 0.7 and rounded and same


@pytest.mark.slow
@pytest.mark.parametrize("way", ("zero2", "zero3"))
def test_a_run_goes_on_in_another_way(results, way):
    """From DeepSpeed to DDP, FSDP2 and one process, and back from the first two."""
    gaps, other = results[f"elsewhere {way}"]
    assert other is None and len(gaps) == 5 and max(gaps) <= BUDGET, gaps


@pytest.mark.slow
@pytest.mark.parametrize("way", ("zero2", "zero3"))
def test_autocast_is_that_of_ddp(results, way):
    lines = results[f"autocast {way}"]
    assert all(same <= BUDGET and other > 1e-4 for same, other in lines), lines


@pytest.mark.slow
@pytest.mark.parametrize("way", ("zero2", "zero3"))
def test_a_gradient_that_is_not_finite_ends_the_run(results, way):
    lines = results[f"not_finite {way}"]
    assert len(lines) == WORLD
    assert all("step 1: grad_norm is inf" in why and same for why, same in lines), lines


@pytest.mark.slow
@pytest.mark.parametrize("way", ("zero2", "zero3"))
def test_a_reference_that_two_processes_compute_before_a_run(results, way):
    gap, other = results[f"before {way}"]
    assert other is None and isinstance(gap, float) and gap <= BUDGET, gap


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_the_trainers_of_others_under_deepspeed(results, name, tmp_path):
    """Losses and norms of one process, whose model is built, not loaded."""
    if "trl" in name:
        pytest.importorskip("trl", reason="needs trl")
        pytest.importorskip("datasets", reason="needs datasets")
    train, options = TRAINERS[name]
    lines, gold = results[name], train(tmp_path / "one", 1, **options)
    print(lines, gold)
    assert len(lines) == WORLD and len(gold) == 3
    for ours in lines:
        assert torch.tensor(ours).allclose(torch.tensor(gold), rtol=1e-5), lines


@pytest.mark.parametrize(
    "way, processes, options, dtype, said",
    (
        ("zero2", 1, {}, torch.float32, "cpu_offload: .*'zero2' offloads in several processes"),
        ("zero2", 2, {"optimizer": torch.optim.SGD}, torch.float32, "optimizer: .*flat pieces"),
        (
            "zero2",
            2,
            {"optimizer": "adamw_kahan"},
            torch.float32,
            "optimizer: 'adamw_kahan' is not",
        ),
        ("zero3", 2, {"compile_layers": True}, torch.float32, "compile_layers: not known"),
        ("zero3", 2, {}, torch.float64, "model: .*fp32 or bf16, got torch.float64"),
        ("zero3", 2, {"reference": "frozen"}, torch.float32, "reference: with parallel='zero3' a"),
        ("zero2", 2, {"reference": "frozen"}, torch.float32, None),
        ("zero3", 2, {"objective": "sft", "reference": "frozen"}, torch.float32, None),
        ("zero3", 2, {}, torch.bfloat16, None),
    ),
)
def test_what_is_refused(tmp_path, monkeypatch, way, processes, options, dtype, said):
    monkeypatch.setattr(prepare, "installed", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    config = TrainConfig(tmp_path, parallel=way, **options)
    about = config, way, processes, build_model(0).to(dtype), None
    with contextlib.nullcontext() if said is None else pytest.raises(ValueError, match=said):
        prepare.check_several(*about)


def test_without_deepspeed_or_a_launcher_the_reason_is_said(tmp_path, monkeypatch):
    about = TrainConfig(tmp_path, parallel="zero3"), "zero3", 2, build_model(0), None
    for there, said in ((False, "parallel: 'zero3' needs deepspeed"), (True, "needs LOCAL_RANK")):
        monkeypatch.setattr(prepare, "installed", lambda there=there: there)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        with pytest.raises(ValueError, match=said):
            prepare.check_several(*about)
