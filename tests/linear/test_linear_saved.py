"""Per-token linear ops with a trained head: the gradient of the scores that the forward keeps."""

import contextlib
import dataclasses
from unittest import mock

import pytest
import torch
from linear_cases import (
    CASES,
    FULL,
    TRAINED,
    as_on_a_gpu,
    assert_right,
    make,
    run_ours,
    run_plain,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import deepalign_kernels as dak
from deepalign_kernels import backends
from deepalign_kernels._memory import measure
from deepalign_kernels.ops.linear import gemm, plan, torch_ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD = ("hidden", "weight")
PRODUCTS = ("scores_into", "rows_gradient_into", "head_gradient_add")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.interpreter_slow]


@contextlib.contextmanager
def calls():
    """{"kept": shapes of what forwards kept, "again": backwards that made the scores again, the
    products: shapes of their first argument, "rows": row functions}."""
    seen = {name: [] for name in ("kept", "again", "rows", *PRODUCTS)}

    def spy(owner, name, note):
        inner = getattr(owner, name)

        def wrapper(*args, **kw):
            out = inner(*args, **kw)
            note(out, *args)
            return out

        return mock.patch.object(owner, name, wrapper)

    with contextlib.ExitStack() as stack:
        for owner, name, note in (
            (torch_ops, "_saved", lambda out, *_: seen["kept"].append(tuple(out[1].shape))),
            (torch_ops, "_bwd", lambda *_: seen["again"].append(1)),
            (backends, "choose", lambda _, op, *__: seen["rows"].append(op)),
        ):
            stack.enter_context(spy(owner, name, note))
        for name in PRODUCTS:
            note = lambda _, *args, name=name: seen[name].append(tuple(args[1].shape))  # noqa: E731
            stack.enter_context(spy(gemm, name, note))
        yield seen


def sizes(p, name):
    """What `estimate_memory` asks about a problem and a case."""
    op, _, kind = name.partition("/")
    full = p.bias is not None
    return dict(
        op=op, tokens=len(p.hidden), hidden_size=p.hidden.shape[1], vocab_size=len(p.weight),
        dtype=p.hidden.dtype, reduction="none", lora_rank=3 if full else 0,
        requires_grad=TRAINED if full else HEAD, kl_coef=0.3 if kind == "kl" else 0.0,
        kl_direction=kind if op == "linear_token_kl" else "policy_ref",
        ref_hidden_size=p.ref_hidden.shape[1] if kind and kind != "ref_logp" else None,
    )  # fmt: skip


def least_that_keeps(p, name):
    """The smallest budget within which all tokens are one chunk that is kept."""
    low, high = 1, 10_000_000
    while low < high:
        middle, kept = (low + high) // 2, 0
        with contextlib.suppress(ValueError):
            kept = dak.estimate_memory(**sizes(p, name), max_workspace_bytes=middle).kept
        low, high = (low, middle) if kept else (middle + 1, high)
    return low


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_one_row_more_than_a_chunk_makes_the_scores_again(name, dtype, device, backend):
    """N that just fits keeps, N + 1 does not, within one budget; both are right."""
    shape = dict(H=16, V=67)
    if backend == "triton" and device.type == "cpu":
        if dtype != torch.float32:
            pytest.skip("the interpreter is slow")
        shape = dict(H=8, V=19)
    fits, more = (make(N=n, **shape, dtype=dtype, device=device) for n in (12, 13))
    budget = dict(max_workspace_bytes=least_that_keeps(fits, name))
    for p, keeps in ((fits, True), (more, False)):
        with calls() as seen:
            assert_right(name, p, "none", **budget)
        assert [s != (0,) for s in seen["kept"]] == [keeps] and bool(seen["again"]) != keeps


def test_the_default_keeps_up_to_2047_tokens():
    for n, kept in ((1, (1, 5)), (2047, (2047, 5)), (2048, (0,)), (0, (0, 5))):
        p = make(N=n, H=3, V=5, full=False)
        p.target.clamp_(min=0)
        with calls() as seen:
            run_ours("linear_token_logp", p.leaves(None, HEAD), "none")
        assert seen["kept"] == [kept] and len(seen["again"]) == (kept == (0,))


