"""recipes/*.yaml: each runs dry on a tiny model of its architecture, and fits the card it names."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tyro", reason="needs tyro")

import recipe_models
import torch
import transformers
from tiny_chat import RECORDS, build_model, build_tokenizer
from train_runs import RUN
from transformers import AutoModelForCausalLM

from deepalign_kernels import plan
from deepalign_kernels.cli.options import parse
from deepalign_kernels.losses import BetaSchedule
from deepalign_kernels.train import TrainConfig, TrainingRun, command, dry_run
from deepalign_kernels.train import checkpoint as ckpt
from deepalign_kernels.train.load import load_model
from deepalign_kernels.train.optimizers import OPTIMIZERS
from deepalign_kernels.train.state import full_state

pytestmark = [
    pytest.mark.clean_memory,  # a model is made on the meta device
    pytest.mark.filterwarnings("ignore:warmup_steps. 10 of 3 steps"),
]

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
GIB = 2**30
TABLE = re.findall(
    r"^\| `(\S+)` \| (\d+) \| (\d+) x (\d+) \| ([\d.]+) \| (\d*) \|",
    (ROOT / "docs/guide/recipes.md").read_text(),
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name in a recipe: folder with a tiny model of that architecture}; data lie beside them."""
    folder, out = tmp_path_factory.mktemp("models"), {}
    (folder / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    for recipe in RECIPES:
        name = re.search(r"^model: (\S+)$", recipe.read_text(), re.MULTILINE)[1]
        out[name] = folder / name
        if not out[name].exists():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(recipe_models.tiny(name))
            model.save_pretrained(out[name])
            build_tokenizer().save_pretrained(out[name])
    return out, folder / "chats.jsonl"


def card_of(recipe):
    """(GPUs, GiB of each) in the name of the file."""
    return tuple(map(int, re.search(r"-(\d)x(\d+)gb$", recipe.stem).groups()))


def options_of(recipe, data, out, *more):
    words = ["--config", str(recipe), "--data", str(data), "--output", str(out), "--no-progress"]
    return parse(command.Options, [*words, "--device", "cpu", *more], "deepalign train")


LATER = pytest.mark.skipif(
    transformers.__version__ < "5", reason="transformers 4 lays Gemma 3 out in another way"
)


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(
            path,
            id=path.stem,
            marks=[LATER] * ("gemma-3" in path.stem)
            + [pytest.mark.slow] * ("1x48gb" not in path.stem),
        )
        for path in RECIPES
    ],
)
def test_a_recipe_runs_dry_and_fits_its_card(recipe, models, tmp_path, monkeypatch):
    folders, data = models
    gpus, card = card_of(recipe)
    monkeypatch.setenv("WORLD_SIZE", str(gpus))
    named = options_of(recipe, data, tmp_path / "out").model
    options = options_of(
        recipe, data, tmp_path / "out", "--model", str(folders[named]), "--dry-run"
    )
    if package := OPTIMIZERS[options.optimizer].package:
        pytest.importorskip(package, reason=f"{options.optimizer} needs {package}")
    run = command.build(options)
    said = dry_run.facts(run, options.dtype)
    assert said["data"]["conversations"] == len(RECORDS) and said["steps"]["total"] == 3
    assert said["steps"]["processes"] == gpus and not (tmp_path / "out").exists()
    assert said["steps"]["conversations"] == (8 if run.config.release_gradients else 64)
    assert "the first conversation:" in dry_run.as_text(run, said)

    config, shape = run.config, plan.shape_of(recipe_models.real(named))
    memory = plan.estimate(
        shape,
        plan.Setting.of_run(config, options.dtype),
        batch=config.batch_size,
        length=config.max_length,
        gpus=gpus,
        accumulate=config.gradient_accumulation_steps > 1,
    )
    assert memory.peak <= (card - 1) * GIB
    written = {name: numbers for name, *numbers in TABLE}[recipe.stem]
    step = said["steps"]["conversations"]
    host = f"{memory.host / GIB:.0f}" if memory.host else ""
    assert written == [
        str(step), str(gpus), str(card), f"{memory.peak / GIB:.1f}", host,
    ]  # fmt: skip


