"""A training run: its log, its order, what it leaves alone and what it refuses."""

import contextlib
import importlib.util
import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_chat import RECORDS, build_model, build_tokenizer
from train_runs import RUN, Bigram, log_of, record_gradients, relative, train

import deepalign_kernels as dak
from deepalign_kernels import backends
from deepalign_kernels.train import Example, TrainConfig, TrainingRun, fit


def test_log_every_sums_up_the_steps_between(tmp_path):
    data = RECORDS * 3
    options = {"max_steps": 7, "batch_size": 5, "objective": "sft", "learning_rate": 1e-3}
    train(build_model(), tmp_path / "each", data=data, **options)
    train(build_model(), tmp_path / "third", data=data, log_every=3, **options)
    each = [r for r in log_of(tmp_path / "each") if r["event"] == "step"]
    third = [r for r in log_of(tmp_path / "third") if r["event"] == "step"]
    assert [r["step"] for r in third] == [3, 6, 7]
    for record, steps in zip(third, (each[:3], each[3:6], each[6:]), strict=True):
        tokens = sum(r["trained_tokens"] for r in steps)
        assert record["trained_tokens"] == tokens
        mean = sum(r["objective"] for r in steps) / len(steps)
        assert record["objective"] == pytest.approx(mean, rel=1e-9)
        nll = sum(r["nll"] * r["trained_tokens"] for r in steps) / tokens
        assert record["nll"] == pytest.approx(nll, rel=1e-9)
        assert record["lr"] == steps[-1]["lr"]
        assert record["grad_norm"] == max(r["grad_norm"] for r in steps)


def test_log_is_strict_json_and_complete(tmp_path):
    one_token = [Example([5, 6], [-100, 6], [0, 1])]  # no token in two of the three groups
    _, result = train(build_model(), tmp_path, data=one_token)
    text = result.log_path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    start, ops, step, end = log_of(tmp_path)
    events = [record["event"] for record in (start, ops, step, end)]
    assert events == ["start", "ops", "step", "end"]
    assert start["config"]["adam_betas"] == [0.5, 0.999] and start["config"]["beta"]["prefix"] == 2
    assert step["nll_prefix"] is None and step["weight_first"] == pytest.approx(1, abs=1e-3)
    assert step["tokens_per_s"] > 0 and result.metrics == step and result.steps == 1


@pytest.mark.parametrize("backend", ("auto", "eager"))
def test_the_log_names_what_every_op_runs_on(tmp_path, backend):
    """Spied upon where the implementation itself is handed out."""
    handed, real = {}, backends._choose

    def spy(op, device, dtype, forced):
        found = real(op, device, dtype, forced)
        place = getattr(found, "__module__", None) or str(found)
        names = {"reference": "eager", "triton_kernels": "triton", "deepalign_native": "native"}
        handed[op] = next(name for part, name in names.items() if part in place)
        return found

    run = TrainingRun(build_model(), build_tokenizer(), TrainConfig(tmp_path, **RUN), RECORDS)
    first_step = run._train_step
    with pytest.MonkeyPatch.context() as patch, dak.use_backend(backend):
        run._train_step = lambda: (patch.setattr(backends, "_choose", spy), first_step())
        run.train()
    (ops,) = [r for r in log_of(tmp_path) if r["event"] == "ops"]
    assert ops["head"] == "fused" and ops["backends"] == handed
    assert "constrained_loss_fused" in handed
    assert backend == "auto" or set(handed.values()) == {"eager"}
    assert not backends._watching


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = build_model()
    with torch.no_grad():
        model.lm_head.weight[7] = float("inf")
    with pytest.raises(FloatingPointError, match="step 1: objective is"):
        train(model, tmp_path, objective="sft")
    assert "NaN" not in (tmp_path / "train_log.jsonl").read_text()


def test_every_conversation_is_seen_once_an_epoch_in_an_order_of_its_own(tmp_path):
    trainer, _ = train(build_model(), tmp_path, batch_size=2, max_steps=None, epochs=3)
    assert trainer.total_steps == 12 and trainer.steps_per_epoch == 4
    orders = [trainer.source.epoch(epoch)[1] for epoch in range(3)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    config = TrainConfig(tmp_path / "b", seed=1, **RUN)
    other = TrainingRun(build_model(), build_tokenizer(), config, RECORDS)
    assert other.source.epoch(0)[1] != orders[0]


def test_the_callers_random_numbers_are_left_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    options = {"max_steps": 3, "gradient_checkpointing": True}
    model = build_model(0, attention_dropout=0.5)
    first = train(model, tmp_path / "a", **options)[1].metrics
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)  # and the run does not depend on the caller's random state
    again = train(
        build_model(0, attention_dropout=0.5), tmp_path / "b",
        callbacks=[lambda *_: torch.rand(3)], **options,
    )[1].metrics  # fmt: skip
    other = train(build_model(0, attention_dropout=0.5), tmp_path / "c", max_steps=3, seed=1)
    assert again["objective"] == first["objective"] != other[1].metrics["objective"]


