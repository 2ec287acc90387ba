"""The ops as citizens of torch: opcheck, gradcheck, compile, checkpointing, autocast, second
derivatives."""

from unittest import mock

import linear_cases as lc
import pytest
import torch
from cases import CASES, make, values_and_grad
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import deepalign_kernels as dak
from deepalign_kernels import backends
from deepalign_kernels.ops._register import _LIB
from deepalign_kernels.ops.linear import sharded, torch_ops
from deepalign_kernels.ops.shard.group import Shard

pytestmark = pytest.mark.clean_memory  # torch's own machinery allocates with empty()


def op_inputs(device, dtype):
    """Sample inputs of every registered op, as the public functions call them."""
    r = make(4, 33).to(device, dtype)
    policy, ref = r.policy[None].requires_grad_(), r.ref[None]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    valid, logp, norm = (
        r.target != -100,
        torch.zeros(4, dtype=acc, device=device),
        torch.ones(4, 2, dtype=acc, device=device),
    )
    grad, scale, beta = (
        r.grad.to(acc),
        torch.full((), 0.25, dtype=acc, device=device),
        r.beta.to(acc),
    )
    options = (-100, False, 0.0, 1.0, 0.0)
    detached = policy.detach()
    column = torch.tensor([-1, -2, 0, 32], device=device)  # ignored, in another shard, two here
    return {
        "token_logp_fwd": (policy, r.target, -100, 0.7, 0.0),
        "token_logp_bwd": (grad, detached, r.target, norm, -100, 0.7, 30.0),
        "token_kl_fwd": (policy, ref, valid, 0, 0.5, 1.0, 0.0),
        "token_kl_bwd": (grad, detached, ref, None, norm, norm, logp, 2, 0.5, 1.0, 0.0),
        "token_js_parts": (detached, ref, valid, norm, norm, 0.3, 0.7, 30.0),
        "token_logp_shard": (policy, column, logp, logp, norm, 0.7, 0.0),
        "token_logp_shard_bwd": (grad, detached, column, norm, 0.7, 30.0),
        "token_kl_shard": (policy, ref, valid, logp, norm, norm, logp, 2, 0.5, 1.0, 0.0),
        "constrained_loss_fwd": (policy, r.target, beta, ref, None, *options),
        "constrained_loss_fused": (policy, r.target, beta, None, logp, scale, *options),
        "token_stats_fwd": (detached, ref, r.target, valid, -100, 0.5, 1.0, 0.0),
        "token_entropy_fwd": (policy, valid, 0.7, 0.0),
        "token_entropy_bwd": (grad, detached, None, norm, logp, 0.7, 30.0),
        "scale_grad": (detached.clone(), scale),
        "scaled_grad": (detached, scale),
    }


class Alone(Shard):
    """A shard among one: what this rank says is all there is."""

    def _gather(self, own):
        return own


