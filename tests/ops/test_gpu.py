"""Triton and CUDA C++ kernels on a GPU: compiled once, no waiting, CUDA graphs, streams, a second
device. Their numbers: test_conformance.py, which runs every backend that a device has."""

import itertools

import pytest
import torch
from gpu_ops import DIRECTIONS, OPS, kernels

import deepalign_kernels as dak
from deepalign_kernels import backends, use_backend

pytestmark = [pytest.mark.gpu, pytest.mark.clean_memory]

V = 4096
EVERY = list(itertools.product(("triton", "native"), OPS))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the latter in a rehearsal


@pytest.fixture(autouse=True, params=EVERY, ids="-".join)
def backend(request, record_property):
    name, op = request.param
    record_property("backend", name)
    record_property("device", DEVICE)
    record_property("ops", OPS[op][1])
    for needed in OPS[op][1]:
        if why := backends.unavailable(name, needed, DEVICE):
            pytest.skip(f"{name} {needed}: {why}")
    with use_backend(name):
        yield name


@pytest.fixture
def run(request):
    """(x, y, target, beta, temperature) -> (value, gradient by x) of the op under test."""
    fn = OPS[request.node.callspec.params["backend"][1]][0]

    def value_and_grad(x, y, target, beta=0.5, temperature=1.0):
        made = fn(x, y, target, beta, temperature=temperature)
        if isinstance(made, tuple):
            return made
        return made.detach(), torch.autograd.grad(made, x)[0]

    return value_and_grad


def batch(T, dtype=torch.bfloat16, vocab=V):
    g = torch.Generator().manual_seed(T)
    x, y = (3 * torch.randn(2, T, vocab, generator=g) for _ in range(2))
    target = torch.randint(0, vocab, (2, T), generator=g)
    target[:, 0] = -100
    x, y, target = x.to(DEVICE, dtype), y.to(DEVICE, dtype), target.to(DEVICE)
    return x.requires_grad_(), y, target


def compiled_kernels():
    """How many variants of all kernels Triton has compiled in this process."""
    from deepalign_kernels.triton_kernels import _pretend

    return sum(map(_pretend.compiled, kernels()))


def only(*pairs):
    return pytest.mark.parametrize("backend", pairs, indirect=True, ids="-".join)


@only(*(pair for pair in EVERY if pair[0] == "triton"))
def test_another_token_count_or_scalar_compiles_nothing(run):
    run(*batch(8), 0.5, 0.7)
    before = compiled_kernels()
    assert before > 0
    for T, beta, temperature in ((1, 0.1, 0.9), (2, 2.0, 0.5), (16, 0.3, 3.0), (33, 0.5, 0.7)):
        run(*batch(T), beta, temperature)
    assert compiled_kernels() == before


def test_nothing_waits_for_the_device(run):
    inputs = batch(8)
    run(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_replays_what_eager_computes(run):
    x, y, target = batch(8)
    other = batch(9)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(x, y, target)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = run(x, y, target)
    with torch.no_grad():
        x.copy_(other[0][:, :8])
        y.copy_(other[1][:, :8])
        target.copy_(other[2][:, :8])
    graph.replay()
    expected = run(x, y, target)
    torch.testing.assert_close((loss, grad), expected, rtol=0, atol=0)


def test_a_stream_of_ones_own(run):
    inputs = batch(8)
    expected = run(*inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result = run(*inputs)
    side.synchronize()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.rehearsed
def test_results_repeat_bit_by_bit(run):
    x, y, target = batch(8, vocab=V + 1)
    first = run(x, y, target)
    for _ in range(5):
        torch.testing.assert_close(run(x, y, target), first, rtol=0, atol=0)


@only(("triton", "token_kl"), ("native", "token_kl"))
def test_rows_do_not_touch_each_other():
    x, y, _ = batch(8, vocab=V + 1)
    whole = dak.token_kl(x, y)
    alone = dak.token_kl(x[:, 3:4], y[:, 3:4])
    torch.testing.assert_close(alone, whole[:, 3:4], rtol=0, atol=0)


@only(("triton", "token_logp"), ("native", "token_logp"))
def test_offsets_pass_31_bits():
    rows, vocab = 17_000, 131_072
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * rows * vocab * 2:
        pytest.skip("needs 14 GB of GPU memory")
    x = torch.zeros(1, rows, vocab, dtype=torch.bfloat16, device="cuda")
    x[0, -1, 7] = 20.0
    x.requires_grad_()
    target = torch.full((1, rows), -100, device="cuda")
    target[0, -1] = 7
    logp = dak.token_logp(x, target)
    expected = x.detach()[0, -1].float().log_softmax(-1)[7]
    torch.testing.assert_close(logp[0, -1], expected, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(logp.sum(), x)
    assert grad[0, -1, 7] > 0 and not grad[0, :-1].any()


@only(("triton", "token_kl"), ("native", "token_kl"))
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_device_that_is_not_current(direction):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    x, y, _ = batch(4)
    kl = dak.token_kl(x, y, direction=direction)
    with torch.cuda.device(0):
        there = dak.token_kl(x.to("cuda:1"), y.to("cuda:1"), direction=direction)
    torch.testing.assert_close(there.cpu(), kl.cpu(), rtol=0, atol=0)


@pytest.mark.rehearsed
@pytest.mark.parametrize("vocab", [4096, 32768, 50257, 128256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_gpu_backends_agree(vocab, dtype, run, request):
    """Rows in one block, in clusters of every size, and starting off a 16-byte boundary."""
    inputs = batch(6, dtype, vocab=vocab)
    loss, grad = run(*inputs)
    with use_backend("eager"):
        expected, gold = run(*inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    near = 1e-5 if dtype == torch.float32 else 1.6e-2
    atol = 1e-5
    if "linear" in request.node.callspec.params["backend"][1]:
        # Sums over 16-bit gradients of the scores, of which some round to the other side.
        atol = max(atol, 0.25 * near * gold.abs().max().item())
    torch.testing.assert_close(grad, gold, rtol=near, atol=atol)
