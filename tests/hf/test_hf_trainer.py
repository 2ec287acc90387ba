"""The ways in that take logits, and what the Hugging Face Trainer divides by.

Uneven label counts over four accumulation steps tell a right normaliser from a wrong one: with a
micro-batch mean the gradient is four times too long, and nothing complains.
"""

import pytest

pytest.importorskip("transformers", reason="deepalign_kernels.hf needs transformers")

import torch
import transformers
from tiny_chat import RECORDS, build_model, build_tokenizer
from tiny_models import batch, build, gradient_error, gradients, plain_logp

import deepalign_kernels as dak
import deepalign_kernels.hf as hf
from deepalign_kernels.train import constrained_rows, tokenize_chat

pytestmark = pytest.mark.clean_memory
MESSAGES = RECORDS[0]["messages"]
UNTRAINED = (1, 8, 4, 6)  # of 10 tokens, per micro-batch


def rows(weighted=False):
    """Four rows, as a Trainer's dataset, with reference log-probs that spread the weights.
    `weighted`: tokens count differently, and rows scale their beta."""
    data = [batch(rows=1, seed=seed, untrained=n) for seed, n in enumerate(UNTRAINED)]
    for seed, row in enumerate(data):
        generator = torch.Generator().manual_seed(seed)
        row["ref_logp"] = -3 + torch.randn(row["labels"].shape, generator=generator)
        row["response_positions"] = dak.response_positions(row["labels"])
        if weighted:
            row["token_weights"] = torch.rand(row["labels"].shape, generator=generator)
            row["beta_scales"] = torch.full(row["labels"].shape, (0.5, 1.0, 3.0, 1.0)[seed])
    return [{name: x[0].tolist() for name, x in row.items()} for row in data]


def expected(model, weighted=False):
    """Loss and gradients of all four rows as one batch, equation 3 from the model's own logits."""
    total, count = 0.0, 0
    for row in rows(weighted):
        row = {name: torch.tensor([x]) for name, x in row.items()}
        logp = plain_logp(model(input_ids=row["input_ids"]).logits, row["labels"])
        one = torch.ones_like(row["ref_logp"])
        beta = dak.BetaSchedule()(row["response_positions"])[:, 1:]
        beta = beta * row.get("beta_scales", one)[:, 1:]
        weight = row.get("token_weights", one)[:, 1:] * (row["labels"][:, 1:] != -100)
        value = -2 / beta * torch.nn.functional.logsigmoid(beta * (logp - row["ref_logp"][:, 1:]))
        total, count = total + (weight * value).sum(), count + weight.sum()
    return gradients(model, total / count), (total / count).item()