def test_every_recipe_is_in_the_table_with_its_command():
    assert [name for name, *_ in TABLE] == [recipe.stem for recipe in RECIPES]
    for recipe in RECIPES:
        first, gpus = recipe.read_text().splitlines()[0], card_of(recipe)[0]
        assert f"--config recipes/{recipe.name} --data FILE --output DIR" in first
        assert (f"torchrun --nproc-per-node {gpus} " in first) == (gpus > 1)


def test_papers_recipes_are_the_papers(models, tmp_path):
    folders, data = models
    for name, rate in (("llama-2-7b-chat", 2e-5), ("gemma-1.1-7b-it", 5e-6)):
        o = options_of(ROOT / f"recipes/{name}-paper-4x80gb.yaml", data, tmp_path)
        assert (o.learning_rate, o.epochs, o.warmup_steps) == (rate, 3, 10)
        assert o.adam_betas == (0.5, 0.999) and o.max_grad_norm is None
        assert command.schedule_of(o) == BetaSchedule(0.5, 2.0, 0.1, 5) and o.batch_size * 4 == 64


@LATER
def test_of_a_checkpoint_with_images_the_text_model_is_trained(models, tmp_path):
    """Its own class asks for images' token types in training, and `attach` refuses it."""
    folder = models[0]["google/gemma-3-4b-it"]
    ids = torch.arange(10, 30)[None]
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    text = load_model(folder, torch.float32)
    assert type(whole) is not type(text) and text.config.vocab_size == 262
    with torch.no_grad():
        expected = whole(input_ids=ids).logits
        assert torch.equal(text(input_ids=ids).logits, expected)
    config = TrainConfig(tmp_path / "out", **{**RUN, "learning_rate": 1e-3})
    run = TrainingRun(text, build_tokenizer(), config, RECORDS)
    assert run.train().step0_max_log_ratio < 1e-4
    run.save_model(tmp_path / "model")
    with torch.no_grad():
        trained = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(input_ids=ids).logits
        assert torch.equal(trained, text.eval()(input_ids=ids).logits)
        assert not torch.equal(trained, expected)


def test_one_process_offloads_too(tmp_path, monkeypatch):
    """As the recipes for 24 GB do; before, it was passed over without a word."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    states, options = [], {**RUN, "max_steps": 3, "learning_rate": 1e-3, "batch_size": 4}
    try:
        for name, more in (("plain", {}), ("away", {"parallel": "fsdp", "cpu_offload": True})):
            config = TrainConfig(tmp_path / name, **{**options, "save_every": 3}, **more)
            run = TrainingRun(build_model(0).double(), build_tokenizer(), config, RECORDS)
            run.train()
            sharded = {type(p).__name__ for p in run.model.parameters()} == {"DTensor"}
            assert sharded == (name == "away")
            states.append(full_state(run.model))
        saved = [ckpt.load_newest(tmp_path / name)[1]["model"] for name in ("plain", "away")]
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    for state in (states[1], *saved):
        for name, x in states[0].items():
            torch.testing.assert_close(state[name], x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options,said",
    [
        ({"cpu_offload": True}, "cpu_offload: parallel='auto' keeps all .*give parallel='fsdp'"),
        (
            {"release_gradients": True, "max_batch_tokens": 99},
            "release_gradients: .*max_batch_tokens may make several forwards of a step",
        ),
    ],
)
def test_choices_that_were_passed_over_are_refused(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        TrainConfig(tmp_path, **{**RUN, **options})
    with pytest.raises(ValueError, match="optimizer: 'adamw_kahan' is not known to shard"):
        about = {"parallel": "fsdp", "cpu_offload": True, "optimizer": "adamw_kahan"}
        TrainingRun(
            build_model(0), build_tokenizer(), TrainConfig(tmp_path, **RUN, **about), RECORDS
        )
