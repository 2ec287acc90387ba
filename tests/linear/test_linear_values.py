"""Values and gradients of the linear ops against independent formulas in fp64."""

import contextlib
import dataclasses
import itertools
from unittest import mock

import pytest
import torch
from linear_cases import (
    CASES,
    TRAINED,
    as_on_a_gpu,
    assert_right,
    make,
    reductions,
    run_ours,
    run_plain,
)  # fmt: skip

import deepalign_kernels as dak
from deepalign_kernels.ops.linear import gemm
from deepalign_kernels.reference import linear_head

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY = [(name, r) for name in CASES for r in reductions(name)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.every_isa
@pytest.mark.parametrize("full", [True, False], ids=["full", "bare"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name,reduction", EVERY, ids=["-".join(e) for e in EVERY])
def test_against_the_formula(name, reduction, dtype, full, device, backend):
    """Bias, LoRA, softcap, scale, temperature, ignored rows, another reference; or none of it."""
    shape = {}
    if backend == "triton" and device.type == "cpu":  # in the interpreter
        if not full or dtype != torch.float32 or reduction == "sum":
            pytest.skip("one case per row function is enough")
        shape = dict(N=4, H=8, V=19)
    assert_right(name, make(**shape, dtype=dtype, full=full, device=device), reduction)


# (N, H): the head's gradient is one product, or there are two groups; 24 tokens are 16 rows
@pytest.mark.parametrize("N,H,groups", [(24, 16, 1), (24, 4, 2), (7, 16, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name,reduction", EVERY, ids=["-".join(e) for e in EVERY])
def test_the_way_of_a_gpu(name, reduction, dtype, N, H, groups):
    """Chunks of scores, and products for groups of them; of 7 tokens the gradient is kept."""
    p = make(N=N, H=H, dtype=dtype)
    wide = dtype == torch.float32 and N > 7  # there a group is a chunk of 4 to 7 rows
    for compact in (True, False):
        rows = N if not compact else int((p.target != -100).sum())
        with (
            as_on_a_gpu(),
            mock.patch.object(gemm, "head_gradient_add", wraps=gemm.head_gradient_add) as products,
        ):
            assert_right(name, p, reduction, compact=compact)
        shapes = [tuple(c.args[0].shape) for c in products.call_args_list]
        expected = rows // 4 if wide else groups if compact else -(-rows // max(4, 2 * H))
        if reduction == "none" and N > 7:  # scores made again, by tiles of 24, 24 and 19 columns
            assert shapes.count((19, H)) == 1 and (len(p.weight), H) not in shapes
        else:
            assert shapes.count((len(p.weight), H)) == expected


@pytest.mark.parametrize("name,reduction", EVERY, ids=["-".join(e) for e in EVERY])
def test_gradients_to_fp64(name, reduction):
    """The eager backend in fp64 has only roundings of 1e-16 to lose."""
    p = make(dtype=torch.float64)
    ours, gold = run_ours(name, p.leaves(), reduction), run_plain(name, p.leaves(), reduction)
    for key in gold:
        torch.testing.assert_close(ours[key], gold[key], rtol=1e-10, atol=1e-12)


SUBSETS = [s for n in range(6) for s in itertools.combinations(TRAINED, n)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name,reduction",
    [
        ("linear_token_logp", "none"),
        ("linear_constrained_loss/kl", "none"),
        ("linear_constrained_loss/ref_logp", "mean"),
        ("linear_token_kl/js", "sum"),
    ],
)
def test_every_combination_of_trained_inputs(name, reduction, dtype):
    """F19: the gradients of a subset are those of the whole set, up to the mode that makes them."""
    p = make(N=9, H=8, V=19, dtype=dtype)
    whole = run_ours(name, p.leaves(), reduction)
    for only in SUBSETS:
        part = run_ours(name, p.leaves(None, only), reduction)
        assert set(part) == {"value", *only}
        tight = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.02, atol=0.02)
        for key, value in part.items():
            torch.testing.assert_close(value, whole[key], **tight)


@pytest.mark.parametrize(
    "way", [contextlib.nullcontext, lambda: as_on_a_gpu(64)], ids=["cpu", "gpu"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name,reduction", [EVERY[0], EVERY[-1]], ids=str)
def test_results_do_not_depend_on_the_number_of_chunks(name, reduction, dtype, way):
    """F11: from one chunk to 64, each within the budget of plain torch."""
    p = make(N=96, H=8, V=211, dtype=dtype)
    rows, seen = 64, set()
    for chunks in (1, 2, 5, 16, 64):
        with way():
            need = 400_000 if chunks == 1 else _budget(name, p, rows // chunks)
            seen.add(need)
            assert_right(name, p, reduction, max_workspace_bytes=need)
    assert len(seen) == 5


def _budget(name, p, chunk):
    """Bytes that just hold `chunk` rows, found from the outside: the error message and a search."""
    low, high = 1, 400_000
    args = dict(
        op=name.partition("/")[0], tokens=96, trained_tokens=64, hidden_size=8, vocab_size=211,
        dtype=p.hidden.dtype, lora_rank=3, ref_hidden_size=4 if "/" in name else None,
        kl_coef=0.3 if name.endswith("/kl") else 0.0, requires_grad=TRAINED,
        reduction="sum" if "/" in name else None,
    )  # fmt: skip
    while low < high:
        middle = (low + high) // 2
        try:
            fits = dak.estimate_memory(**args, max_workspace_bytes=middle).chunk_tokens >= chunk
        except ValueError:
            fits = False
        low, high = (low, middle) if fits else (middle + 1, high)
    return low


@pytest.mark.parametrize("name,reduction", EVERY, ids=["-".join(e) for e in EVERY])
def test_fixed_shapes_give_the_same(name, reduction):
    """compact=False computes ignored rows too, and gives 0 for them."""
    p = make()
    dropped = run_ours(name, p.leaves(), reduction)
    fixed = run_ours(name, p.leaves(), reduction, compact=False)
    for key in dropped:
        torch.testing.assert_close(fixed[key], dropped[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name,reduction", EVERY, ids=["-".join(e) for e in EVERY])
def test_ignored_rows_are_never_used(name, reduction):
    """NaN in the hidden states and upstream gradients of ignored rows does not leak."""
    p = make()
    expected = run_ours(name, p.leaves(), reduction)
    bad = p.leaves()
    ignored = p.target == -100
    with torch.no_grad():
        for x in (bad.hidden, bad.ref_hidden, bad.grad):
            x[ignored] = torch.nan
    for key, value in run_ours(name, bad, reduction).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("only", [("hidden",), ("hidden", "weight")], ids=str)
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("name,reduction", EVERY, ids=["-".join(e) for e in EVERY])
def test_nothing_trained(name, reduction, compact, only):
    """F15: all ignored, or no rows at all: zeros with a gradient edge, no NaN."""
    p = make(full=False)
    ignored = dataclasses.replace(p, target=torch.full_like(p.target, -100))
    none = dataclasses.replace(
        p, **{k: getattr(p, k)[:0] for k in ("hidden", "ref_hidden", "target", "beta", "grad")}
    )
    for problem in (ignored, none):
        result = run_ours(name, problem.leaves(None, only), reduction, compact=compact)
        assert set(result) == {"value", *only}
        assert all((x == 0).all() for x in result.values())


def test_row_order_does_not_matter():
    p = make(full=False)
    order = torch.randperm(24)
    a = run_ours("linear_constrained_loss/kl", p.leaves(), "none")
    q = dataclasses.replace(
        p, **{k: getattr(p, k)[order] for k in ("hidden", "ref_hidden", "target", "beta", "grad")}
    )
    b = run_ours("linear_constrained_loss/kl", q.leaves(), "none")
    torch.testing.assert_close(b["value"], a["value"][order], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(b["weight"], a["weight"], rtol=1e-5, atol=1e-5)


def test_deterministic():
    p = make(N=64, V=300)
    for name, reduction in (EVERY[0], EVERY[-1]):
        a, b = (run_ours(name, p.leaves(), reduction, max_workspace_bytes=90_000) for _ in "ab")
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_three_dimensions_and_shifted_views():
    """[B, T, H] with a shifted view of the hidden states, as a causal model is trained."""
    g = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 6, 8, generator=g, requires_grad=True)
    weight, target = torch.randn(11, 8, generator=g), torch.randint(0, 11, (2, 5), generator=g)
    logp = dak.linear_token_logp(whole[:, :-1], weight, target)
    expected = torch.log_softmax(whole[:, :-1] @ weight.T, -1).gather(-1, target[..., None])[..., 0]
    torch.testing.assert_close(logp, expected)
    ours, theirs = (torch.autograd.grad(x.sum(), whole)[0] for x in (logp, expected))
    torch.testing.assert_close(ours, theirs)


def test_parts_and_stats():
    p = make(full=False)
    kw = dict(ref_hidden=p.ref_hidden, ref_weight=p.ref_weight)
    loss, parts = dak.linear_constrained_loss(
        p.hidden, p.weight, p.target, beta=p.beta, kl_coef=0.5, return_parts=True, **kw
    )
    stats = dak.linear_token_stats(p.hidden, p.weight, *kw.values(), p.target)
    logits = p.hidden @ p.weight.T, p.ref_hidden @ p.ref_weight.T
    gold = dak.token_stats(*logits, p.target)
    for ours, theirs in zip(stats, gold, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in (
        (parts.logp, gold.logp),
        (parts.ref_logp, gold.ref_logp),
        (parts.kl, gold.kl_policy_ref),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert parts.kl.shape == p.target.shape and not parts.weight.requires_grad
    only_logp = dak.linear_constrained_loss(
        p.hidden, p.weight, p.target, beta=p.beta, ref_logp=parts.ref_logp, return_parts=True
    )[1]
    assert only_logp.kl is None
    torch.testing.assert_close(only_logp.weight, parts.weight)


def test_bf16_scores_are_not_rounded():
    """F2: with fp32 scores a bf16 head loses nothing but the rounding of its inputs."""
    p = make(N=32, H=64, V=500, dtype=torch.bfloat16, full=False)
    wide, narrow = (
        run_ours("linear_token_logp", p.leaves(), "none", logits_dtype=d)["value"].double()
        for d in (None, torch.bfloat16)
    )
    gold = run_plain("linear_token_logp", p.leaves(torch.float64), "none")["value"]
    assert (wide - gold).abs().max() < 1e-4 < 0.02 < (narrow - gold).abs().max()


def test_tied_embeddings():
    """The head is the embedding: autograd adds the two gradients."""
    table = torch.randn(19, 8, requires_grad=True)
    ids = torch.tensor([1, 5, 3, 7, 2])
    mix = torch.randn(5, 5)
    target = torch.tensor([5, -100, 7, 2, 0])
    hidden = mix @ torch.nn.functional.embedding(ids, table)
    ours = dak.linear_constrained_loss(hidden, table, target, beta=0.5, ref_logp=torch.zeros(5))
    theirs = dak.constrained_loss(hidden @ table.T, target, beta=0.5, ref_logp=torch.zeros(5))
    a, b = (torch.autograd.grad(x, table, retain_graph=True)[0] for x in (ours, theirs))
    torch.testing.assert_close(a, b)


def test_lora_is_the_effective_weight():
    """dA and dB are those of autograd through weight + scale * B @ A, without forming its
    gradient."""
    p = make(full=True).leaves(None, ("hidden", "lora_a", "lora_b"))
    merged = p.weight + p.options["lora_scale"] * p.lora_b @ p.lora_a
    kw = {k: v for k, v in p.options.items() if k != "lora_scale"} | {"bias": p.bias}
    kw |= {"beta": 0.5, "ref_logp": torch.zeros(24)}
    theirs = dak.linear_constrained_loss(p.hidden, merged, p.target, **kw)
    ours = dak.linear_constrained_loss(
        p.hidden, p.weight, p.target, lora_a=p.lora_a, lora_b=p.lora_b, lora_scale=0.5, **kw
    )
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        *(torch.autograd.grad(x, (p.hidden, p.lora_a, p.lora_b)) for x in (ours, theirs)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.every_isa
def test_backends_agree_on_rows(device):
    """The same engine on every backend of the row ops."""
    p = make(N=5, H=8, V=21, full=False, device=device)
    here = run_ours("linear_constrained_loss/kl", p.leaves(), "mean")
    with dak.use_backend("eager"):
        there = run_ours("linear_constrained_loss/kl", p.leaves(), "mean")
    for key in here:
        torch.testing.assert_close(here[key], there[key], rtol=1e-5, atol=1e-6)


def test_the_specification_is_autograd():
    """reference/linear_head.py against autograd through the plain formula, in fp64."""
    p = make(dtype=torch.float64).leaves()
    head = (p.hidden, p.weight, p.bias, p.lora_a, p.lora_b)
    logits = linear_head.head_logits(*head, 0.5)
    low = p.hidden @ (0.5 * p.lora_b @ p.lora_a).T
    torch.testing.assert_close(logits, p.hidden @ p.weight.T + low + p.bias)
    upstream = torch.randn_like(logits)
    expected = torch.autograd.grad(logits, head, upstream)
    ours = linear_head.head_gradients(upstream, p.hidden, p.weight, p.lora_a, p.lora_b, 0.5)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
