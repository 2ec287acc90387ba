"""Profiles of two models against a brute-force softmax in fp64; depth in one number; where in the
vocabulary a divergence sits."""

import copy
import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="deepalign_kernels.analyze needs transformers")

import tiny_chat
from answer_pairs import draw_pairs
from tiny_models import FAMILIES, build
from torch import nn

from deepalign_kernels import analyze, check
from deepalign_kernels.analyze import Pair

pytestmark = pytest.mark.clean_memory


def brute_force(model, base, pairs, vocab):
    """name -> [N][K] from whole logits, in fp64, one sequence at a time."""
    rows = []
    for pair in pairs:
        ids = torch.tensor([[*pair.context, *pair.answer]])
        at = slice(len(pair.context) - 1, ids.shape[1] - 1)
        p, q = (m(input_ids=ids).logits[0, at, :vocab].double().softmax(-1) for m in (model, base))
        y = torch.tensor(pair.answer)[:, None]
        mix, py, qy = (p + q) / 2, p.gather(1, y)[:, 0], q.gather(1, y)[:, 0]
        kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
        rows.append(
            {
                "kl_model_base": kl(p, q),
                "kl_base_model": kl(q, p),
                "js": kl(p, mix) / 2 + kl(q, mix) / 2,
                "nll": -py.log(),
                "base_nll": -qy.log(),
                "entropy": -(p * p.log()).sum(-1),
                "base_entropy": -(q * q.log()).sum(-1),
                "top1_agree": (p.argmax(-1) == q.argmax(-1)).double(),
                "log_ratio": py.log() - qy.log(),
                "rank": 1.0 + (p > py[:, None]).sum(-1),
                "base_rank": 1.0 + (q > qy[:, None]).sum(-1),
                "margin": (p.amax(-1) / py).log(),
                "base_margin": (q.amax(-1) / qy).log(),
            }
        )
    return rows


def worst(found, expected, pairs):
    """Largest error over names, positions and examples, relative to the largest value of a name."""
    errors = {}
    for name in expected[0]:
        got = getattr(found, name)
        size = max(float(row[name].detach().abs().max()) for row in expected)
        for i, row in enumerate(expected):
            n = len(pairs[i].answer)
            gap = np.abs(got[i, :n] - row[name].detach().numpy()).max() / max(size, 1.0)
            errors[name] = max(errors.get(name, 0.0), float(gap))
            assert np.isnan(got[i, n:]).all(), name
    return max(errors.values()), errors


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2", "granite", "phi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_number_is_that_of_a_whole_softmax(name, dtype):
    model, base = (build(name).to(dtype) for _ in range(2))
    with torch.no_grad():
        for p in base.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
    pairs = draw_pairs(150)
    found = analyze.profile(model, lambda: base, None, pairs, max_tokens=24)
    wide = [copy.deepcopy(m).double() for m in (model, base)]
    error, errors = worst(found, brute_force(*wide, pairs, 160), pairs)
    assert error < (5e-5 if dtype == torch.float32 else 2e-7), errors
    assert found.vocab == 160 and found.outside == 0.0
    assert found.groups == ("all",) * 4 and found.where[2] == "pair 2"


@pytest.mark.parametrize("name", ["llama", "phi", "granite"])  # plain, with a bias, with a scale
def test_head_gradient_norms_are_those_of_autograd(name):
    model = build(name).double()
    pairs = draw_pairs(150)
    found = analyze.profile(model, model, None, pairs)
    head = model.get_output_embeddings()
    for i, pair in enumerate(pairs):
        ids = torch.tensor([[*pair.context, *pair.answer]])
        logp = model(input_ids=ids).logits[0].log_softmax(-1)
        for t, y in enumerate(pair.answer):
            grads = torch.autograd.grad(
                logp[len(pair.context) - 1 + t, y], list(head.parameters()), retain_graph=True
            )
            expected = math.sqrt(sum(float(g.square().sum()) for g in grads))
            assert found.head_grad[i, t] == pytest.approx(expected, rel=1e-6)
            assert found.base_head_grad[i, t] == pytest.approx(expected, rel=1e-6)