class Recorder(transformers.TrainerCallback):
    """Keeps the gradients that the optimiser is about to apply."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {n: p.grad.clone() for n, p in model.named_parameters()}


def train(model, folder, kind=transformers.Trainer, drop=False, **options):
    """One optimiser step over four accumulated rows; (gradients, logged loss)."""
    recorder = Recorder()
    arguments = transformers.TrainingArguments(
        folder,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=0.0,
        logging_steps=1,
        remove_unused_columns=drop,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    options.setdefault("train_dataset", rows())
    trainer = kind(model=model, args=arguments, callbacks=[recorder], **options)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return recorder.found, trainer.state.log_history[0]["loss"]


def test_loss_function_of_a_model(tmp_path):
    model = build("gemma2")
    theirs, loss = expected(model)
    hf.install(model, hf.LogitsLoss(beta=dak.BetaSchedule()))
    found, logged = train(model, tmp_path)
    assert gradient_error(found, theirs) <= 1e-5
    assert logged == pytest.approx(loss, rel=1e-4)


class Constrained(hf.ConstrainedMixin, transformers.Trainer):
    pass


@pytest.mark.parametrize("drop,weighted", ((True, True), (False, False)))
def test_mixin(tmp_path, drop, weighted):
    model = build("gemma2")
    theirs, loss = expected(model, weighted)
    data = rows(weighted)
    found, logged = train(model, tmp_path, Constrained, drop=drop, train_dataset=data)
    assert gradient_error(found, theirs) <= 1e-5
    assert logged == pytest.approx(loss, rel=1e-4)


def test_mixin_refuses_what_would_train_another_loss(tmp_path):
    model = build("gemma2")
    with pytest.raises(ValueError, match="compute_loss_func: not with"):
        train(model, tmp_path, Constrained, compute_loss_func=lambda *_: 0)
    with pytest.raises(ValueError, match="train_dataset: no column ref_logp; rows come from"):
        few = [{k: v for k, v in row.items() if k != "ref_logp"} for row in rows()]
        train(model, tmp_path, Constrained, train_dataset=few)


def test_rows_of_a_trainer_are_the_models_own_numbers():
    model, tokenizer = build_model(0), build_tokenizer()
    made = constrained_rows(model, tokenizer, RECORDS, batch_size=3)
    assert not {"token_weights", "beta_scales"} & set(made[0])
    half = [{**m, "weight": 0.5} if m["role"] == "assistant" else m for m in MESSAGES]
    more = constrained_rows(model, tokenizer, [{"messages": half}, {**RECORDS[0], "beta_scale": 2}])
    for row, weight, scale in zip(more, (0.5, 1), (1, 2), strict=True):
        trained = row["labels"] != -100
        assert (row["token_weights"][trained] == weight).all() and trained.any()
        assert (row["beta_scales"] == scale).all() and len(row["beta_scales"]) == len(trained)
    batch = hf.collate(more)
    trained = sum(int((row["labels"] != -100).sum()) for row in more)
    assert (
        hf.weight_of(batch) == 0.75 * trained and hf.weight_of(hf.collate(made[:1])) == trained / 2
    )
    assert "forward" not in vars(model) and model.training  # as it came
    whole = hf.collate(made)
    for index, (row, example) in enumerate(
        zip(made, tokenize_chat(tokenizer, RECORDS), strict=True)
    ):
        assert row["response_positions"].tolist() == list(example.positions)
        ids, labels = row["input_ids"][None], row["labels"][None]
        gold = plain_logp(model(input_ids=ids).logits, labels)[0]
        torch.testing.assert_close(row["ref_logp"][1:], gold, rtol=0, atol=1e-5)
        assert row["ref_logp"][0] == 0
        length = len(row["input_ids"])
        for name, filler in (("labels", -100), ("attention_mask", 0), ("ref_logp", 0)):
            assert (whole[name][index, length:] == filler).all()
        assert whole["attention_mask"][index, :length].all()


def test_compute_loss_func(tmp_path):
    """It gets no reference column; a loss without one works."""

    def negative_logp(outputs, labels, num_items_in_batch=None):
        target = labels[:, 1:]
        logp = dak.token_logp(outputs.logits[:, :-1], target)
        return dak.reduce_tokens(-logp, target != -100, normalizer=num_items_in_batch)

    model = build("llama")
    theirs, logged_by_model = train(model, tmp_path)  # the model's own cross-entropy
    found, logged = train(model, tmp_path, compute_loss_func=negative_logp)
    assert gradient_error(found, theirs) <= 1e-5
    assert logged == pytest.approx(logged_by_model, rel=1e-4)


def test_plain_loop_with_logits():
    model = build("llama")
    theirs, loss = expected(model)
    data = {name: torch.tensor([row[name] for row in rows()]) for name in rows()[0]}
    logits = model(input_ids=data["input_ids"]).logits
    ours = dak.constrained_loss(
        logits[:, :-1],
        data["labels"][:, 1:],
        beta=dak.BetaSchedule()(data["response_positions"])[:, 1:],
        ref_logp=data["ref_logp"][:, 1:],
    )
    assert ours.item() == pytest.approx(loss, rel=1e-5)
    assert gradient_error(gradients(model, ours), theirs) <= 1e-5


def test_logits_loss_alone():
    logits = torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 1, 2, 3, -100, 4], [-100, -100, 5, 6, 7, 8]])
    ref = torch.full((2, 6), -2.0)
    loss = hf.LogitsLoss(beta=dak.BetaSchedule())
    plain = loss(logits=logits, labels=labels, vocab_size=11, ref_logp=ref)
    # counted from the labels, and the shifted form of the same
    columns = {"ref_logp": ref, "response_positions": dak.response_positions(labels)}
    torch.testing.assert_close(loss(logits, labels, **columns), plain)
    shifted = {name: x.roll(-1, 1) for name, x in columns.items()}
    moved = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(loss(logits, labels, shift_labels=moved, **shifted), plain)
    count = (labels[:, 1:] != -100).sum()
    half = loss(logits, labels, num_items_in_batch=2 * count, ref_logp=ref)
    torch.testing.assert_close(2 * half, plain)
    with pytest.raises(ValueError, match="remove_unused_columns"):
        loss(logits, labels)
    with pytest.raises(ValueError, match="ref_logp"):
        loss(logits, labels, ref_logp=ref[:, 1:])