@pytest.mark.parametrize("only", [HEAD, ("weight",), ("hidden", "bias"), TRAINED], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_backward_has_two_products_and_no_row_function(name, only):
    p = make(full="bias" in only).leaves(None, only)
    rows, V = int((p.target != -100).sum()), len(p.weight)
    with calls() as seen:
        value = CASES[name].ours(p, **({"reduction": "none"} if CASES[name].scalar else {}))
        forward = {key: list(x) for key, x in seen.items()}
        torch.autograd.grad(value, [getattr(p, k) for k in only], p.grad)
    assert forward["kept"] == [(rows, V)] and forward["rows"]
    assert seen["scores_into"] == forward["scores_into"] and seen["rows"] == forward["rows"]
    assert not forward["rows_gradient_into"] and not forward["head_gradient_add"]
    wide = [s for k in PRODUCTS[1:] for s in seen[k] if s == (rows, V)]
    lora = 2 if "lora_a" in only else 1 if p.lora_a is not None and "hidden" in only else 0
    assert len(wide) == len(set(only) & {"hidden", "weight", "bias"}) + lora


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_both_ways_agree(name, compact, dtype):
    """fp32 to rounding; 16 bit to one rounding of each row's gradient."""
    p = make(dtype=dtype)
    few = dict(max_workspace_bytes=least_that_keeps(p, name) // 2, compact=compact)
    with calls() as seen:
        kept = run_ours(name, p.leaves(), "none", compact=compact)
        again = run_ours(name, p.leaves(), "none", **few)
    assert len(seen["again"]) == 1
    wide = dtype == torch.float32
    for key, value in kept.items():
        top = 1e-6 if wide else 0.02 if key != "value" else 1e-5
        error = (value.double() - again[key].double()).abs().max()
        assert error <= top * again[key].double().abs().max() + 1e-6, key


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("scale", [1e-8, 1e-5, 1e4, 3e4])
def test_fp16_keeps_its_range(scale, fast):
    """hidden * g is 1e-7 or 1e5: out of the range of fp16, which only what is returned has."""
    p = make(N=9, H=8, V=19, dtype=torch.float16)
    p = dataclasses.replace(p, hidden=p.hidden * 4, grad=p.grad.clamp(-2, 2) * scale)
    p = dataclasses.replace(p, options={**FULL, "temperature": 20.0})  # results stay in it
    p = dataclasses.replace(p, weight=p.weight / 8, lora_a=p.lora_a / 8, lora_b=p.lora_b / 8)
    with mock.patch.object(gemm, "fast_16bit", lambda *_: fast):
        ours = run_ours("linear_token_logp", p.leaves(), "none")
    gold = run_plain("linear_token_logp", p.leaves(torch.float64), "none")
    for key in TRAINED:
        expected = gold[key].to(torch.float16).double()
        least = 2**-24 * (2 if key == "hidden" else 1)  # a step of the smallest fp16
        error = (ours[key].double() - expected).abs().max()
        assert error <= 4e-3 * expected.abs().max() + least, key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compact", [True, False])
def test_a_nan_stays_where_it_belongs(compact, dtype):
    """Upstream NaN and inf: of ignored rows nowhere; of a used one in its row of hidden, and in
    the sums."""
    p = make(dtype=dtype, full=False)
    expected = run_ours("linear_token_kl/policy_ref", p.leaves(None, HEAD), "none", compact=compact)
    bad = p.leaves(None, HEAD)
    with torch.no_grad():
        bad.grad[p.target == -100] = torch.tensor([torch.nan, torch.inf]).repeat(4)
    result = run_ours("linear_token_kl/policy_ref", bad, "none", compact=compact)
    assert all(torch.equal(result[k], expected[k]) for k in expected)
    with torch.no_grad():
        bad.grad[3] = torch.nan
    result = run_ours("linear_token_kl/policy_ref", bad, "none", compact=compact)
    assert result["hidden"][3].isnan().all() and result["weight"].isnan().all()
    others = torch.arange(24) != 3
    assert torch.equal(result["hidden"][others], expected["hidden"][others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_upstream_gives_zero(dtype):
    p = make(dtype=dtype)
    p = dataclasses.replace(p, grad=torch.zeros(24))
    result = run_ours("linear_token_logp", p.leaves(), "none")
    assert all((result[k] == 0).all() for k in TRAINED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_backward_twice(name, dtype):
    """What was kept is not written to; another upstream gradient may follow."""
    p = make(dtype=dtype).leaves()
    leaves = list(p.trained().values())
    value = CASES[name].ours(p, **({"reduction": "none"} if CASES[name].scalar else {}))
    upstreams = (p.grad.detach(), p.grad.detach() * 2, p.grad.detach())
    once, double, again = (
        torch.autograd.grad(value, leaves, u.to(value.dtype), retain_graph=True) for u in upstreams
    )
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    if dtype != torch.float16:  # a power of two changes no rounding
        assert all(torch.equal(2 * a, b) for a, b in zip(once, double, strict=True))


def test_two_calls_before_one_backward():
    a, b = make(N=9, H=8, V=19, full=False), make(N=12, H=8, V=19, full=False, seed=5)
    weight = a.weight.clone().requires_grad_()
    calls_ = [dak.linear_token_logp(p.hidden, weight, p.target).sum() for p in (a, b)]
    (together,) = torch.autograd.grad(calls_[0] - 2 * calls_[1], weight)
    apart = [
        torch.autograd.grad(dak.linear_token_logp(p.hidden, weight, p.target).sum(), weight)[0]
        for p in (a, b)
    ]
    torch.testing.assert_close(together, apart[0] - 2 * apart[1])


def test_nothing_is_kept_without_gradients():
    p = make(N=300, H=8, V=500, full=False)
    for q, quietly in (
        (p.leaves(None, HEAD), torch.no_grad),
        (p.leaves(None, ()), contextlib.nullcontext),
    ):
        with calls() as seen, quietly():
            _, allocated = measure(lambda: dak.linear_token_logp(q.hidden, q.weight, q.target))  # noqa: B023
        assert not seen["kept"] and allocated.kept < 10_000


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["linear_token_logp", "linear_token_kl/js"])
def test_a_step_takes_no_more_memory_than_with_recomputation(name, dtype):
    """The backward that makes the scores again holds that chunk at the same moment."""
    p = make(N=400, H=16, V=3000, dtype=dtype, full=False)
    packed = 800_000 if dtype == torch.bfloat16 else 0  # what oneDNN may keep

    def step():
        run_ours(name, p.leaves(None, HEAD), "none")

    kept = measure(step)[1].peak
    with mock.patch.object(plan, "keeps", lambda *_: False):
        again = measure(step)[1].peak
    assert kept <= 1.02 * again + packed


@pytest.mark.parametrize("ignored", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["linear_token_logp", "linear_token_kl/ref_policy"])
def test_what_is_kept_counts_as_workspace(name, dtype, ignored):
    """Within the least budget that keeps, in the forward and in the backward, also where one
    ignored token makes all rows move."""
    p = make(N=40, H=12, V=3000, dtype=dtype, full=False)
    p.target.clamp_(min=0)[:ignored] = -100
    budget = least_that_keeps(p, name)
    p = p.leaves(None, HEAD)
    kw = {"reduction": "none"} if CASES[name].scalar else {}
    with calls() as seen:
        value, first = measure(lambda: CASES[name].ours(p, max_workspace_bytes=budget, **kw))
    leaves = [p.hidden, p.weight]
    grads, then = measure(lambda: torch.autograd.grad(value, leaves, p.grad))
    assert seen["kept"] == [(40 - ignored, 3000)]
    results = 2000  # values, and the indices of the rows
    assert first.peak <= budget + results
    totals = sum(g.nbytes for g in grads) + (dtype == torch.float16) * 4 * p.weight.numel()
    assert first.kept + then.peak <= budget + results + totals


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_a_shared_head(shared, dtype, gpu):
    """Policy and reference of one head: the reference's scores are not kept with the others, nor
    with their gradient where a GPU goes over the vocabulary."""
    g = torch.Generator().manual_seed(3)
    hidden, ref, weight = (
        torch.randn(*s, generator=g).to(dtype) for s in ((9, 8), (9, 8), (19, 8))
    )
    results = []
    for head in (weight.requires_grad_(), weight.detach().double().requires_grad_()):
        h = hidden.to(head.dtype).requires_grad_()
        own = head.detach() if shared else head.detach().clone()
        if head.dtype == torch.float64:
            q, p = ((x @ w.T).log_softmax(-1) for x, w in ((h, head), (ref.double(), own)))
            value = (q.exp() * (q - p)).sum(-1)
        else:
            with as_on_a_gpu() if gpu else contextlib.nullcontext(), calls() as seen:
                value = dak.linear_token_kl(h, head, ref, own)
                results.append((value, *torch.autograd.grad(value.sum(), (h, head))))
            assert gpu or (seen["kept"] == [(9, 19)] and len(seen["scores_into"]) == 2)
            assert not gpu or (not seen["kept"] and seen["again"])
            continue
        results.append((value, *torch.autograd.grad(value.sum(), (h, head))))
    tight = 1e-5 if dtype == torch.float32 else 0.02
    for ours, gold in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), gold, rtol=tight, atol=tight)


@pytest.mark.clean_memory
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    p = make(full=False)
    hidden, weight = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()

    def loss(x):
        return (dak.linear_token_logp(x * 1.5, weight, p.target) * p.grad).sum()

    expected = torch.autograd.grad(loss(hidden), (hidden, weight))
    checkpoint(loss, hidden, use_reentrant=reentrant).backward()
    assert torch.equal(hidden.grad, expected[0]) and torch.equal(weight.grad, expected[1])


@pytest.mark.slow
@pytest.mark.clean_memory
@pytest.mark.parametrize(
    "dtype,compact,gpu",
    [(torch.float32, True, False), (torch.bfloat16, False, False), (torch.bfloat16, True, True)],
    ids=str,
)
def test_compiled_lengths_on_both_sides_of_the_chunk(dtype, compact, gpu):
    """One graph for all lengths that are kept, one for those that are not; ignored rows leave the
    shapes alone."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    p = make(N=8, H=6, V=11, dtype=dtype, full=False)

    def loss(hidden, weight, target):
        return dak.linear_token_logp(hidden, weight, target, compact=compact).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    chunk = mock.patch.object(plan, "DEFAULT_CHUNK", 8)
    with as_on_a_gpu(8) if gpu else chunk:
        for n in (9, 12, 15, 16, 33):
            q, results = make(N=n, H=6, V=11, dtype=dtype, full=False), []
            for fn in (loss, compiled):
                leaves = [x.detach().requires_grad_() for x in (q.hidden, p.weight)]
                value = fn(*leaves, q.target)
                results.append((value.detach(), *torch.autograd.grad(value, leaves)))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)
            graphs.append(counter.frame_count)
    nodes = [n for graph in counter.graphs for n in graph.graph.nodes]
    whole = [n.args[-1] for n in nodes if n.target == torch.ops.deepalign.linear_saved.default]
    assert whole and all(whole)
    assert [n - graphs[0] for n in graphs] == [0, 0, 0, 1, 1]


@pytest.mark.clean_memory
@pytest.mark.skipif(backends.native_library("cpu") is not None, reason="no native library here")
def test_what_is_kept_is_in_large_pages():
    hidden, weight = torch.randn(200, 8), torch.randn(32000, 8, requires_grad=True)
    with mock.patch.object(backends, "fresh_pages", wraps=backends.fresh_pages) as fresh:
        dak.linear_token_logp(hidden, weight, torch.zeros(200, dtype=torch.long))
    assert (200, 32000) in [tuple(c.args[0].shape) for c in fresh.call_args_list]


def test_the_options_reach_the_kept_gradient():
    """Softcap, scale, temperature and LoRA are in FULL, which `make` uses; fp64 has nothing else to
    lose."""
    assert set(FULL) == {"softcap", "logit_scale", "temperature", "lora_scale"}
    p = make(N=1, H=8, V=19, dtype=torch.float64)
    for name in CASES:
        with calls() as seen:
            ours = run_ours(name, p.leaves(), "none")
        gold = run_plain(name, p.leaves(), "none")
        assert seen["kept"] == [(1, 19)]
        for key in gold:
            torch.testing.assert_close(ours[key], gold[key], rtol=1e-10, atol=1e-12)