def state_of(model):
    """All that the modules hold themselves, modes and hooks too, and which parameters train."""
    out = {"use_cache": model.config.use_cache}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            held = value.items() if isinstance(value, dict) else [("", value)]
            out |= {(name, key, k): v for k, v in held}
    return out | {name: p.requires_grad for name, p in model.named_parameters()}


def assert_same(after, before):
    assert after.keys() == before.keys()
    changed = [k for k in before if after[k] is not before[k]]
    assert not changed


def stop(how):
    raise how


@pytest.mark.parametrize("comes", ("in train mode", "half frozen", "in eval mode"))
@pytest.mark.parametrize("end", (None, ZeroDivisionError, KeyboardInterrupt))
def test_models_come_back_as_they_were_module_by_module(tmp_path, comes, end):
    """Also when a callback (an exception) or a forward (Ctrl-C) breaks off."""
    model, ref = build_model(0, attention_dropout=0.5), build_model(1)
    for each in (model, ref):
        each.train(comes != "in eval mode")
        if comes == "half frozen":
            each.model.layers[0].eval().requires_grad_(False)
            each.model.norm.eval()
    model.config.use_cache = True
    seen = []

    def look(module, *_):
        if model.training:  # not for the reference, nor at step 0
            seen.append({name for name, m in model.named_modules() if not m.training})
        if end is KeyboardInterrupt and len(seen) == 2:
            stop(end)

    def callback(trainer, _):
        trainer.model.train() if len(seen) % 2 else trainer.model.eval()
        if end is ZeroDivisionError:
            stop(end)

    model.register_forward_hook(look)
    before = [state_of(each) for each in (model, ref)]
    options = {"gradient_checkpointing": True, "reference": "frozen", "max_steps": 3}
    with contextlib.nullcontext() if end is None else pytest.raises(end):
        train(model, tmp_path, ref_model=ref, callbacks=[callback], **options)
    for each, was in zip((model, ref), before, strict=True):
        assert_same(state_of(each), was)
    frozen = {name for name, m in before[0].items() if name[1:] == ("training", "") and not m}
    frozen = {name for name, *_ in frozen} if comes == "half frozen" else set()
    assert len(seen) >= 1 and all(names == frozen for names in seen)
    assert all(p.grad is None for p in model.parameters())


def test_gradient_checkpointing_and_bf16_change_cost_not_meaning(tmp_path):
    grads = {}
    for name, options in (
        ("plain", {}),
        ("checkpointed", {"gradient_checkpointing": True}),
        ("bf16", {"autocast_dtype": "bfloat16"}),
    ):
        model = build_model(0)
        grads[name] = record_gradients(model)
        train(model, tmp_path / name, objective="sft", **options)
    assert relative(grads["checkpointed"], grads["plain"]) < 1e-6
    assert 1e-4 < relative(grads["bf16"], grads["plain"]) < 0.05
    _, result = train(build_model(0), tmp_path / "ref", autocast_dtype=torch.bfloat16)
    assert result.step0_max_log_ratio < 0.1


def test_any_module_with_logits_can_be_trained(tmp_path):
    data = [Example([1, 2, 3, n], [-100, 2, 3, n], [0, 1, 2, 3]) for n in range(4, 8)]
    model = Bigram()
    config = TrainConfig(
        tmp_path, objective="sft", learning_rate=0.5, max_steps=60, batch_size=4, progress=False,
        head="logits",
    )  # fmt: skip
    result = TrainingRun(model, None, config, data).train()
    assert result.metrics["nll"] == pytest.approx(math.log(4) / 3, abs=0.02)  # the entropy


