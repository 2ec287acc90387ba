"""Every kind of head: the loss inside it against the same loss from the model's own logits."""

import pytest

pytest.importorskip("transformers", reason="deepalign_kernels.hf needs transformers")

import torch
import transformers
from tiny_models import (
    FAMILIES,
    batch,
    build,
    gradient_error,
    gradients,
    plain_logp,
)

import deepalign_kernels.hf as hf

pytestmark = pytest.mark.clean_memory
BUDGET = 1e-5  # relative to the largest log-prob or gradient, fp32

TRANSFORMS = {  # what the probe must find: (scale, cap); (1, None) elsewhere
    "gemma2": (1.0, 3.0),
    "recurrent_gemma": (1.0, 3.0),
    "cohere": (0.0625, None),
    "cohere2": (0.0625, None),
    "granite": (1 / 6, None),
    "hyperclovax": (0.5, None),
    "nanochat": (1.0, 15.0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_family_matches_its_own_logits(name, record_property):
    if name == "recurrent_gemma" and transformers.__version__ < "5":
        pytest.skip(
            "transformers 4: the model goes on from the state that the last batch left in it"
        )
    model, data = build(name), batch()
    upstream = torch.randn(2, 9, generator=torch.Generator().manual_seed(1))  # as any loss on logp
    theirs = plain_logp(model(input_ids=data["input_ids"]).logits, data["labels"])
    expected = gradients(model, (theirs * upstream).sum())

    hf.attach(model)
    out = model(**data, dak_loss=hf.TokenLogp())
    error = (out.logp - theirs).abs().max().item() / theirs.abs().max().item()
    found = gradients(model, (out.logp * upstream).sum())
    grad_error = gradient_error(found, expected)
    record_property("errors", f"{error:.1e} {grad_error:.1e}")
    print(f"{name:20s} logp {error:.1e} grad {grad_error:.1e}")

    assert torch.equal(out.mask, data["labels"][:, 1:] != -100)
    assert error <= BUDGET and grad_error <= BUDGET
    assert abs(out.loss.item() + theirs.sum().item() / out.mask.sum().item()) <= 1e-5
    scale, cap, vocab = model.__dict__["forward"].transform
    assert (pytest.approx(scale, rel=1e-6), cap) == TRANSFORMS.get(name, (1.0, None))
    assert vocab == 160
    assert hf.verify(model, data["input_ids"]) <= 1e-4