def test_batches_and_budgets_change_nothing_that_matters():
    model, base = tiny_chat.build_model(0).double(), tiny_chat.build_model(1).double()
    tokenizer = tiny_chat.build_tokenizer()
    one, other = (
        analyze.profile(
            model, base, tokenizer, tiny_chat.RECORDS, positions=6, max_tokens=n, **options
        )
        for n, options in ((10**6, {}), (1, {"max_workspace_bytes": 60_000}))
    )
    for metric in one.metrics:
        assert np.allclose(getattr(one, metric), getattr(other, metric), 1e-6, equal_nan=True)


def test_positions_are_those_of_the_last_reply():
    tokenizer = tiny_chat.build_tokenizer()
    pairs = analyze.pairs_of(tokenizer, {"a": tiny_chat.RECORDS[:3], "b": tiny_chat.RECORDS[3:]})
    assert [p.group for p in pairs] == ["a"] * 3 + ["b"] * 4
    assert tokenizer.decode(pairs[2].answer) == "an owl , which s"[:20] + "ees "
    assert tokenizer.decode(pairs[1].answer) == "4<|im_end|>\n"
    assert tokenizer.decode(pairs[2].context).count("a robin") == 1


def test_an_added_token_is_left_out_and_its_weight_is_told():
    model, base = build("llama").double(), build("llama").double()
    longer = copy.deepcopy(base)
    longer.resize_token_embeddings(163)
    pairs = draw_pairs(150)
    found = analyze.profile(longer, model, None, pairs)
    expected = brute_force(longer, model, pairs, 160)
    mass = max(
        float(longer(input_ids=torch.tensor([[*p.context, *p.answer[:-1]]])).logits[
            0, len(p.context) - 1 :].softmax(-1)[:, 160:].sum(-1).max().detach())
        for p in pairs
    )  # fmt: skip
    assert worst(found, expected, pairs)[0] < 1e-6
    assert found.vocab == 160 and mass > 1e-4
    assert found.outside == pytest.approx(mass, rel=1e-6)
    with pytest.raises(ValueError, match="pair 0: its answer has token 161, which only one"):
        analyze.profile(longer, model, None, [Pair((1, 2), (161,), where="pair 0")])
    with pytest.raises(ValueError, match="pair 1: token id 161 is outside the 160 embeddings"):
        analyze.profile(longer, model, None, [pairs[0], Pair((161, 2), (5,), where="pair 1")])


class Int8Linear(nn.Module):
    """A layer as quantisers put it in: no nn.Linear, integer weights."""

    def __init__(self, layer):
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (layer.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.weight * self.scale).T


def test_quantised_layers_and_offloaded_weights(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="device_map needs accelerate")
    base, pairs = build("llama"), draw_pairs(150)
    model = build("llama", seed=1) if "seed" in build.__code__.co_varnames else build("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj = Int8Linear(layer.mlp.up_proj)
    expected = brute_force(model, base, pairs, 160)
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk"}
    parts |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(2)}
    spread = accelerate.dispatch_model(
        copy.deepcopy(base), {**parts, "lm_head": "disk"}, offload_dir=tmp_path, main_device="cpu"
    )
    assert any(p.device.type == "meta" for p in spread.parameters())
    error, errors = worst(analyze.profile(model, spread, None, pairs), expected, pairs)
    assert error < 1e-4, errors


def test_models_are_left_as_they_were():
    model, base = tiny_chat.build_model(0).train(), tiny_chat.build_model(1)
    before = dict(model.__dict__)
    analyze.profile(model, base, None, draw_pairs(250))
    assert model.training and model.__dict__ == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_what_is_saved_is_read_back(tmp_path):
    model = tiny_chat.build_model()
    one = analyze.profile(model, tiny_chat.build_model(1), None, draw_pairs(250))
    one.save(tmp_path / "p.npz")
    two = analyze.Profile.load(tmp_path / "p.npz")
    assert (two.groups, two.where, two.vocab) == (one.groups, one.where, one.vocab)
    for metric in one.metrics:
        assert np.array_equal(getattr(one, metric), getattr(two, metric), equal_nan=True)


# --- other tokenizers -----------------------------------------------------------------------------


