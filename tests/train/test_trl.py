"""trl's SFTTrainer with the constrained loss: the thin loop's numbers, in every mode of trl's."""

import math

import pytest

pytest.importorskip("trl", reason="needs trl")
pytest.importorskip("datasets", reason="needs datasets")

import datasets
import peft
import torch
import trl
from tiny_chat import RECORDS, build_model, build_tokenizer
from train_runs import train

import deepalign_kernels as dak
from deepalign_kernels.analyze import profile
from deepalign_kernels.analyze.dynamics import Dynamics
from deepalign_kernels.data.examples import Encoding
from deepalign_kernels.trl import ConstrainedSFTConfig, ConstrainedSFTTrainer
from deepalign_kernels.trl.columns import tokenized

CHATS = [r for r in RECORDS if "messages" in r]
HALF = [{**m, "weight": 0.3} if m["role"] == "assistant" else m for m in CHATS[0]["messages"]]
SCALED = [{**chat, "beta_scale": scale} for chat, scale in zip(CHATS[1:], (3.0, 0.0), strict=False)]
# And scaled; `from_list` takes the keys of the first one.
WEIGHTED = [{"messages": HALF, "beta_scale": None}, *SCALED, *CHATS[3:]]
BROKEN = [{"messages": [{"role": "user", "content": "hi"}]}, {"messages": None}]
STEPS, EPS = 4, 1e-2  # Adam's: with less, what rounding leaves of a gradient of 0 moves weights
PLAIN = {
    "max_steps": STEPS, "per_device_train_batch_size": 6, "learning_rate": 1e-2, "warmup_steps": 0,
    "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no",
    "adam_epsilon": EPS, "gradient_checkpointing": False, "disable_tqdm": True,
    "lr_scheduler_type": "linear",
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def trained(
    folder, model=None, data=CHATS, resume=None, ref_model=None, lora=None, callbacks=(), **options
):
    config = ConstrainedSFTConfig(str(folder), **{**PLAIN, **options})
    model = build_model() if model is None else model
    trainer = ConstrainedSFTTrainer(
        model,
        config,
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=build_tokenizer(),
        ref_model=ref_model,
        peft_config=lora,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [r for r in trainer.state.log_history if "loss" in r]


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """The thin loop's parameters and nll after the same steps, of a rule and of plain SFT."""
    out = {}
    for name, data, more in (
        ("constrained", CHATS, {}),
        ("sft", CHATS, {"objective": "sft"}),
        ("weighted", WEIGHTED, {}),
        ("anchored", CHATS, {"kl_coef": 0.5, "kl_positions": 3, "reference_dtype": "float32"}),
    ):
        run, result = train(
            build_model(), tmp_path_factory.mktemp("loop"), data, max_steps=STEPS, batch_size=6,
            learning_rate=1e-2, max_grad_norm=None, adam_eps=EPS, **more,
        )  # fmt: skip
        out[name] = dict(run.model.named_parameters()), result.metrics["nll"]
    return out


def distance(model, expected):
    """Largest difference between parameters, relative to how far training moved them."""
    start = dict(build_model().named_parameters())
    moved = max((expected[n] - p).abs().max() for n, p in start.items())
    ours = dict(model.named_parameters())
    return max((ours[n] - p).abs().max() for n, p in expected.items()) / moved


ANCHORED = {"kl_coef": 0.5, "kl_positions": 3, "reference_dtype": "float32"}
PACKED = {"packing": True, "max_length": 256, "per_device_train_batch_size": 2}
PARTS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}


@pytest.mark.parametrize(
    "like, options",
    [
        ("constrained", {}),
        ("sft", {"objective": "sft"}),
        ("constrained", {"padding_free": True, "max_length": None}),
        ("constrained", PACKED),
        ("constrained", PARTS),
        ("weighted", PACKED),
        ("anchored", {**ANCHORED, **PARTS}),
        ("anchored", {**ANCHORED, "reference": "model"}),
        pytest.param("constrained", {"reference": "model"}, marks=pytest.mark.slow),
        pytest.param("weighted", PARTS, marks=pytest.mark.slow),
        pytest.param("anchored", {**ANCHORED, **PACKED}, marks=pytest.mark.slow),
    ],
    ids=lambda o: o if isinstance(o, str) else "-".join(o) or "plain",
)
def test_numbers_of_the_thin_loop(like, options, loop, tmp_path):
    ref_model = build_model() if options.get("reference") == "model" else None
    data = WEIGHTED if like == "weighted" else CHATS
    trainer, log = trained(tmp_path, data=data, ref_model=ref_model, **options)
    parameters, nll = loop[like]
    assert distance(trainer.model, parameters) <= 2e-5  # fp32 rounding: 5e-6 to 1e-5 seen
    if "gradient_accumulation_steps" not in options:  # trl averages its metrics by micro-batch
        assert log[-1]["nll"] == pytest.approx(nll, rel=1e-6)
    if like == "anchored":
        assert log[0]["kl"] == pytest.approx(0, abs=1e-5) and log[-1]["kl"] > 1e-3


def test_the_first_loss_is_that_of_a_plain_formula(tmp_path):
    _, log = trained(tmp_path, max_steps=1)
    betas = []  # where policy and reference agree, a token costs (2 / beta) log 2
    for example in dak.data.tokenize_chat(build_tokenizer(), CHATS):
        rows = zip(example.labels[1:], example.positions[1:], strict=True)
        betas += [{0: 0.1, 1: 0.5}.get(p, 2.0 if p <= 5 else 0.1) for x, p in rows if x >= 0]
    value = sum(2 / beta for beta in betas) / len(betas) * math.log(2)
    assert log[0]["loss"] == pytest.approx(value, rel=1e-4)  # trl logs four digits
    assert log[0]["weight"] == pytest.approx(1, abs=1e-6)
    assert log[0]["log_ratio"] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_adapters_against_the_model_without_them(tmp_path):
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_dropout=0.0)
    runs = {}
    for reference in ("precomputed", "adapter_off"):
        torch.manual_seed(0)
        trainer, runs[reference] = trained(tmp_path / reference, lora=lora, reference=reference)
    for one, other in zip(*runs.values(), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    torch.manual_seed(0)
    _, kl = trained(tmp_path / "kl", lora=lora, reference="adapter_off", kl_coef=2.0)
    assert kl[0]["loss"] == pytest.approx(
        runs["adapter_off"][0]["loss"], rel=1e-5
    )  # 0 at the start
    assert kl[-1]["loss"] != pytest.approx(runs["adapter_off"][-1]["loss"], rel=1e-4)


@pytest.mark.slow
def test_a_reference_is_of_the_model_a_run_began_with(tmp_path):
    straight, _ = trained(tmp_path / "straight")
    options = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path / "cut", **options)
    checkpoint = str(tmp_path / "cut" / "checkpoint-2")
    resumed, log = trained(tmp_path / "cut", resume=checkpoint, **options)
    assert distance(resumed.model, dict(straight.model.named_parameters())) <= 1e-6
    with pytest.raises(ValueError, match="holds the reference of these data under other weights"):
        trained(tmp_path / "cut", model=build_model(1))


