"""PEFT around an attached model, before or after: exact where supported, else refused."""

import copy

import pytest

pytest.importorskip("transformers", reason="deepalign_kernels.hf needs transformers")
pytest.importorskip("peft", reason="needs peft")

import peft
import torch
from tiny_models import batch, build, gradient_error, gradients, plain_logp
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

import deepalign_kernels.hf as hf

pytestmark = [
    pytest.mark.clean_memory,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's remarks on tied heads
]


def lora(*targets, **options):
    options = {"lora_dropout": 0.0, "r": 4, "task_type": "CAUSAL_LM", **options}
    return peft.LoraConfig(target_modules=list(targets), **options)


def shaken(model):
    """Adapters start as zero; move every trained parameter so that they matter."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def wrapped(config, when, name="llama"):
    torch.manual_seed(7)
    if when == "before":
        return shaken(peft.get_peft_model(hf.attach(build(name)), config))
    return hf.attach(shaken(peft.get_peft_model(build(name), config)))


def check(model, data=None, atol=1e-5):
    """log-probs and all gradients as from the model's own logits, for two losses."""
    data = data or batch()
    mask = data["labels"][:, 1:] != -100
    plain = plain_logp(model(input_ids=data["input_ids"]).logits, data["labels"])
    expected = gradients(model, plain.sum())
    out = model(**data, dak_loss=hf.TokenLogp())
    width = plain.shape[1]
    torch.testing.assert_close(out.logp[:, -width:], plain, rtol=1e-5, atol=atol)
    assert gradient_error(gradients(model, out.logp.sum()), expected) <= 1e-5

    beta, ref_logp = 0.7, torch.full(out.logp.shape, -2.0)
    delta = ref_logp[:, -width:] - plain_logp(
        model(input_ids=data["input_ids"]).logits, data["labels"]
    )
    value = (torch.nn.functional.softplus(beta * delta) * 2 / beta * mask).sum() / mask.sum()
    expected = gradients(model, value)
    out = model(**data, dak_loss=hf.ConstrainedLoss(beta=beta, ref_logp=ref_logp))
    torch.testing.assert_close(out.loss, value, rtol=1e-5, atol=0)
    assert gradient_error(gradients(model, out.loss), expected) <= 1e-5
    hf.verify(model, data["input_ids"])


CONFIGS = {
    "attention": lora("q_proj", "v_proj"),
    "head": lora("q_proj", "lm_head"),
    "head alone": lora("lm_head"),
    "saved head": lora("q_proj", modules_to_save=["lm_head"]),
    "trained tokens": lora("q_proj", trainable_token_indices=[5, 7, 9]),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_lora(kind, when):
    model = wrapped(copy.deepcopy(CONFIGS[kind]), when)
    check(model)
    base = hf.attach(build("llama"))
    data = batch()
    with model.disable_adapter():
        off = model(**data, dak_loss=hf.TokenLogp()).logp
    torch.testing.assert_close(off, base(**data, dak_loss=hf.TokenLogp()).logp)
    twin = copy.deepcopy(model)
    shaken(twin)
    check(twin)
    hf.detach(model)
    with pytest.raises(ValueError, match="not attached"):
        hf.verify(model, data["input_ids"])


@pytest.mark.parametrize("name", ["phi", "gemma2", "qwen2"])
def test_lora_on_heads_with_bias_cap_and_tie(name):
    check(wrapped(lora("lm_head"), "before", name))
    check(wrapped(lora("q_proj", trainable_token_indices=[5, 7]), "before", name))


def test_lora_bias_on_the_head_is_refused():
    model = wrapped(lora("lm_head", lora_bias=True), "before", "phi")
    with pytest.raises(TypeError, match="lora_bias"):
        model(**batch(), dak_loss=hf.TokenLogp())


def test_two_adapters_at_once_and_switching():
    model = wrapped(lora("q_proj", "lm_head"), "before")
    model.add_adapter("second", lora("q_proj", "lm_head", r=2, lora_alpha=5))
    model.base_model.set_adapter(["default", "second"])
    check(shaken(model))
    model.set_adapter("second")
    check(model)


def test_merged_adapter():
    model = wrapped(lora("q_proj", "lm_head"), "before")
    data = batch()
    expected = model(**data, dak_loss=hf.TokenLogp()).logp
    model.merge_adapter()
    merged = model(**data, dak_loss=hf.TokenLogp()).logp
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    hf.verify(model, data["input_ids"])
    with model.disable_adapter():  # PEFT unmerges here
        hf.verify(model, data["input_ids"])
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(**data, dak_loss=hf.TokenLogp()).logp, merged)


