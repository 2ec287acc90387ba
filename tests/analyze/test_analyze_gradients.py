"""Gradient norms by position against one plain backward for each token."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="deepalign_kernels.analyze needs transformers")

from answer_pairs import draw_pairs
from tiny_models import build

from deepalign_kernels.analyze.gradients import exact_norms, probed_norms

pytestmark = pytest.mark.clean_memory


def backward_norms(model, pairs):
    """[pair][position] -> {block: norm}, by autograd over parameters; a tied weight counts once."""
    named = dict(model.named_parameters())
    out = []
    for pair in pairs:
        ids = torch.tensor([[*pair.context, *pair.answer]])
        logp = model(input_ids=ids).logits[0].log_softmax(-1)
        rows = []
        for t, y in enumerate(pair.answer):
            one = logp[len(pair.context) - 1 + t, y]
            grads = torch.autograd.grad(one, list(named.values()), retain_graph=True)
            square = {n: float(g.square().sum()) for n, g in zip(named, grads, strict=True)}
            layer = [sum(s for n, s in square.items() if f".{i}." in n) for i in (0, 1)]
            head = sum(s for n, s in square.items() if n.startswith("lm_head"))
            rows.append(
                {"whole": sum(square.values()) ** 0.5, "last": (layer[1] + head) ** 0.5}
                | {i: s**0.5 for i, s in enumerate(layer)}
            )
        out.append(rows)
    return out


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2", "granite", "phi", "gpt2"])
def test_exact_norms_are_those_of_a_backward_for_each_token(name, monkeypatch):
    model, pairs = build(name).double(), draw_pairs(150)
    before = [p.requires_grad for p in model.parameters()]
    found = exact_norms(model, pairs)
    last = exact_norms(model, pairs, last_layers=1)
    expected = backward_norms(model, pairs)
    monkeypatch.setattr("deepalign_kernels.analyze.gradients.CHUNK_BYTES", 1)  # one row at a time
    small = exact_norms(model, pairs[:1])
    for i, rows in enumerate(expected):
        for t, row in enumerate(rows):
            assert found.whole[i, t] == pytest.approx(row["whole"], rel=1e-6)
            for layer in (0, 1):
                assert found.layers[i, t, layer] == pytest.approx(row[layer], rel=1e-6)
            assert last.layers[i, t, 1] == pytest.approx(row[1], rel=1e-6)
            if not model.config.tie_word_embeddings:
                assert last.last[i, t] == pytest.approx(row["last"], rel=1e-6)
        assert np.isnan(found.whole[i, len(rows) :]).all()
    assert np.isnan(last.layers[..., 0]).all() and np.isnan(last.whole).all()
    assert np.allclose(small.whole[0], found.whole[0, : len(small.whole[0])], equal_nan=True)
    assert found.left_out == ()
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["llama_tied", "phi"])
@pytest.mark.slow
def test_probes_are_within_their_stated_error(name):
    model, pairs = build(name).double(), draw_pairs(150)
    exact = exact_norms(model, pairs).whole
    found = probed_norms(model, pairs, probes=128, max_tokens=20)
    ratio = (found.whole / exact)[~np.isnan(exact)]
    assert found.relative_error == pytest.approx(1 / 16)
    # 20 tokens that share directions: their spread is near the stated one, their mean within it.
    assert 0.4 * found.relative_error < ratio.std() < 1.6 * found.relative_error
    assert abs(ratio.mean() - 1) < 3 * found.relative_error
    few = probed_norms(model, pairs, probes=2)
    assert (few.whole / exact)[~np.isnan(exact)].std() > 3 * ratio.std()
    assert np.array_equal(few.whole, probed_norms(model, pairs, probes=2).whole, equal_nan=True)


@pytest.mark.slow
def test_the_square_of_an_estimate_is_unbiased():
    model, pairs = build("llama").double(), draw_pairs(150, ((4, 2),))
    exact = exact_norms(model, pairs).whole[0]
    squares = [probed_norms(model, pairs, probes=1, seed=s).whole[0] ** 2 for s in range(300)]
    error = np.mean(squares, 0) / exact**2 - 1
    assert (np.abs(error) < 4 * (2 / 300) ** 0.5).all()  # four standard errors of chi-square_1


def test_what_cannot_be_done_is_refused():
    model, pairs = build("llama"), draw_pairs(150)
    with pytest.raises(ValueError, match="last_layers: expected an int >= 1 and <= 2, got 3"):
        exact_norms(model, pairs, last_layers=3)
    with pytest.raises(ValueError, match="is torch.bfloat16; expected fp32 or fp64"):
        probed_norms(model.bfloat16(), pairs)