def test_rows_are_padded_right_and_masked(tmp_path):
    """What the model is given: a mask only where something is padded, nothing else changed."""
    seen = []

    class Spy(Bigram):
        def forward(self, input_ids, attention_mask):
            seen.append((input_ids.tolist(), attention_mask))
            return super().forward(input_ids, attention_mask)

    def run(name, data, accumulate=1):
        config = TrainConfig(
            tmp_path / name, objective="sft", max_steps=1, batch_size=2, progress=False,
            gradient_accumulation_steps=accumulate, head="logits",
        )  # fmt: skip
        TrainingRun(Spy(), SimpleNamespace(pad_token_id=9), config, data).train()

    row = lambda *ids: Example(ids, (-100, *ids[1:]), tuple(range(len(ids))))  # noqa: E731
    run("even", [row(1, 2, 3), row(4, 5, 6)])
    assert seen.pop()[1] is None
    run("uneven", [row(1, 2), row(3, 4, 5, 6)])
    ids, mask = seen.pop()
    assert ids == [[3, 4, 5, 6], [1, 2, 9, 9]] and mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    # Rows of like length go together, so little is padded.
    run("sorted", [row(1, 2), row(3, 4, 5, 6), row(7, 8), row(5, 4, 3, 2)], accumulate=2)
    assert [len(ids[0]) for ids, _ in seen] == [4, 2] and all(mask is None for _, mask in seen)


def test_progress_off_a_terminal_is_a_plain_line(tmp_path, capsys):
    train(build_model(), tmp_path / "a", progress=True, max_steps=2)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "reference: token 421/421" and second.startswith("train: step 2/2: objective ")
    train(build_model(), tmp_path / "b", progress=False, max_steps=2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "options, why",
    (
        ({"objective": "dpo"}, "objective: expected one of"),
        ({"reference": "online"}, "reference: expected one of"),
        ({"head": "linear"}, "head: expected one of"),
        ({"beta": -1.0}, "beta: expected a finite number >= 0"),
        ({"learning_rate": 0.0}, "learning_rate: "),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1"),
        ({"batch_size": 2.0}, "batch_size: expected an integer"),
        ({"max_steps": True}, "max_steps: expected an integer"),
        ({"epochs": 2, "max_steps": 2}, "epochs, max_steps: give one"),
        ({"adam_betas": (0.5, 1.0)}, "adam_betas: "),
        ({"adam_betas": 0.5}, "adam_betas: expected two numbers"),
        ({"autocast_dtype": "float16"}, "autocast_dtype: "),
        ({"max_grad_norm": -1.0}, "max_grad_norm: "),
        ({"lr_schedule": "sawtooth"}, "lr_schedule: expected one of"),
    ),
)
def test_a_wrong_configuration_names_its_field(tmp_path, options, why):
    with pytest.raises(ValueError, match=why):
        TrainConfig(tmp_path, **options)


def test_models_that_cannot_be_trained_are_refused(tmp_path):
    def refused(why, model, ref_model=None, **options):
        config = TrainConfig(tmp_path / "out", **options)
        with pytest.raises(ValueError, match=why):
            TrainingRun(model, build_tokenizer(), config, RECORDS, ref_model=ref_model)

    model = build_model()
    refused("ref_model: this is `model` itself", model, model)
    refused("model: head='fused' .* Bigram does not allow: .* head='logits' trains it", Bigram())
    refused("gradient_checkpointing: Bigram", Bigram(), gradient_checkpointing=True)
    refused("model: fp16 weights", build_model().half())
    refused("model: no parameter requires", build_model().requires_grad_(False))
    assert not (tmp_path / "out").exists()


def test_the_names_of_before_work_as_before_and_say_so_where_they_are_used(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from deepalign_kernels.train import ConstrainedSFTConfig, ConstrainedSFTTrainer

        assert not caught  # to import them is no use yet
        config = ConstrainedSFTConfig(tmp_path / "a", objective="sft", **RUN)
        models = build_model(), build_model()
        run = ConstrainedSFTTrainer(models[0], build_tokenizer(), config, train_data=RECORDS)
        old = run.train()
    ours = [w for w in caught if issubclass(w.category, DeprecationWarning)]
    now = {"ConstrainedSFTConfig": "TrainConfig", "ConstrainedSFTTrainer": "fit or TrainingRun"}
    assert [(w.filename, str(w.message)) for w in ours] == [
        (
            __file__,
            f"deepalign_kernels.train.{old} is now {new}; for TRL's trainer there is "
            f"deepalign_kernels.trl.{old}",
        )
        for old, new in now.items()
    ]
    if importlib.util.find_spec("trl"):
        assert now.keys() <= set(dak.trl.__all__)
    plain = TrainConfig(tmp_path / "a", objective="sft", **RUN)
    assert config.as_dict() == plain.as_dict() and isinstance(run, TrainingRun)
    new = fit(models[1], build_tokenizer(), replace(plain, output_dir=tmp_path / "b"), RECORDS)
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert new.metrics["objective"] == old.metrics["objective"]