def test_adapter_added_by_transformers_itself():
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as why:
        pytest.skip(f"this transformers takes no such PEFT: {why}")
    model = hf.attach(build("llama"))
    model.add_adapter(lora("q_proj", "lm_head"))
    check(shaken(model))


def test_saved_adapter_loads_into_a_plain_model(tmp_path):
    model, data = wrapped(lora("q_proj", "lm_head"), "before"), batch()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    torch.testing.assert_close(loaded(**data).logits, model(**data).logits)


@pytest.mark.parametrize("kind", ["attention", "head"])
def test_kl_to_the_model_without_adapters(kind):
    """One frozen head serves policy and reference."""
    model, data = wrapped(copy.deepcopy(CONFIGS[kind]), "before"), batch()
    mask = data["labels"][:, 1:] != -100
    p = model(input_ids=data["input_ids"]).logits[:, :-1].log_softmax(-1)
    with model.disable_adapter(), torch.no_grad():
        q = model(input_ids=data["input_ids"]).logits[:, :-1].log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    theirs = gradients(model, (kl * mask).sum() / mask.sum())
    with model.disable_adapter():
        rows = hf.hidden_rows(model, **data)
    out = model(**data, dak_loss=hf.TokenKL(rows, reduction="none"))
    torch.testing.assert_close(out.loss, kl * mask, rtol=1e-5, atol=1e-6)
    out = model(**data, dak_loss=hf.TokenKL(rows))
    assert gradient_error(gradients(model, out.loss), theirs) <= 1e-5


@pytest.mark.parametrize("grad", [True, False])
def test_kl_with_trained_tokens_asks_for_the_references_head(grad):
    model, data = wrapped(copy.deepcopy(CONFIGS["trained tokens"]), "before", "qwen2"), batch()
    with model.disable_adapter():
        rows = hf.hidden_rows(model, **data)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="ref_weight"):
        model(**data, dak_loss=hf.TokenKL(rows))


def test_kl_with_a_saved_head_asks_for_the_references():
    model, data = wrapped(copy.deepcopy(CONFIGS["saved head"]), "before"), batch()
    with model.disable_adapter():
        rows = hf.hidden_rows(model, **data)
    with pytest.raises(ValueError, match="original_module"):
        model(**data, dak_loss=hf.TokenKL(rows))
    old = model.get_base_model().lm_head.original_module.weight
    assert model(**data, dak_loss=hf.TokenKL(rows, ref_weight=old)).loss > 0


def test_prompt_tuning():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    for when in ("before", "after"):
        model, data = wrapped(config, when), batch()
        check(model)
        shifted = torch.nn.functional.pad(data["labels"][:, 1:], (0, 1), value=-100)
        out = model(input_ids=data["input_ids"], shift_labels=shifted, dak_loss=hf.TokenLogp())
        plain = plain_logp(model(input_ids=data["input_ids"]).logits, data["labels"])
        torch.testing.assert_close(out.logp[:, :-1], plain, rtol=1e-5, atol=1e-5)
        loss = hf.ConstrainedLoss(beta=1.0, ref_logp=torch.zeros(2, 9))  # 3 too short
        with pytest.raises(ValueError, match="shift_labels"):
            model(**data, dak_loss=loss)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT's
def test_prefix_tuning():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    check(wrapped(config, "before"))


def test_dora_on_the_head_is_refused_not_wrong():
    model, data = wrapped(lora("q_proj", "lm_head", use_dora=True), "before"), batch()
    with pytest.raises(TypeError, match="DoraLinearVariant"):
        model(**data, dak_loss=hf.TokenLogp())
    check(wrapped(lora("q_proj", use_dora=True), "before"))  # anywhere else it is none of ours


def test_other_adapters_on_the_head_are_refused():
    config = peft.LoHaConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(TypeError, match="LoHa|loha"):
        wrapped(config, "before")(**batch(), dak_loss=hf.TokenLogp())


def test_lora_dropout_on_the_head_is_refused_in_training():
    model, data = wrapped(lora("lm_head", lora_dropout=0.1), "before"), batch()
    with pytest.raises(ValueError, match="lora_dropout"):
        model(**data, dak_loss=hf.TokenLogp())
    hf.verify(model, data["input_ids"])  # evaluation has no dropout
    with pytest.raises(TypeError, match="adapter_names"):
        model.eval()(**data, adapter_names=["default"] * 2, dak_loss=hf.TokenLogp())
