"""attach, detach, verify on whole models: what changes, what must not, and what is refused."""

import pytest

pytest.importorskip("transformers", reason="deepalign_kernels.hf needs transformers")

import torch
from tiny_models import batch, build, gradient_error, gradients, plain_logp

import deepalign_kernels as dak
import deepalign_kernels.hf as hf

pytestmark = pytest.mark.clean_memory


def constrained(logp, ref_logp, beta, mask, divisor=None):
    """Equation 3 of arXiv 2406.05946 on [B, T'] log-probs, written down once more."""
    value = -2 / beta * torch.nn.functional.logsigmoid(beta * (logp - ref_logp))
    return torch.where(mask, value, 0.0).sum() / (mask.sum() if divisor is None else divisor)


def reference(data, spread=1.0):
    """(beta [B, T], ref_logp [B, T - 1]) that make every token's weight another."""
    generator = torch.Generator().manual_seed(5)
    beta = dak.BetaSchedule()(dak.response_positions(data["labels"]))
    rows, length = data["labels"].shape
    return beta, -3 + spread * torch.randn(rows, length - 1, generator=generator)


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("divisor", [None, 37])
def test_constrained_loss(name, divisor):
    model, data = build(name), batch()
    beta, ref_logp = reference(data)
    logp = plain_logp(model(input_ids=data["input_ids"]).logits, data["labels"])
    mask = data["labels"][:, 1:] != -100
    expected = constrained(logp, ref_logp, beta[:, 1:], mask, divisor)
    theirs = gradients(model, expected)

    hf.attach(model)
    loss = hf.ConstrainedLoss(beta=beta, ref_logp=ref_logp)
    number = {} if divisor is None else {"num_items_in_batch": torch.tensor(divisor)}
    out = model(**data, dak_loss=loss, **number)

    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.logp, logp, rtol=1e-5, atol=1e-5)
    weight = 2 * torch.sigmoid(beta[:, 1:] * (ref_logp - logp))
    torch.testing.assert_close(out.parts["weight"], weight * mask, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        out.parts["log_ratio"], (logp - ref_logp) * mask, rtol=1e-5, atol=1e-5
    )
    assert gradient_error(gradients(model, out.loss), theirs) <= 1e-5


def test_reduction_none_and_a_normalizer_of_ones_own():
    model, data = hf.attach(build("llama")), batch()
    beta, ref_logp = reference(data)
    mean = model(**data, dak_loss=hf.ConstrainedLoss(beta=beta, ref_logp=ref_logp, normalizer=5.0))
    each = hf.ConstrainedLoss(beta=beta, ref_logp=ref_logp, reduction="none")
    token = model(**data, dak_loss=each).loss
    assert token.shape == (2, 9)
    torch.testing.assert_close(token.sum() / 5, mean.loss)
    assert not token[~mean.mask].any()


def test_shift_labels_are_labels_shifted_before():
    model, data = hf.attach(build("llama")), batch()
    ref = model(**data, dak_loss=hf.TokenLogp())
    shifted = torch.nn.functional.pad(data["labels"][:, 1:], (0, 1), value=-100)
    out = model(input_ids=data["input_ids"], shift_labels=shifted, dak_loss=hf.TokenLogp())
    assert out.logp.shape == shifted.shape
    torch.testing.assert_close(out.logp[:, :-1], ref.logp)
    torch.testing.assert_close(out.loss, ref.loss)


def test_hooks_on_the_head_stand_between_loss_and_weights():
    """As ZeRO-3's do: their backward must run before that of the head, so the loss goes through."""
    model, data = hf.attach(build("llama")), batch()
    plain = gradients(model, model(**data, dak_loss=hf.TokenLogp()).loss)
    seen = []

    def doubled(module, inputs, output):
        seen.append(output.shape)
        output.register_hook(lambda grad: 2 * grad)
        return output.clone()

    model.lm_head.register_forward_hook(doubled)
    out = model(**data, dak_loss=hf.TokenLogp())
    twice = gradients(model, out.loss)
    assert len(seen) == 1
    assert gradient_error(twice, {name: 2 * g for name, g in plain.items()}) <= 1e-5