class Spy(TorchDispatchMode):
    """Notes what the linear ops are called with, with gradients wanted where that occurs."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2]
        if func.namespace == "deepalign" and name.startswith("linear"):
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            if name not in self.seen or any(x.requires_grad for x in tensors):
                self.seen[name] = args
        return func(*args, **(kwargs or {}))


def linear_inputs(device, dtype):
    """The same of the linear ops, as the public functions and those over a process group call
    them."""
    p = lc.make(N=5, H=6, V=9, dtype=dtype, device=device)
    p.target.clamp_(min=0)
    with Spy() as spy, mock.patch.object(sharded, "all_reduce", lambda x, group: x):
        lc.run_ours("linear_token_kl/js", p.leaves(), "none")
        lc.run_ours("linear_token_logp", p.leaves(None, ("hidden",)), "none")
        lc.run_ours("linear_constrained_loss/kl", p.leaves(), "mean")
        _, x, o = torch_ops._call(spy.seen["linear_fused"])
        loss, *_ = sharded.constrained(x, o, Alone(None, 1, 9, 0), p.target)
        loss.sum().backward()
    return {name: tuple(_leaf(name, x) for x in args) for name, args in spy.seen.items()}


def _leaf(op, x):
    once = "bwd" in op or op == "linear_row_scale"  # these refuse a second derivative
    if not isinstance(x, torch.Tensor):
        return x
    return x.detach().requires_grad_(x.requires_grad and not once)


REGISTERED = sorted(name.partition("::")[2] for name in _LIB._op_defs)


@pytest.mark.interpreter_slow
@pytest.mark.parametrize("op", REGISTERED)
def test_opcheck(op, device, backend, interpreted):
    """F32: schema, fakes, autograd registration, AOT dispatch with static and dynamic shapes, of
    every op there is: a new one needs sample inputs above. 16-bit logits, whose results are fp32,
    say more than fp32 ones."""
    if op in backends.OPS and (why := backends.unavailable(backend, op, device.type)):
        pytest.skip(f"{backend} {op}: {why}")
    if interpreted and op not in backends.OPS:
        pytest.skip("made of the ops of STEMS, which are checked by themselves")
    linear = op.startswith("linear")
    wide = [torch.float64] * (backend == "eager")
    # Other dtypes and modes of the linear ops: tests/linear/test_linear_torch.py.
    for dtype in [torch.bfloat16, *wide] if op == "linear_shard" or not linear else [torch.float32]:
        samples = (linear_inputs if linear else op_inputs)(device, dtype)
        assert op in samples, f"{op}: a registered op without sample inputs is never checked"
        torch.library.opcheck(getattr(torch.ops.deepalign, op).default, samples[op])


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "softcap": 5.0}], ids=str)
def test_gradcheck(op, options):
    r = make(4, 6).to("cpu", torch.float64)
    if "surrogate" in op:
        pytest.skip("its weight is held fixed, so its gradient is not the derivative of its value")
    fn = lambda x: CASES[op].ours(type(r)(x, r.ref, r.target, r.beta, r.grad), **options)  # noqa: E731
    assert torch.autograd.gradcheck(fn, r.policy.requires_grad_(), eps=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("op", CASES)
def test_compiles_to_one_graph_for_every_length(op):
    """F27, F32: fullgraph with a dynamic T; a new token count does not recompile. The graph holds
    the ops, whatever backend they choose when they run."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def loss(policy, ref, target, beta):
        r = type(first)(policy, ref, target, beta, None)
        return CASES[op].ours(r).square().sum()

    compiled, compiled_once = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter), 0
    first = make(5, 65)
    for T in (5, 2, 7):
        r = make(T, 65)
        grads = []
        for fn in (loss, compiled):
            leaf = r.policy.detach().requires_grad_()
            value = fn(leaf, r.ref, r.target, r.beta)
            grads.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
        compiled_once = compiled_once or counter.frame_count
    assert counter.frame_count == compiled_once


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_scalar_loss_under_inductor(reduction, device):
    """The fused gradient is scaled in place by the upstream factor; functionalisation must keep
    that right."""
    torch._dynamo.reset()
    r = make(6, 65).to(device, torch.float32)

    def step(policy):
        return (
            3
            * dak.constrained_loss(
                policy * 2, r.target, beta=r.beta, ref_logits=r.ref, reduction=reduction
            ).sum()
        )

    results = []
    for fn in (step, torch.compile(step, fullgraph=True)):
        leaf = r.policy.detach().requires_grad_()
        value = fn(leaf)
        results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_activation_checkpointing(reduction, reentrant, device):
    r = make(6, 65).to(device, torch.float32)

    def loss(x):
        return dak.constrained_loss(
            x * 1.5, r.target, beta=r.beta, ref_logits=r.ref, reduction=reduction
        ).sum()

    leaf = r.policy.detach().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    checkpoint(loss, leaf, use_reentrant=reentrant).backward()
    assert torch.equal(leaf.grad, expected)


@pytest.mark.interpreter_slow
@pytest.mark.parametrize("op", CASES)
def test_autocast_leaves_the_ops_alone(op, device):
    """F21: fp32 logits stay fp32 inside a bf16 autocast region; bf16 ones that come out of a matmul
    are taken."""
    r = make(4, 65).to(device, torch.float32)
    expected = values_and_grad(CASES[op].ours, r)
    with torch.autocast(device.type, torch.bfloat16):
        got = values_and_grad(CASES[op].ours, r)
        hidden, head = (
            torch.randn(4, 16, device=device, requires_grad=True),
            torch.randn(65, 16, device=device),
        )
        logits = torch.nn.functional.linear(hidden, head)
        assert logits.dtype == torch.bfloat16
        CASES[op].ours(type(r)(logits, r.ref.bfloat16(), r.target, r.beta, r.grad)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("op", [*CASES, "mean"])
def test_second_derivative_is_refused(op, device):
    """F18: a clear error instead of a missing term, also for a gradient that the forward wrote and
    where the loss is linear in what follows, so that autograd alone would see constants."""
    r = make(4, 33).to(device, torch.float32)
    leaf = r.policy.detach().requires_grad_()
    rows = type(r)(leaf.square(), r.ref, r.target, r.beta, r.grad)
    if op == "mean":
        value = dak.constrained_loss(rows.policy, r.target, beta=r.beta, ref_logits=r.ref)
    else:
        value = CASES[op].ours(rows).sum()
    (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum(), leaf, retain_graph=True)
    (again,) = torch.autograd.grad(value, leaf)
    assert torch.equal(grad, again) and not again.requires_grad


@pytest.mark.parametrize("op", [*CASES, "linear_token_logp"])
def test_forward_mode_is_refused(op):
    """Not a tangent of 0; under a dual level plain tensors go on as before."""
    r = make(4, 33)
    head = torch.randn(9, 33)

    def run(x):
        if op == "linear_token_logp":
            return dak.linear_token_logp(x, head, r.target.clamp(max=8))
        return CASES[op].ours(type(r)(x, r.ref, r.target, r.beta, r.grad))

    with pytest.raises(NotImplementedError, match="(logits|hidden): carries a tangent"):
        torch.func.jvp(run, (r.policy,), (r.policy,))
    with torch.autograd.forward_ad.dual_level():
        run(r.policy)
        dual = torch.autograd.forward_ad.make_dual(r.policy, r.policy)
        with pytest.raises(NotImplementedError, match="(logits|hidden): carries a tangent"):
            run(dual)


@pytest.mark.parametrize("op", CASES)
def test_gradient_reaches_only_what_asks_for_it(op, device):
    """F19: nothing is computed for a policy that needs no gradient."""
    assert not CASES[op].ours(make(4, 33).to(device, torch.float32)).requires_grad
