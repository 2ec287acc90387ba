"""The linear ops as citizens of torch: opcheck, compile, checkpointing, autocast; and bad input."""

import dataclasses

import pytest
import torch
from linear_cases import CASES, make, reductions, run_ours
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import deepalign_kernels as dak
from deepalign_kernels.ops.linear import torch_ops

pytestmark = [  # torch's own machinery allocates with empty()
    pytest.mark.clean_memory,
    pytest.mark.usefixtures("one_thread"),
]
EVERY = [(name, r) for name in CASES for r in reductions(name)]
IDS = ["-".join(e) for e in EVERY]


def recorded(call):
    """The arguments that `call` gives to the ops."""
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "deepalign":
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    with Spy():
        call()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("only", [("hidden",), ("hidden", "weight", "lora_b")], ids=str)
@pytest.mark.parametrize(
    "name,reduction",
    [
        ("linear_token_logp", "none"),
        ("linear_constrained_loss/kl", "mean"),
        ("linear_token_kl/js", "sum"),
    ],
)
def test_opcheck(name, reduction, only, dtype):
    """Schema, fakes, autograd registration, AOT dispatch, of every op in every mode."""
    p = make(N=5, H=6, V=9, dtype=dtype)
    calls = recorded(lambda: run_ours(name, p.leaves(None, only), reduction))
    ours = [(op, args) for op, args in calls if "linear" in op.name()]
    assert ours
    for op, args in ours:
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        if op == torch_ops._saved:
            args[-1] = True  # as traced: else its shape depends on data
            # else the rows of dropped tokens are never written, and opcheck compares them
            args[torch_ops._K + torch_ops.Options._fields.index("compact")] = False
        if "bwd" not in op.name() and "row_scale" not in op.name():
            for i, field in enumerate(torch_ops.Inputs._fields):
                if field in only:
                    args[1 + i].requires_grad_()
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if not ("fused" in op.name() and dtype == torch.float16):
            # There it compares the gradients saved after a backward that scaled them in place.
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(op, tuple(args), test_utils=tests)


COMPILED = [(n, r, torch.float32) for n, r in EVERY if not n.endswith("ref_logp")]
COMPILED += [("linear_constrained_loss/kl", "mean", torch.float16)]