def test_evaluation(tmp_path):
    data = datasets.Dataset.from_list(CHATS)
    config = ConstrainedSFTConfig(str(tmp_path), **PLAIN)
    tokenizer = build_tokenizer()
    trainer = ConstrainedSFTTrainer(
        build_model(), config, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    before = trainer.evaluate()
    assert before["eval_weight"] == pytest.approx(1, abs=1e-6)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_nll"] < before["eval_nll"] and after["eval_log_ratio"] > 0
    with pytest.raises(ValueError, match="eval_dataset: data that come after training has begun"):
        trainer.evaluate(data.select(range(2)))


@pytest.mark.parametrize(
    "options,said",
    [
        ({"objective": "constraind"}, "objective: expected one of"),
        ({"reference": "none"}, "reference: expected one of"),
        ({"kl_positions": 3}, "kl_positions: expected an integer >= 1, with kl_coef > 0, got 3"),
        ({"loss_type": "dft"}, "loss_type: trl's own loss is not used"),
        ({"packing": True, "packing_strategy": "wrapped"}, "packing_strategy: 'wrapped' cuts"),
        ({"beta_first": -1.0}, "first: "),
        ({"beta_first": 1.0, "beta_table": [1.0, 2.0]}, "table: .*so first cannot be given"),
    ],
)
def test_what_a_config_refuses(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        ConstrainedSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_what_a_trainer_refuses(tmp_path):
    def refused(said, **options):
        with pytest.raises(ValueError, match=said):
            trained(tmp_path, **options)

    refused("plain text has no response", data=[{"text": "hello"}])
    how = [0], "train", build_tokenizer(), Encoding(), False, False
    for said, late in (("message has a weight", {"messages": [HALF]}), (
        "record has a beta_scale", {"messages": [CHATS[0]["messages"]], "beta_scale": [2]})
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"train dataset: row 0: .* {said}.* in a stream"):
            tokenized(late, *how)
    refused("train dataset: row 1: no assistant turn", data=[CHATS[0], *BROKEN])
    refused("unknown key 'id'", data=[{**CHATS[0], "id": 1}], unknown_keys="error")
    refused("is it meant to be 'beta_scale'", data=[{**CHATS[0], "beta_scal": 2.0}])
    refused("none of its records can be trained", data=BROKEN, on_bad_record="skip")
    refused("'adapter_off' needs a PEFT model", reference="adapter_off")
    refused("ref_model: belongs to reference='model'", reference="model")
    refused("train dataset: conversation 0 has", max_length=20)
    kept, _ = trained(tmp_path, max_length=40, on_too_long="drop", max_steps=1)
    assert all(len(ids) <= 40 for ids in kept.train_dataset["input_ids"])
    with pytest.raises(ValueError, match="args: expected a ConstrainedSFTConfig, got a SFTConfig"):
        ConstrainedSFTTrainer(build_model(), trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_bad_records_are_left_out(tmp_path):
    """What is left is what it would be without them; rows that come as tokens have a scale too."""
    said = "train dataset: 2 records are left out .* the first: train dataset: row 1: no assistant"
    data = [WEIGHTED[0], *BROKEN, *WEIGHTED[1:]]
    with pytest.warns(UserWarning, match=said):
        made = trained(tmp_path, data=data, on_bad_record="skip", max_steps=1)[0].train_dataset
    whole = trained(tmp_path, data=WEIGHTED, max_steps=1)[0].train_dataset
    assert made.to_dict() == whole.to_dict() and set(whole[1]["beta_scales"]) == {3.0}
    ready = [{**row, "beta_scale": row["beta_scales"][0]} for row in whole]
    ready = [{k: v for k, v in row.items() if k != "beta_scales"} for row in ready]
    with pytest.warns(UserWarning, match="it has a beta_scale, and objective='sft' has no beta"):
        again = trained(tmp_path, data=ready, max_steps=1, objective="sft")[0].train_dataset
    assert again["beta_scales"] == whole["beta_scales"]


@pytest.mark.parametrize("lora", [None, peft.LoraConfig(r=2, target_modules=["q_proj"])])
def test_curves_during_a_training_of_trls(tmp_path, lora):
    """The callback sees what trl trains, adapters included, and leaves no trace in it."""
    model, tokenizer = build_model(), build_tokenizer()
    watch = Dynamics(model, tokenizer, CHATS[:3], every=2, positions=3, share=None)
    plain, _ = trained(tmp_path / "plain", lora=lora)
    watched, _ = trained(tmp_path / "watched", lora=lora, callbacks=[watch.for_trainer()])
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [r.cell["step"] for r in watch.records] == [0, 2, 4]
    now = profile(watched.model, model, tokenizer, CHATS[:3], positions=3)
    last = watch.records[-1].data["values"]
    assert last["nll"] == pytest.approx(now.curve("nll").mean.tolist(), rel=1e-5)
    assert last["kl_model_base"] == pytest.approx(
        now.curve("kl_model_base").mean.tolist(), abs=1e-5
    )
    assert (
        last["kl_model_base"][0] > 1e-4
        and max(watch.records[0].data["values"]["kl_model_base"]) < 1e-6
    )