def test_any_callable_is_a_loss():
    model, data = build("granite"), batch()
    logits = model(input_ids=data["input_ids"]).logits[:, :-1]
    probs = logits.softmax(-1)
    entropy = -(probs * logits.log_softmax(-1)).sum(-1)
    theirs = gradients(model, entropy.mean() + probs.square().sum())

    def loss(head):
        z = torch.nn.functional.linear(head.hidden, head.merged_weight(), head.bias)
        p = (z * head.logit_scale).softmax(-1)
        entropy = -(p * p.log()).sum(-1)
        return hf.LossOutput(loss=entropy.mean(), parts={"power": p.square().sum()})

    hf.attach(model)
    out = model(**data, dak_loss=loss)
    ours = gradients(model, out.loss + out.parts["power"])
    assert gradient_error(ours, theirs) <= 1e-5
    scalar = model(**data, dak_loss=lambda head: head.hidden.sum())
    assert scalar.loss.dim() == 0 and scalar.logp is None
    with pytest.raises(TypeError, match="dak_loss"):
        model(**data, dak_loss=lambda head: 3.0)


@pytest.mark.parametrize("direction", ["policy_ref", "ref_policy", "js"])
def test_kl_to_a_frozen_copy(direction):
    model, data = build("gemma2"), batch()
    frozen = build("gemma2", seed=1).requires_grad_(False)
    mask = data["labels"][:, 1:] != -100
    p, q = (m(input_ids=data["input_ids"]).logits[:, :-1].log_softmax(-1) for m in (model, frozen))
    if direction == "policy_ref":
        kl = (p.exp() * (p - q)).sum(-1)
    elif direction == "ref_policy":
        kl = (q.exp() * (q - p)).sum(-1)
    else:
        m = (0.5 * p.exp() + 0.5 * q.exp()).log()
        kl = (0.5 * p.exp() * (p - m) + 0.5 * q.exp() * (q - m)).sum(-1)
    theirs = gradients(model, (kl * mask).sum() / mask.sum())

    hf.attach(model), hf.attach(frozen)
    rows = hf.hidden_rows(frozen, **data)
    assert rows.hidden.shape == (int(mask.sum()), 32) and not rows.hidden.requires_grad
    options = {"ref_weight": frozen.get_output_embeddings().weight, "direction": direction}
    each = model(**data, dak_loss=hf.TokenKL(rows, reduction="none", **options)).loss
    torch.testing.assert_close(each, kl * mask, rtol=1e-5, atol=1e-6)
    out = model(**data, dak_loss=hf.TokenKL(rows, **options))
    assert gradient_error(gradients(model, out.loss), theirs) <= 1e-5
    halved = model(**data, num_items_in_batch=2 * mask.sum(), dak_loss=hf.TokenKL(rows, **options))
    torch.testing.assert_close(2 * halved.loss, out.loss)


def test_constrained_loss_from_reference_rows():
    model, data = build("llama"), batch()
    frozen = build("llama", seed=1).requires_grad_(False)
    hf.attach(model), hf.attach(frozen)
    beta, _ = reference(data)
    ref_logp = frozen(**data, dak_loss=hf.TokenLogp()).logp
    expected = model(**data, dak_loss=hf.ConstrainedLoss(beta=beta, ref_logp=ref_logp))
    loss = hf.ConstrainedLoss(
        beta=beta, ref_rows=hf.hidden_rows(frozen, **data), ref_weight=frozen.lm_head.weight
    )
    out = model(**data, dak_loss=loss)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.logp, expected.logp)
    torch.testing.assert_close(out.parts["weight"], expected.parts["weight"])
    assert gradient_error(gradients(model, out.loss), gradients(model, expected.loss)) <= 1e-5

    rows, weight = hf.hidden_rows(frozen, **data), frozen.lm_head.weight
    alone = model(**data, dak_loss=hf.TokenKL(rows, ref_weight=weight)).loss
    options = {"beta": beta, "ref_rows": rows, "ref_weight": weight, "kl_coef": 0.3}
    both = model(**data, dak_loss=hf.ConstrainedLoss(**options))
    torch.testing.assert_close(both.loss, expected.loss + 0.3 * alone)
    each = model(**data, dak_loss=hf.ConstrainedLoss(**options, reduction="none"))
    torch.testing.assert_close(each.loss.sum() / each.mask.sum(), both.loss)
    torch.testing.assert_close(each.parts["kl"].sum() / each.mask.sum(), alone)


