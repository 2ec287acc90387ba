"""What the linear ops allocate, from the allocator's own records, against `estimate_memory`."""

import contextlib
import itertools
import warnings
from unittest import mock

import pytest
import torch
from linear_cases import as_on_a_gpu

import deepalign_kernels as dak
from benchmarks.cases.logits import Shape
from benchmarks.offline import linear_model
from deepalign_kernels import backends
from deepalign_kernels._memory import measure
from deepalign_kernels.ops.linear import gemm

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
N, H, V = 300, 24, 4000
HEAD = V * H * 4  # bytes of the head in fp32


@pytest.fixture(autouse=True)
def quiet(capfd):
    """The profiler writes a line to stderr for each start and stop."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def call(op, dtype=F32, trained=None, requires_grad=("hidden", "weight"), rank=0, **kw):
    """(forward, leaves): a call on fresh tensors, as `estimate_memory` describes it by the same
    words."""
    hidden = torch.randn(N, H).to(dtype).requires_grad_("hidden" in requires_grad)
    weight = torch.randn(V, H).to(dtype).requires_grad_("weight" in requires_grad)
    leaves = {"hidden": hidden, "weight": weight}
    if rank:
        for name, shape in (("lora_a", (rank, H)), ("lora_b", (V, rank))):
            leaves[name] = torch.randn(shape).to(dtype).requires_grad_(name in requires_grad)
    lora = {k: v for k, v in leaves.items() if k.startswith("lora")}
    target = torch.randint(0, V, (N,))
    if trained is not None:
        target[torch.randperm(N)[trained:]] = -100
    ref_size, shared = kw.pop("ref_hidden_size", None), kw.pop("shared_head", False)
    ref = torch.randn(N, H if shared else ref_size or 1).to(dtype)
    ref_weight = weight.detach() if shared else torch.randn(V, ref_size or 1).to(dtype)
    if "kl_direction" in kw and op == "linear_token_kl":
        kw["direction"] = kw.pop("kl_direction")

    def forward():
        if op == "linear_token_logp":
            return dak.linear_token_logp(hidden, weight, target, **lora, **kw)
        if op == "linear_token_kl":
            valid = target != -100
            return dak.linear_token_kl(hidden, weight, ref, ref_weight, valid=valid, **lora, **kw)
        if op == "linear_token_stats":
            return dak.linear_token_stats(hidden, weight, ref, ref_weight, target, **kw)
        given = {"ref_logp": torch.zeros(N)}
        if ref_size or shared:
            given = {"ref_hidden": ref, "ref_weight": ref_weight}
        return dak.linear_constrained_loss(hidden, weight, target, beta=0.5, **given, **lora, **kw)

    return forward, [x for x in leaves.values() if x.requires_grad]


def estimate(op, dtype=F32, trained=None, rank=0, **kw):
    return dak.estimate_memory(
        op, tokens=N, hidden_size=H, vocab_size=V, dtype=dtype, trained_tokens=trained,
        lora_rank=rank, **kw,
    )  # fmt: skip


LORA = ("hidden", "lora_a", "lora_b")
ESTIMATES = [
    dict(op="linear_token_logp"),
    dict(op="linear_token_logp", trained=100),
    dict(op="linear_token_logp", trained=100, requires_grad=("hidden",)),
    dict(op="linear_token_logp", trained=0),  # the head's gradient and its copy in fp16 alone
    dict(op="linear_token_logp", trained=200, compact=False, requires_grad=("weight",)),
    dict(op="linear_token_logp", max_workspace_bytes=2 << 20),
    dict(op="linear_token_logp", requires_grad=()),
    dict(op="linear_constrained_loss", trained=200),
    dict(op="linear_constrained_loss", max_workspace_bytes=2 << 20),
    dict(op="linear_constrained_loss", reduction="none", requires_grad=("weight",)),
    dict(op="linear_constrained_loss", ref_hidden_size=40, kl_coef=0.1, trained=150),
    dict(op="linear_constrained_loss", shared_head=True, rank=4, requires_grad=LORA),
    dict(op="linear_token_kl", ref_hidden_size=16, max_workspace_bytes=3 << 20),
    dict(op="linear_token_kl", ref_hidden_size=16, reduction="sum", kl_direction="js"),
    dict(op="linear_token_kl", shared_head=True, requires_grad=("hidden",)),
    dict(op="linear_token_kl", shared_head=True, rank=4, requires_grad=LORA),
    dict(op="linear_token_kl", ref_hidden_size=16, kl_direction="js", trained=250),
    dict(op="linear_token_stats", ref_hidden_size=16, requires_grad=()),
]


# All of them; of each case one, in turn, when there is little time.
MEASURED = [
    pytest.param(case, dtype, backend, marks=[pytest.mark.slow] * ((i + j) % 6 != 0))
    for i, case in enumerate(ESTIMATES)
    for j, (dtype, backend) in enumerate(itertools.product((F32, BF16, F16), ("native", "eager")))
]


@pytest.mark.parametrize("case,dtype,backend", MEASURED, ids=str)
def test_the_estimate_is_the_peak(case, dtype, backend):
    """Within 2 %; bf16 GEMMs keep up to 0.7 MB of packed operands in oneDNN, seen at these
    sizes."""
    if why := backends.unavailable(backend, "token_kl_fwd", "cpu"):
        pytest.skip(why)
    with dak.use_backend(backend):
        forward, leaves = call(dtype=dtype, **case)
        expected = estimate(dtype=dtype, **case)
        out, allocated = measure(forward)
        packed = 800_000 if dtype == BF16 else 0
        if expected.forward_peak > 100_000:
            assert -packed <= expected.forward_peak - allocated.peak + 0.02 * allocated.peak
            assert expected.forward_peak <= 1.02 * allocated.peak
        assert 0 <= allocated.kept - expected.kept <= expected.results + 64
        if expected.backward_peak > 100_000:
            upstream = torch.randn_like(out)
            _, allocated = measure(lambda: torch.autograd.grad(out, leaves, upstream))
            assert -packed <= expected.backward_peak - allocated.peak + 0.02 * allocated.peak
            assert expected.backward_peak <= 1.02 * allocated.peak


@pytest.mark.parametrize("budget", [200_000, 1 << 20, 4 << 20])
@pytest.mark.parametrize("op", ["linear_constrained_loss", "linear_token_kl"])
def test_the_workspace_stays_within_the_budget(op, budget):
    kw = dict(max_workspace_bytes=budget, reduction="sum", ref_hidden_size=8)
    forward, _ = call(op, **kw)
    plan = estimate(op, **kw)
    assert plan.workspace <= budget and plan.chunks > 1
    results = plan.grad_hidden + plan.grad_head + plan.results
    assert measure(forward)[1].peak <= budget + results + 50_000


def test_the_default_chunks():
    """At least 1024 tokens where there are as many; a small batch is one chunk; all are equal."""
    for tokens, chunks in ((1, 1), (300, 1), (1024, 1), (2047, 1), (2048, 2), (8000, 7)):
        plan = dak.estimate_memory(
            "linear_token_logp", tokens=tokens, hidden_size=64, vocab_size=100
        )
        assert plan.chunks == chunks
        assert plan.chunk_tokens >= min(tokens, 1024)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [pytest.param(F32, marks=pytest.mark.slow), F16], ids=str)
def test_a_frozen_head_allocates_nothing_of_its_size(reduction, dtype):
    """Forward and backward, with LoRA on the head or without (few rows, so that a head would
    show)."""
    for requires_grad, rank in ((("hidden",), 0), (LORA, 4)):
        kw = dict(requires_grad=requires_grad, rank=rank, trained=20, reduction=reduction)
        forward, leaves = call("linear_constrained_loss", dtype=dtype, **kw)
        with mock.patch.object(gemm, "TILE_BYTES", 60_000):
            out, first = measure(forward)
            upstream = torch.ones_like(out)
            _, then = measure(lambda: torch.autograd.grad(out, leaves, upstream))  # noqa: B023
        chunk = 20 * V * 4
        for allocated in (first, then):
            assert allocated.largest <= chunk
            assert allocated.peak < 1.6 * chunk + 4 * V * 4 * 3  # three of [V, r] at the most


def test_no_gradient_allocates_no_gradient():
    """F19: under no_grad and inference_mode only the chunk and the values."""
    for quietly in (torch.no_grad, torch.inference_mode):
        forward, _ = call("linear_constrained_loss")
        with quietly():
            assert measure(forward)[1].peak < 1.02 * N * V * 4


def test_a_shared_head_is_one_gemm():
    """Policy and reference rows go through the one head tensor together."""
    counts = {}
    for shared in (True, False):
        kw = dict(shared_head=True) if shared else dict(ref_hidden_size=H)
        forward, _ = call("linear_token_kl", requires_grad=("hidden",), reduction="sum", **kw)
        with mock.patch.object(gemm, "scores_into", wraps=gemm.scores_into) as scores:
            forward()
        counts[shared] = [tuple(c.args[0].shape) for c in scores.call_args_list]
    assert counts == {True: [(2 * N, V)], False: [(N, V), (N, V)]}


@pytest.mark.parametrize(
    "reduction,requires_grad,products",
    [("mean", ("hidden", "weight"), 3), ("mean", ("hidden",), 2), ("none", ("hidden",), 2),
     ("none", ("hidden", "weight"), 3), ("mean", (), 1)],
)  # fmt: skip
def test_number_of_gemms(reduction, requires_grad, products):
    """The counts that the docstrings promise: forward and backward together."""
    forward, leaves = call(
        "linear_constrained_loss", requires_grad=requires_grad, reduction=reduction
    )
    names = ("scores_into", "rows_gradient_into", "head_gradient_add")
    patches = [mock.patch.object(gemm, n, wraps=getattr(gemm, n)) for n in names]
    spies = [p.start() for p in patches]
    try:
        out = forward()
        if leaves:
            torch.autograd.grad(out, leaves, torch.ones_like(out))
    finally:
        for p in patches:
            p.stop()
    assert sum(s.call_count for s in spies) == products


GPU = dict(hidden_size=4096, vocab_size=128256, dtype=BF16, compact=False, device="cuda")


RECORDED = pytest.mark.skipif(
    torch.__version__ < (2, 12), reason="torch 2.10 and 2.11 do not multiply with out_dtype on meta"
)


@pytest.mark.parametrize("name", linear_model.STEPS)
@pytest.mark.parametrize("tokens", [1500, 8192, 20000])
@RECORDED
def test_what_a_step_allocates_on_a_gpu(name, tokens):
    """Recorded on meta tensors: the estimate, within 2 %."""
    op, reduction, trained, kw = linear_model.STEPS[name]
    known = {k: v for k, v in kw.items() if k == "logits_dtype"}
    ref = dict(ref_hidden_size=4096) if op == "linear_token_kl" else {}
    with mock.patch.object(backends, "runs_eagerly", lambda *_: False):
        expected = dak.estimate_memory(
            op, tokens=tokens, requires_grad=trained, reduction=reduction, **GPU, **known, **ref
        )
    step = linear_model.step(name, Shape(tokens, 128256, 4096))
    assert abs(step.peak / expected.peak - 1) < 0.02


@RECORDED
def test_what_a_step_launches_on_a_gpu():
    """8192 tokens are one group: 8 chunks of scores, one product for each gradient, in its own
    dtype; 16384 are two, which are summed in fp32."""
    head, wide = (BF16, BF16), (BF16, F32)
    chunk = (1024, 128256, 4096), wide
    step = linear_model.step("constrained_loss")
    products = [((8192, 4096, 128256), head), ((128256, 4096, 8192), head)]
    assert [(x.gemm, x.dtypes) for x in step.gemms] == [chunk] * 8 + products
    assert not any(x.adds for x in step.gemms) and len(step.launches) < 50
    assert step.peak < 3.23e9 and sum(x.bytes for x in step.launches) < 26e9
    # before: 46 ms, 66 GB, a head's gradient per chunk
    assert step.milliseconds(linear_model.CARDS["H100"], one_sweep=True) < 39.5
    assert step.milliseconds(linear_model.CARDS["H100"], one_sweep=False) < 40.5
    step = linear_model.step("constrained_loss", Shape(16384, 128256, 4096))
    summed = [x for x in step.gemms if x.gemm and x.gemm[0] == 128256]
    assert [x.dtypes for x in summed] == [wide] * 2 and [x.adds > 0 for x in summed] == [
        False,
        True,
    ]
    assert [x.gemm for x in step.gemms if x.gemm[1] == 128256] == [chunk[0]] * 16


@RECORDED
def test_what_a_backward_over_the_vocabulary_launches():
    """Tiles of 4096 columns: each part of the head's gradient once, in bf16; the fp32 sum is that
    of hidden."""
    step = linear_model.step("token_logp")
    tiles = [(x.gemm, x.dtypes, x.adds > 0) for x in step.gemms[8:]]
    wide, head = (BF16, F32), (BF16, BF16)
    for i in range(31):
        assert tiles[3 * i : 3 * i + 3] == [
            ((8192, 4096, 4096), wide, False),
            ((4096, 4096, 8192), head, False),
            ((8192, 4096, 4096), wide, i > 0),
        ]
    assert len(step.gemms) == 8 + 3 * 32  # the last tile has 1280 columns
    # before: 60 ms and 3.22 GB
    assert step.peak < 1.5e9 and step.milliseconds(linear_model.CARDS["H100"], False) < 54.5


@pytest.mark.parametrize("there", [True, False])
def test_a_gpu_without_fp32_results_is_loud(there):
    """One warning per process and dtype, with torch's version and the cost; "meta" is the GPU."""
    gemm.has_wide_gemm.cache_clear()
    missing = NotImplementedError("not for this device")
    with (
        mock.patch.object(torch, "addmm", side_effect=None if there else missing),
        warnings.catch_warnings(record=True) as seen,
    ):
        warnings.simplefilter("always")
        assert [gemm.has_wide_gemm("meta", BF16) for _ in "ab"] == [there] * 2
    gemm.has_wide_gemm.cache_clear()
    assert len(seen) == (not there)
    for warning in seen:
        for said in (torch.__version__, "10 times", "NotImplementedError: not for this device"):
            assert said in str(warning.message)


