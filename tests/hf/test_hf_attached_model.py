"""An attached model: what stays its own, and what is refused."""

import copy
import inspect
import io
import pickle

import pytest

pytest.importorskip("transformers", reason="deepalign_kernels.hf needs transformers")

import torch
import transformers
from tiny_models import batch, build, gradient_error, gradients, plain_logp
from torch import nn

import deepalign_kernels as dak
import deepalign_kernels.hf as hf

pytestmark = pytest.mark.clean_memory


# ---------------------------------------------------------------- the model stays what it is


def test_plain_calls_are_the_models_own(tmp_path):
    model, data = build("llama"), batch()
    keys, entries = list(model.state_dict()), set(model.__dict__)
    before = model(**data)
    signature = inspect.signature(model.forward)
    generated = model.generate(data["input_ids"], max_new_tokens=4, do_sample=False)
    assert hf.attach(model) is model and hf.attach(model) is model  # twice is once
    after = model(**data)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.loss, before.loss)
    assert list(model.state_dict()) == keys and inspect.signature(model.forward) == signature
    again = model.generate(data["input_ids"], max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, again)
    model(**data, dak_loss=hf.TokenLogp())
    head = model.get_output_embeddings()
    assert "forward" not in head.__dict__ and not head._forward_hooks

    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and "forward" not in loaded.__dict__
    assert torch.equal(loaded(**data).logits, after.logits)

    assert hf.detach(model) is model and set(model.__dict__) == entries
    assert model(**data).loss.equal(before.loss)
    with pytest.raises(ValueError, match="not attached"):
        hf.detach(model)
    with pytest.raises(ValueError, match="not attached"):
        hf.verify(model, data["input_ids"])


def test_detach_gives_a_replaced_forward_back():
    model = build("llama")
    patched = model.forward
    model.forward = patched
    hf.attach(model)
    assert model(**batch(), dak_loss=hf.TokenLogp()).loss.isfinite()
    hf.detach(model)
    assert model.__dict__["forward"] is patched


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_attached_models_of_their_own(how):
    model, data = hf.attach(build("llama")), batch()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        twin = pickle.load(io.BytesIO(pickle.dumps(model)))
    before = model(**data, dak_loss=hf.TokenLogp()).logp
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    hf.verify(twin, data["input_ids"])
    assert not torch.allclose(twin(**data, dak_loss=hf.TokenLogp()).logp, before)
    assert torch.equal(model(**data, dak_loss=hf.TokenLogp()).logp, before)
    hf.detach(twin)
    hf.verify(model, data["input_ids"])


def test_modes_of_modules_survive_attach_and_verify():
    model = build("llama")
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    hf.verify(hf.attach(model), batch()["input_ids"])
    assert [m.training for m in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_head_is_given_back_after_an_error():
    model, data = hf.attach(build("llama")), batch()

    def broken(head):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model(**data, dak_loss=broken)
    head = model.get_output_embeddings()
    assert "forward" not in head.__dict__ and not head._forward_hooks
    hf.verify(model, data["input_ids"])


def test_probe_waits_for_weights():
    with torch.device("meta"):
        model = build("gemma2")
    hf.attach(model)
    assert model.__dict__["forward"].transform is None
    real = build("gemma2")
    model.to_empty(device="cpu")
    for name, buffer in real.named_buffers():
        model.get_buffer(name).copy_(buffer)
    model.load_state_dict(real.state_dict())
    model.model.layers[0].eval()
    data = batch()
    expected = hf.attach(real)(**data, dak_loss=hf.TokenLogp()).logp
    torch.testing.assert_close(model(**data, dak_loss=hf.TokenLogp()).logp, expected)
    assert model.__dict__["forward"].transform.softcap == 3.0
    assert not model.model.layers[0].training and model.model.layers[1].training


def test_padded_vocabulary_is_cut_as_the_model_cuts_it():
    model, data = build("llama"), batch()

    class Cut(type(model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits[..., :150]
            return out

    model.__class__ = Cut
    data["labels"] = data["labels"].where(data["labels"] < 150, -100)
    theirs = plain_logp(model(input_ids=data["input_ids"]).logits, data["labels"])
    expected = gradients(model, theirs.sum())
    out = hf.attach(model)(**data, dak_loss=hf.TokenLogp())
    torch.testing.assert_close(out.logp, theirs, rtol=1e-5, atol=1e-5)
    assert gradient_error(gradients(model, out.logp.sum()), expected) <= 1e-5


def test_accelerate_device_hooks_and_mixed_precision():
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    # One for the process: a Trainer of another test may have chosen fp32 for all.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    model, data = build("llama"), batch()
    expected = hf.attach(model)(**data, dak_loss=hf.TokenLogp()).logp
    hf.detach(model)
    accelerate.cpu_offload(model, execution_device="cpu")  # weights on meta between the calls
    hf.attach(model)
    assert model.lm_head.weight.device.type == "meta"
    with torch.no_grad():
        out = model(**data, dak_loss=hf.TokenLogp())
    torch.testing.assert_close(out.logp, expected)

    model = hf.attach(build("llama"))
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    out = prepared(**data, dak_loss=hf.TokenLogp())
    assert isinstance(out, hf.LossOutput) and out.logp.dtype == torch.float32
    torch.testing.assert_close(out.logp, expected, rtol=0.05, atol=0.1)
    assert out.mask.dtype == torch.bool
    assert hf.attach(prepared) is prepared
    with pytest.raises(RuntimeError, match="wrapped again"):
        hf.detach(prepared)
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    hf.verify(model, data["input_ids"])
    hf.detach(model)
    assert "forward" not in model.__dict__


# ---------------------------------------------------------------- what is refused


def test_verify_catches_a_wrong_transform():
    model, data = hf.attach(build("gemma2")), batch()
    assert hf.verify(model, data["input_ids"]) < 1e-5
    forward = model.__dict__["forward"]
    right = forward.transform
    for wrong in ({"softcap": None}, {"logit_scale": 1.05}, {"softcap": 3.3}):
        forward.transform = right._replace(**wrong)
        with pytest.raises(RuntimeError, match="differ from the model's own logits"):
            hf.verify(model, data["input_ids"])


def test_models_that_are_refused():
    for wrong in (nn.Linear(2, 2), None, "gpt2"):
        with pytest.raises(TypeError, match="model: expected a transformers causal language model"):
            hf.attach(wrong)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    bert = transformers.BertConfig(**size, num_attention_heads=2, vocab_size=32)
    with pytest.raises(TypeError, match="BertForMaskedLM is a masked language model"):
        hf.attach(transformers.BertForMaskedLM(bert))
    small = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**small, d_kv=8))
    with pytest.raises(TypeError, match="encoder-decoder"):
        hf.attach(t5)
    headless = build("llama").model
    with pytest.raises(TypeError, match="no output head"):
        hf.attach(headless)
    text = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text),
        vision_config=transformers.CLIPVisionConfig(**vision),
        image_token_id=3,
    )
    with pytest.raises(TypeError, match="vision, audio"):
        hf.attach(transformers.LlavaForConditionalGeneration(config))