@pytest.mark.slow
@pytest.mark.parametrize("name,reduction,dtype", COMPILED, ids=str)
def test_compiles_to_one_graph_for_every_length(name, reduction, dtype):
    """F27, F32: fullgraph with a dynamic N; a new token count does not recompile."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    p = make(N=8, H=6, V=9, dtype=dtype)
    kw = {"reduction": reduction} if CASES[name].scalar else {}

    def loss(hidden, weight, ref_hidden, target, beta):
        q = type(p)(
            hidden, weight, p.bias, p.lora_a, p.lora_b, ref_hidden, p.ref_weight, p.ref_bias,
            target, beta, None, p.options,
        )  # fmt: skip
        return CASES[name].ours(q, **kw).square().sum()

    compiled, once = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter), 0
    for n in (8, 12, 17):
        q = make(N=n, H=6, V=9, dtype=dtype)
        results = []
        for fn in (loss, compiled):
            leaves = [x.detach().requires_grad_() for x in (q.hidden, p.weight)]
            value = fn(*leaves, q.ref_hidden, q.target, q.beta)
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        once = once or counter.frame_count
    assert counter.frame_count == once


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_activation_checkpointing(reduction, reentrant):
    p = make(full=False)

    def loss(x):
        return dak.linear_constrained_loss(
            x * 1.5, p.weight, p.target, beta=0.5, ref_logp=torch.zeros(24), reduction=reduction
        ).sum()

    leaf = p.hidden.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    checkpoint(loss, leaf, use_reentrant=reentrant).backward()
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("only", [("hidden",), ("hidden", "weight")], ids=str)
@pytest.mark.parametrize("name,reduction", EVERY, ids=IDS)
def test_second_derivative_is_refused(name, reduction, only):
    """Also with a frozen head and in a scalar loss, where autograd alone would see constants."""
    p = make(N=6, H=6, V=9).leaves(None, only)
    kw = {"reduction": reduction} if CASES[name].scalar else {}
    rows = p.hidden.square()
    value = CASES[name].ours(dataclasses.replace(p, hidden=rows), **kw).sum()
    (grad,) = torch.autograd.grad(value, p.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum(), p.hidden)


def test_a_scalar_loss_backpropagates_once():
    p = make(full=False).leaves()
    args = dict(beta=0.5, ref_logp=torch.zeros(24))
    loss = dak.linear_constrained_loss(p.hidden, p.weight, p.target, **args)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="reduction='none'"):
        loss.backward()
    rows = dak.linear_constrained_loss(p.hidden, p.weight, p.target, reduction="none", **args)
    a, b = (torch.autograd.grad(rows.sum(), p.hidden, retain_graph=True)[0] for _ in "ab")
    assert torch.equal(a, b)


def test_upstream_factor_and_accumulation():
    """Two halves with a common normalizer are the whole batch; a factor goes through."""
    p = make(full=False)
    count = (p.target != -100).sum()
    args = dict(beta=0.5, normalizer=count)
    whole = p.leaves(None, ("hidden", "weight"))
    for rows in (slice(0, 10), slice(10, 24)):
        part = dak.linear_constrained_loss(
            whole.hidden[rows], whole.weight, p.target[rows], ref_logp=torch.zeros(24)[rows], **args
        )
        (part * 3).backward()
    once = p.leaves(None, ("hidden", "weight"))
    loss = dak.linear_constrained_loss(
        once.hidden, once.weight, p.target, beta=0.5, ref_logp=torch.zeros(24)
    )
    (loss * 3).backward()
    torch.testing.assert_close(whole.hidden.grad, once.hidden.grad)
    torch.testing.assert_close(whole.weight.grad, once.weight.grad)


def test_fp16_gradients_survive_a_small_scale():
    """mean over many tokens and a loss scale of 2^16: the product is applied before the
    rounding."""
    p = make(dtype=torch.float16, full=False)
    normalizer = 1e6
    q = p.leaves(None, ("hidden", "weight"))
    loss = dak.linear_constrained_loss(
        q.hidden, q.weight, q.target, beta=0.5, ref_logp=torch.zeros(24), normalizer=normalizer
    )
    (loss * 65536).backward()
    g = p.leaves(torch.float64, ("hidden", "weight"))
    gold = dak.linear_constrained_loss(
        g.hidden,
        g.weight,
        g.target,
        beta=0.5,
        ref_logp=torch.zeros(24).double(),
        normalizer=normalizer,
    )
    (gold * 65536).backward()
    for a, b in ((q.hidden.grad, g.hidden.grad), (q.weight.grad, g.weight.grad)):
        assert (a.double() - b).norm() < 2e-3 * b.norm()


@pytest.mark.parametrize("name,reduction", EVERY, ids=IDS)
def test_autocast_casts_the_head_as_linear_does(name, reduction):
    """F21: fp32 weights under bf16 autocast: bf16 operands, and gradients in fp32, summed in
    fp32."""
    p = make()
    if name.endswith("ref_logp"):
        pytest.skip("its reference is computed in the test")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run_ours(name, p.leaves(), reduction)
    low = run_ours(name, make(dtype=torch.bfloat16).leaves(), reduction)
    for key in mixed:
        assert mixed[key].dtype == torch.float32
        top = low[key].float().abs().max()
        assert (mixed[key] - low[key].float()).abs().max() <= 0.02 * top + 1e-6, key


def test_grad_weight_dtype():
    """One rounding per chunk against one per chunk and sum: 128 chunks of 4 rows."""
    p = make(N=768, H=8, V=30, dtype=torch.bfloat16, full=False)
    kw = dict(max_workspace_bytes=2_000)
    wide = run_ours("linear_token_logp", p.leaves(), "none", **kw)["weight"]
    narrow = run_ours(
        "linear_token_logp", p.leaves(), "none", grad_weight_dtype=torch.bfloat16, **kw
    )["weight"]
    gold = run_ours("linear_token_logp", p.leaves(torch.float64), "none")["weight"]
    error = [(x.double() - gold).norm() for x in (wide, narrow)]
    assert error[0] < error[1] < 0.05 * gold.norm()


H, V = 4, 8
x = torch.randn
GOOD = dict(hidden=x(3, H), weight=x(V, H), target=torch.tensor([1, -100, 3]))
REF = dict(ref_hidden=x(3, 2), ref_weight=x(V, 2))


class Sharded(torch.Tensor):
    """Looks like a DTensor."""

    def full_tensor(self):
        raise AssertionError("not asked for")


BAD = [
    (
        dict(weight=x(V, H + 1)),
        r"weight: expected 4 columns, the last dimension of hidden.*\(8, 5\)",
    ),
    (dict(weight=x(H, V)), r"weight: .*its transpose would fit"),
    (dict(weight=x(0)), "weight: .*ZeRO-3 and FSDP.*inside the head's forward"),
    (dict(weight=x(V * H)), "weight: .*ZeRO-3 and FSDP"),
    (dict(weight=x(V, H).as_subclass(Sharded)), r"weight: is a DTensor.*\.full_tensor\(\)"),
    (dict(weight=None), "weight: expected a tensor, got None"),
    (
        dict(weight=x(V, H).bfloat16()),
        r"hidden: expected the dtype of weight.*\.to\(torch.bfloat16\)",
    ),
    (dict(weight=torch.ones(V, H, dtype=torch.long)), "weight: expected bf16"),
    (dict(weight=torch.empty(V, H, device="meta")), "weight: expected the device of hidden"),
    (dict(hidden=torch.tensor(1.0)), r"hidden: expected hidden states \[\.\.\., H\]"),
    (dict(target=torch.tensor([1, 2])), r"target: expected shape \(3,\)"),
    (dict(target=torch.ones(3)), "target: expected int32 or int64"),
    (dict(bias=x(V + 1)), r"bias: expected shape \[8\]"),
    (dict(lora_a=x(2, H)), "lora_a, lora_b: expected both or neither"),
    (dict(lora_a=x(2, H + 1), lora_b=x(V, 2)), "lora_a: expected 4 columns"),
    (dict(lora_a=x(2, H), lora_b=x(V, 3)), "lora_b: expected 2 columns, the rank of lora_a"),
    (dict(lora_a=x(2, H), lora_b=x(V + 1, 2)), "lora_b: expected 8 rows"),
    (dict(temperature=0.0), "temperature: expected a finite number > 0"),
    (dict(logit_scale=-1.0), "logit_scale: expected a finite number > 0"),
    (dict(softcap=0.0), "softcap: expected a finite number > 0"),
    (dict(max_workspace_bytes=0), "max_workspace_bytes: expected None or an int above 0"),
    (dict(max_workspace_bytes=10), "max_workspace_bytes: 10 bytes hold no row"),
    (dict(logit_scale=1e30, temperature=1e-30), "temperature / logit_scale: .*that fp32 holds"),
    (dict(compact="no"), "compact: expected True or False, got 'no'"),
    (dict(ignore_index=None), "ignore_index: expected an int"),
    (dict(grad_weight_dtype=torch.float16), "grad_weight_dtype: expected torch.float32 or"),
    (dict(logits_dtype=torch.bfloat16), "logits_dtype: expected None, torch.float32"),
]


@pytest.mark.parametrize("changes,message", BAD, ids=[m for _, m in BAD])
def test_bad_input(changes, message):
    args = {**GOOD, **changes}
    with pytest.raises(ValueError, match=message):
        dak.linear_token_logp(args.pop("hidden"), args.pop("weight"), args.pop("target"), **args)


BAD_REF = [
    (dict(), "ref_logp, ref_hidden: expected exactly one of the two, got neither"),
    (dict(**REF, ref_logp=torch.zeros(3)), "expected exactly one of the two, got both"),
    (dict(ref_logp=torch.zeros(3), kl_coef=0.1), "kl_coef: .*pass ref_hidden and ref_weight"),
    (dict(ref_logp=torch.zeros(2)), r"ref_logp: .*shape \(3,\)"),
    (dict(ref_hidden=x(3, 2)), "ref_hidden, ref_weight: expected both or neither"),
    (dict(ref_hidden=x(3, 3), ref_weight=x(V, 2)), "ref_weight: expected 3 columns"),
    (dict(ref_hidden=x(4, 2), ref_weight=x(V, 2)), "ref_hidden: expected the tokens of hidden"),
    (
        dict(ref_hidden=x(3, 2), ref_weight=x(V + 1, 2)),
        "ref_weight: expected the vocabulary.*padding",
    ),
    (
        dict(ref_hidden=x(3, 2), ref_weight=x(V, 2, requires_grad=True)),
        "ref_weight: the reference gets no",
    ),
    (
        dict(ref_hidden=x(3, 2), ref_weight=x(V, 2).bfloat16()),
        "ref_hidden: expected the dtype of ref_weight",
    ),
    (dict(ref_logp=torch.zeros(3), ref_bias=x(V)), "ref_bias: belongs to ref_hidden"),
    (dict(**REF, kl_coef=-1.0), "kl_coef: expected a finite number >= 0"),
    (dict(**REF, kl_direction="forward"), "kl_direction: expected one of 'policy_ref'"),
    (dict(**REF, min_weight=0.1), "min_weight: a floor belongs to objective='surrogate'"),
    (dict(**REF, reduction="avg"), "reduction: expected one of"),
]


@pytest.mark.parametrize("changes,message", BAD_REF, ids=[m for _, m in BAD_REF])
def test_bad_reference(changes, message):
    with pytest.raises(ValueError, match=message):
        dak.linear_constrained_loss(*GOOD.values(), beta=0.5, **changes)


ESTIMATE = dict(op="linear_token_logp", tokens=9, hidden_size=4, vocab_size=8)
BAD_ESTIMATE = [
    (dict(op="token_logp"), "op: expected one of 'linear_token_logp'"),
    (dict(tokens=-5), "tokens: expected an int >= 0, got -5"),
    (dict(trained_tokens=10), "trained_tokens: expected an int >= 0 and <= 9, got 10"),
    (dict(hidden_size=0), "hidden_size: expected an int >= 1, got 0"),
    (dict(vocab_size=0), "vocab_size: expected an int >= 1, got 0"),
    (dict(lora_rank=-1), "lora_rank: expected an int >= 0"),
    (dict(dtype="bf16"), "dtype: expected torch's bf16, fp16, fp32 or fp64, got 'bf16'"),
    (dict(autocast_dtype=torch.int8), "autocast_dtype: expected torch's"),
    (dict(grad_weight_dtype=torch.float16), "grad_weight_dtype: expected torch.float32 or"),
    (dict(device="tpu"), "device: expected 'cpu' or 'cuda', got 'tpu'"),
    (dict(compact="no"), "compact: expected True or False"),
    (dict(max_workspace_bytes=0), "max_workspace_bytes: expected None or an int above 0"),
    (dict(reduction="mean"), "reduction: expected one of 'none', got 'mean'"),
    (dict(ref_hidden_size=4), "ref_hidden_size, shared_head: linear_token_logp has no reference"),
    (dict(shared_head=True), "ref_hidden_size, shared_head: linear_token_logp has no reference"),
    (dict(op="linear_token_kl"), "ref_hidden_size, shared_head: linear_token_kl needs one"),
    (dict(op="linear_constrained_loss", kl_coef=1.0), "kl_coef: a divergence needs"),
    (
        dict(op="linear_token_kl", ref_hidden_size=5, shared_head=True),
        "ref_hidden_size: expected hidden_size, 4, with shared_head, got 5",
    ),
]


@pytest.mark.parametrize("changes,message", BAD_ESTIMATE, ids=[m for _, m in BAD_ESTIMATE])
def test_estimate_refuses_what_no_call_could_have(changes, message):
    with pytest.raises(ValueError, match=message):
        dak.estimate_memory(**{**ESTIMATE, **changes})