@pytest.mark.parametrize(
    "full",
    [torch.OutOfMemoryError("full"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")],
    ids=["torch", "cublas"],
)
def test_out_of_memory_is_no_answer_about_a_gpu(full):
    """It is raised, and does not pin the slow route for the rest of the process."""
    gemm.has_wide_gemm.cache_clear()
    with mock.patch.object(torch, "addmm", side_effect=full), pytest.raises(type(full)):
        gemm.has_wide_gemm("meta", BF16)
    with mock.patch.object(torch, "addmm"):
        assert gemm.has_wide_gemm("meta", BF16)
    gemm.has_wide_gemm.cache_clear()


def test_a_budget_too_small_for_one_row():
    forward, _ = call("linear_constrained_loss", max_workspace_bytes=1000)
    with pytest.raises(
        ValueError, match=r"max_workspace_bytes: 1000 bytes hold no row.*take (\d+)"
    ):
        forward()
    least = None
    for budget in range(15_000, 60_000, 1000):
        try:
            least = estimate("linear_constrained_loss", max_workspace_bytes=budget)
            break
        except ValueError as error:
            needed = int(str(error).partition("which take ")[2].partition(";")[0])
    assert least is not None and least.chunk_tokens == 1
    enough = call("linear_constrained_loss", max_workspace_bytes=needed)[0]
    assert torch.isfinite(enough())


PER_TOKEN = [
    dict(op="linear_token_logp"),
    dict(op="linear_token_kl", ref_hidden_size=16),
    dict(op="linear_constrained_loss", reduction="none"),
    dict(op="linear_constrained_loss", reduction="none", ref_hidden_size=8, kl_coef=0.1),
    dict(op="linear_token_logp", rank=4, requires_grad=LORA),
]


@pytest.mark.parametrize("place", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("case", PER_TOKEN, ids=str)
@pytest.mark.slow
def test_a_budget_that_a_forward_takes_is_enough_for_its_backward(case, dtype, place):
    """Gradients of 16-bit rows need more than values: what the error asks for is enough for both,
    one byte less is refused at once, and by the estimate."""
    case = dict(case, dtype=dtype, trained=200)
    with as_on_a_gpu() if place == "gpu" else contextlib.nullcontext():
        with pytest.raises(ValueError, match="which take") as refused:
            call(max_workspace_bytes=1000, **case)[0]()
        needed = int(str(refused.value).partition("which take ")[2].partition(";")[0])
        with pytest.raises(ValueError, match=f"which take {needed};"):
            call(max_workspace_bytes=needed - 1, **case)[0]()
        forward, leaves = call(max_workspace_bytes=needed, **case)
        torch.autograd.grad(forward().sum(), leaves)
        assert estimate(max_workspace_bytes=needed, **case).chunks == 200
        with pytest.raises(ValueError, match=f"which take {needed};"):
            estimate(max_workspace_bytes=needed - 1, **case)


@pytest.mark.parametrize(
    "kw, heads", [(dict(), 1), (dict(reduction="none"), 2), (dict(kl_coef=0.1), 1)], ids=str
)
def test_the_gradients_of_a_tied_head_are_added_in_place(kw, heads):
    """Autograd adds into the first gradient where nobody else holds its memory; a view of it kept
    by an op would cost one more tensor of the size of the head. The scalar loss made its gradient
    in the forward, so that its backward allocates the embedding's only."""
    weight = torch.randn(V, H, requires_grad=True)
    tokens, target = torch.randint(0, V, (2, 8))
    given = {"ref_hidden": torch.randn(8, H), "ref_weight": weight.detach()}
    if not kw.get("kl_coef"):
        given = {"ref_logp": torch.zeros(8)}
    hidden = torch.nn.functional.embedding(tokens, weight)
    loss = dak.linear_constrained_loss(hidden, weight, target, beta=0.5, **given, **kw).sum()
    assert measure(loss.backward)[1].peak < (heads + 0.1) * HEAD