def test_tokenizers_that_differ_are_refused_with_the_reason():
    own, other = tiny_chat.build_tokenizer(), tiny_chat.build_tokenizer()
    assert analyze.check_tokenizers(own, other) == []
    other.add_tokens(["<new>"])
    (note,) = analyze.check_tokenizers(own, other)
    assert "1 added tokens are known to one model only, such as '<new>' to the base" in note

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    spec = json.loads(own.backend_tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    text = json.dumps(spec)
    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text))
    with pytest.raises(ValueError, match="base: its tokenizer is another one: 2 token ids differ"):
        analyze.check_tokenizers(own, swapped)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda m: analyze.profile(m, m, None, []), "data: "),
        (lambda m: analyze.profile(m, m, None, [Pair((1,), (2,))], positions=0), "positions: "),
        (
            lambda m: analyze.profile(m, build("gemma2"), None, draw_pairs(150)),
            "base: its softcap is 3.0, that of the model None",
        ),
        (
            lambda m: analyze.profile(m, m, None, draw_pairs(150)).curve("kl"),
            "metric: expected one of 'kl_model_base'",
        ),
        (
            lambda m: analyze.profile(m, m, None, draw_pairs(150)).curve("nll", "none"),
            "group: expected one of 'all' or None, got 'none'",
        ),
    ],
)
def test_mistakes_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(build("llama"))


# --- where in the vocabulary ----------------------------------------------------------------------


def test_the_terms_of_the_divergence_add_up():
    model, base = tiny_chat.build_model(0).double(), tiny_chat.build_model(1).double()
    pairs = draw_pairs(250)
    a, b = analyze.collect(model, pairs), analyze.collect(base, pairs)
    found = analyze.largest_terms(a, b, pairs, positions=9, top=4, max_workspace_bytes=1)
    kl = analyze.profile_of(a, b, pairs).curve("kl_model_base")
    assert [t.examples for t in found] == [4, 3, 3, 3, 2, 2, 2, 1]
    for terms in found:
        assert terms.kl == pytest.approx(kl.mean[terms.position - 1], rel=1e-6)
        assert sum(terms.terms) + terms.rest == pytest.approx(terms.kl, rel=1e-12)
        for probs, rest in (
            (terms.model_prob, terms.rest_model_prob),
            (terms.base_prob, terms.rest_base_prob),
        ):
            assert sum(probs) + rest == pytest.approx(1.0, rel=1e-12)
    first = found[0]
    p, q = (
        torch.stack(
            [m(input_ids=torch.tensor([p.context])).logits[0, -1].softmax(-1) for p in pairs]
        )
        for m in (model, base)
    )
    every = (p * (p / q).log()).mean(0)
    assert first.tokens == every.topk(4).indices.tolist()
    assert first.terms == pytest.approx(every.topk(4).values.tolist(), rel=1e-9)
    assert first.model_prob == pytest.approx(p.mean(0)[first.tokens].tolist(), rel=1e-9)
    odd = analyze.largest_terms(a, b, pairs, group="odd", positions=1)
    assert odd[0].examples == 2


# --- sampled answers ------------------------------------------------------------------------------


def test_sampled_answers_follow_the_model_and_its_seed():
    model, tokenizer = tiny_chat.build_model(0), tiny_chat.build_tokenizer()
    pairs = draw_pairs(250, ((5, 3), (9, 3), (2, 3), (7, 3)))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        one = analyze.sample_answers(model, tokenizer, pairs, positions=6, seed=1)
        untouched = torch.rand(1)
        torch.manual_seed(5)
        assert torch.equal(untouched, torch.rand(1))
    assert one == analyze.sample_answers(model, tokenizer, pairs, positions=6, seed=1)
    assert one != analyze.sample_answers(model, tokenizer, pairs, positions=6, seed=2)
    assert [p.context for p in one] == [p.context for p in pairs]
    for pair in one:
        assert 1 <= len(pair.answer) <= 6
        assert 2 not in pair.answer[:-1]  # the end mark ends it
    cold = analyze.sample_answers(
        model, tokenizer, pairs, positions=3, temperature=1e-4, top_p=1.0, max_tokens=1
    )
    for pair in cold:  # the most probable token each time, whatever the batch
        ids = list(pair.context)
        for token in pair.answer:
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


def test_the_checks_of_this_file_see_a_wrong_number():
    """The oracle is not the code: a profile that is a little off is found."""
    model, base = build("llama").double(), build("llama").double()
    with torch.no_grad():
        base.lm_head.weight.mul_(1.1)
    pairs = draw_pairs(150)
    found = analyze.profile(model, base, None, pairs)
    found.kl_model_base[1, 2] *= 1.01
    assert worst(found, brute_force(model, base, pairs, 160), pairs)[0] > 1e-5
    assert "llama" in FAMILIES and check.count("n", 1, 1) is None