def test_heads_that_are_refused():
    class Quantised(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model = build("llama")
    model.lm_head = Quantised(32, 160, bias=False)
    with pytest.raises(TypeError, match="Quantised"):
        hf.attach(model)
    model = build("llama")
    model.lm_head.weight = nn.Parameter(torch.zeros(160, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="int8"):
        hf.attach(model)
    model = build("llama")
    model.lm_head.forward = model.lm_head.forward
    with pytest.raises(TypeError, match="was replaced"):
        hf.attach(model)

    class Masked(type(build("llama"))):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits[..., 7] = -1e9
            return out

    model = build("llama")
    model.__class__ = Masked
    with pytest.raises(NotImplementedError, match="neither a scale nor a tanh cap"):
        hf.attach(model)


def test_weights_that_are_not_here():
    model, data = hf.attach(build("llama")), batch()
    model.lm_head.weight.data = torch.empty(0)
    with pytest.raises(RuntimeError, match="ZeRO-3"):
        model(**data, dak_loss=hf.TokenLogp())


def test_calls_that_are_refused():
    model, data = hf.attach(build("llama")), batch()
    ids, labels = data["input_ids"], data["labels"]
    with pytest.raises(ValueError, match="labels or shift_labels"):
        model(input_ids=ids, dak_loss=hf.TokenLogp())
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(**data, logits_to_keep=3, dak_loss=hf.TokenLogp())
    # Too few labels are not those of the last tokens; prompt tuning alone: test_hf_peft.py.
    embeds = model.get_input_embeddings()(ids).detach()
    for given in ({"input_ids": ids}, {"inputs_embeds": embeds}):
        with pytest.raises(ValueError, match=r"^labels: \(2, 5\) do not fit"):
            model(**given, labels=labels[:, :5], dak_loss=hf.TokenLogp())
    with pytest.raises(ValueError, match=r"^shift_labels: \(2, 5\) do not fit"):
        model(ids, shift_labels=labels[:, 1:6], dak_loss=hf.TokenLogp())
    with pytest.raises(TypeError, match="dak_loss: expected a callable that takes a Head, got 5"):
        model(**data, dak_loss=5)
    with pytest.raises(ValueError, match="ref_logp"):
        model(**data, dak_loss=hf.ConstrainedLoss(beta=1.0, ref_logp=torch.zeros(2, 3)))
    with pytest.raises(ValueError, match="expected one of the two"):
        hf.ConstrainedLoss(beta=1.0)
    patched = build("llama")
    patched.forward = patched.forward  # bound, as trl puts it there: a copy calls the first one
    moved = copy.deepcopy(patched)
    moved.forward = patched.forward
    with pytest.raises(NotImplementedError, match="0 times, .* make the copy before"):
        hf.attach(moved)
    rows = hf.hidden_rows(model, **data)
    with pytest.raises(ValueError, match="the policy's head is trained"):
        model(**data, dak_loss=hf.TokenKL(rows))
    other = hf.attach(build("llama"))
    other.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match="another model"):
        other(**data, dak_loss=hf.TokenKL(rows))
    with dak.checked(), pytest.raises(ValueError, match="other labels"):
        moved = {"input_ids": ids, "labels": labels.roll(1, 1)}
        other(**moved, dak_loss=hf.TokenKL(rows, ref_weight=other.lm_head.weight))
