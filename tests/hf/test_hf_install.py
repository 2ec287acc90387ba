"""A constraint is never absent in silence: each of these trained plain cross-entropy once."""

import copy
import gc
import warnings

import pytest

pytest.importorskip("transformers", reason="deepalign_kernels.hf needs transformers")

import torch
from tiny_chat import build_tokenizer
from tiny_models import batch, build

import deepalign_kernels.hf as hf


class Sum:
    """A loss function as transformers calls it."""

    def __call__(self, logits, labels, vocab_size=None, **_):
        return logits.sum()


def stepped(model, **options):
    """One step of training, through to the optimizer; returns the loss."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model.train()
    out = model(**{**batch(), **options})
    loss = out.logits.mean() if out.loss is None else out.loss
    loss.backward()
    optimizer.step()
    return loss


def test_an_installed_loss_is_the_models():
    model = hf.install(build("llama"), Sum())
    assert stepped(model) == model(**batch()).logits.sum()
    twin = copy.deepcopy(model)
    assert stepped(twin) == twin(**batch()).logits.sum()
    assert stepped(hf.install(model, Sum())) == model(**batch()).logits.sum()  # in its place
    hf.uninstall(hf.uninstall(model))
    assert stepped(model) != model(**batch()).logits.sum()
    assert not model.model._forward_hooks


def test_an_installed_loss_that_nobody_asks_raises_at_the_first_step():
    model = hf.install(build("llama"), Sum())
    model(**batch()).logits.sum()  # a step in eval mode, or without gradient, is no training
    with torch.no_grad():
        model.train()(input_ids=batch()["input_ids"])
    with pytest.raises(
        RuntimeError, match="Sum was installed on .*ForCausalLM, and a training step"
    ):
        stepped(model, labels=None)
    model(input_ids=batch()["input_ids"])
    with pytest.raises(RuntimeError, match="Sum was installed"):  # with no optimizer of torch's
        model(**batch())
    stepped(model)  # it is said once for each step missed


def test_install_finds_the_model_inside_peft():
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(build("llama"), config)
    hf.install(model, Sum())
    assert stepped(model) == model(**batch()).logits.sum()
    with pytest.raises(RuntimeError, match="Sum was installed"):
        stepped(model, labels=None)


def test_trl_computes_its_own(tmp_path):
    trl = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    model = hf.install(build("llama"), Sum())
    rows = datasets.Dataset.from_list([{"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]}] * 2)
    options = {"max_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False}
    arguments = trl.SFTConfig(output_dir=str(tmp_path), **options)
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=rows, processing_class=build_tokenizer()
    )
    with pytest.raises(RuntimeError, match="Sum was installed"):
        trainer.train()


def test_a_model_that_is_not_attached():
    model, loss = build("llama"), hf.TokenLogp()
    with pytest.raises(ValueError, match="model: LlamaForCausalLM took no notice of dak_loss"):
        hf.compute_loss(model, loss, **batch())
    out = hf.compute_loss(hf.attach(model), loss, **batch())
    torch.testing.assert_close(out.loss, model(**batch(), dak_loss=loss).loss)
    with pytest.raises(TypeError, match="dak_los: no such keyword; did you mean dak_loss?"):
        model(**batch(), dak_los=loss)


def test_a_loss_that_never_ran_warns():
    for make in (hf.TokenLogp, lambda: hf.LogitsLoss(beta=0.1)):
        with pytest.warns(RuntimeWarning, match="never run. If a model was called with it"):
            build("llama")(**batch(), dak_loss=make())
            gc.collect()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = hf.attach(build("llama"))
        model(**batch(), dak_loss=hf.TokenLogp())
        with pytest.raises(ValueError, match="expected one of the two"):
            hf.ConstrainedLoss(beta=0.1)
        with pytest.raises(ValueError, match="labels: a call with dak_loss"):  # not ignored
            model(input_ids=batch()["input_ids"], dak_loss=hf.TokenLogp())
        gc.collect()
    assert not [x for x in seen if "never run" in str(x.message)]


def test_what_cannot_be_installed():
    with pytest.raises(ValueError, match="model: Linear has no loss_function"):
        hf.install(torch.nn.Linear(2, 2), Sum())
    with pytest.raises(TypeError, match="loss_function: expected a callable, got 3"):
        hf.install(build("llama"), 3)