def test_no_trained_token_gives_zero_loss_and_zero_gradients():
    model, data = hf.attach(build("llama")), batch(untrained=10)
    beta, ref_logp = reference(data)
    for loss in (hf.ConstrainedLoss(beta=beta, ref_logp=ref_logp), hf.TokenLogp()):
        out = model(**data, dak_loss=loss)
        assert out.loss.item() == 0
        found = gradients(model, out.loss)
        assert len(found) == len(list(model.parameters()))
        assert not any(g.any() for g in found.values())


def test_aux_loss_of_a_mixture_of_experts():
    model = build("qwen3_moe", output_router_logits=True)
    data = batch()
    expected = model(input_ids=data["input_ids"]).aux_loss
    theirs = gradients(model, expected)
    out = hf.attach(model)(**data, dak_loss=hf.TokenLogp())
    torch.testing.assert_close(out.aux_loss, expected)
    assert gradient_error(gradients(model, out.aux_loss), theirs) <= 1e-5


# ---------------------------------------------------------------- precision, checkpointing, compile


def test_bf16_autocast():
    model, data = build("llama"), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(input_ids=data["input_ids"]).logits
        theirs = plain_logp(plain, data["labels"])
        expected = gradients(model, theirs.sum())
        out = hf.attach(model)(**data, dak_loss=hf.TokenLogp())
    ours = gradients(model, out.logp.sum())
    rounding = 2**-8 * plain.abs().max().item()  # the plain path rounds its logits to bf16
    assert out.logp.dtype == torch.float32
    assert (out.logp - theirs).abs().max() <= 2 * rounding
    # logits rounded to bf16 cost the plain path several percent of its gradient
    assert gradient_error(ours, expected) <= 0.15
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hf.verify(model, data["input_ids"])


def test_bf16_model():
    model, data = hf.attach(build("llama", dtype=torch.bfloat16)), batch()
    hf.verify(model, data["input_ids"])
    out = model(**data, dak_loss=hf.TokenLogp())
    assert out.logp.dtype == torch.float32
    assert all(g.dtype == torch.bfloat16 for g in gradients(model, out.loss).values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    model, data = hf.attach(build("qwen3")), batch()
    theirs = gradients(model, model(**data, dak_loss=hf.TokenLogp()).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    ours = gradients(model, model(**data, dak_loss=hf.TokenLogp()).loss)
    assert gradient_error(ours, theirs) <= 1e-6


def test_checkpoint_around_the_whole_model():
    model, data = hf.attach(build("qwen3")), batch()
    theirs = gradients(model, model(**data, dak_loss=hf.TokenLogp()).loss)
    loss = torch.utils.checkpoint.checkpoint(
        lambda: model(**data, dak_loss=hf.TokenLogp()).loss, use_reentrant=False
    )
    assert gradient_error(gradients(model, loss), theirs) <= 1e-6


@pytest.mark.slow
def test_compiled_model():
    torch._dynamo.reset()
    model, data = hf.attach(build("llama", num_hidden_layers=1)), batch()
    beta, ref_logp = reference(data)
    loss = hf.ConstrainedLoss(beta=beta, ref_logp=ref_logp)
    expected = model(**data, dak_loss=loss)
    theirs = gradients(model, expected.loss)
    compiled = torch.compile(model, backend="eager")  # the graph breaks, not the code generator
    out = compiled(**data, dak_loss=loss)
    torch.testing.assert_close(out.loss, expected.loss)
    assert gradient_error(gradients(model, out.loss), theirs) <= 1e-5
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = hf.ConstrainedLoss(beta=beta, ref_logp=ref_logp.clone())
        out = compiled(**batch(), dak_loss=again)
    torch.testing.assert_close(out.loss, expected.loss)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(input_ids=data["input_ids"]).logits, model(input_ids=data["input_ids"]).logits
        )
    assert "forward" not in model.get_output_embeddings().__dict__
