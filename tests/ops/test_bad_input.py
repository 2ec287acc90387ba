"""Bad input: a ValueError that names the argument, what came and what was expected; nothing else
happens."""

import numpy as np
import pytest
import torch

import deepalign_kernels as dak

T, V = 4, 8


def good(**changes):
    args = dict(
        policy=torch.randn(T, V),
        ref=torch.randn(T, V),
        target=torch.tensor([1, 2, 3, -100]),
        beta=torch.ones(T),
    )
    return {**args, **changes}


def logp(a, **kw):
    return dak.token_logp(a["policy"], a["target"], **kw)


def kl(a, **kw):
    return dak.token_kl(a["policy"], a["ref"], **kw)


def constrained(a, **kw):
    return dak.constrained_loss(
        a["policy"], a["target"], **{"beta": a["beta"], "ref_logits": a["ref"], **kw}
    )


def stats(a, **kw):
    return dak.token_stats(a["policy"], a["ref"], a["target"], **kw)


x = torch.randn
BAD = [
    # wrong shape
    (logp, good(policy=torch.tensor(1.0)), {}, r"logits: expected a tensor \[\.\.\., V\]"),
    (logp, good(policy=x(T, 0)), {}, "at least one vocabulary column"),
    (
        logp,
        good(target=torch.tensor([1, 2, 3])),
        {},
        r"target: expected shape \(4,\).*got torch.int64 \(3,\)",
    ),
    (logp, good(target=None), {}, "target: expected shape"),
    (logp, good(policy=[1.0, 2.0]), {}, "logits: expected a tensor"),
    (kl, good(ref=x(T, V + 1)), {}, r"ref_logits: expected the shape of policy_logits, \(4, 8\)"),
    (kl, good(ref=x(T + 1, V)), {}, "ref_logits: expected the shape"),
    (
        kl,
        good(),
        {"valid": torch.ones(T + 1, dtype=torch.bool)},
        r"valid: expected a bool tensor of shape \(4,\)",
    ),
    (constrained, good(beta=torch.ones(T + 1)), {}, r"beta: expected a number or shape \(4,\)"),
    (constrained, good(beta=torch.tensor(0.5)), {}, r"beta: expected a number or shape \(4,\)"),
    (
        constrained,
        good(),
        {"ref_logits": None, "ref_logp": torch.zeros(T + 1)},
        r"ref_logp: .*shape \(4,\)",
    ),
    (
        constrained,
        good(),
        {"ref_logits": None, "ref_logp": 0.5},
        "ref_logp: expected a float tensor",
    ),
    (
        constrained,
        good(),
        {"normalizer": torch.ones(1)},
        "normalizer: expected a number or a 0-d tensor",
    ),
    (constrained, good(), {"normalizer": torch.tensor(1j)}, "normalizer: expected a real number"),
    (stats, good(ref=x(T, V + 1)), {}, "ref_logits: expected the shape"),
    # wrong dtype
    (
        logp,
        good(policy=torch.ones(T, V, dtype=torch.long)),
        {},
        "logits: expected bf16, fp16, fp32 or fp64",
    ),
    (logp, good(target=torch.ones(T)), {}, "target: expected int32 or int64, got torch.float32"),
    (
        kl,
        good(ref=x(T, V).bfloat16()),
        {},
        r"ref_logits: expected the dtype of policy_logits.*\.to\(torch.float32\)",
    ),
    (kl, good(), {"valid": torch.ones(T)}, "valid: expected a bool tensor"),
    (
        constrained,
        good(beta=torch.ones(T, dtype=torch.long)),
        {},
        "beta: expected a floating-point tensor",
    ),
    (stats, good(ref=x(T, V).half()), {}, "ref_logits: expected the dtype"),
    # wrong device
    (
        kl,
        good(ref=torch.empty(T, V, device="meta")),
        {},
        "ref_logits: expected the device of policy_logits, cpu, got meta",
    ),
    (
        logp,
        good(target=torch.empty(T, dtype=torch.long, device="meta")),
        {},
        "target: expected the device of the logits",
    ),
    (constrained, good(beta=torch.empty(T, device="meta")), {}, "beta: expected the device"),
    # last stride
    (
        logp,
        good(policy=x(V, T).T),
        {},
        r"logits: expected last stride 1, got strides \(1, 4\).*contiguous",
    ),
    (kl, good(ref=x(V, T).T), {}, "ref_logits: expected last stride 1"),
    # the reference
    (
        constrained,
        good(),
        {"ref_logits": None},
        "ref_logits, ref_logp: expected exactly one of the two, got neither",
    ),
    (
        constrained,
        good(),
        {"ref_logp": torch.zeros(T)},
        "expected exactly one of the two, got both",
    ),
    (
        constrained,
        good(ref=x(T, V).requires_grad_()),
        {},
        r"ref_logits: the reference gets no gradient.*\.detach\(\)",
    ),
    (
        constrained,
        good(),
        {"ref_logits": None, "ref_logp": torch.zeros(T, requires_grad=True)},
        "ref_logp: the reference",
    ),
    (kl, good(ref=x(T, V).requires_grad_()), {}, "ref_logits: the reference gets no gradient"),
    # numbers
    (constrained, good(beta=-0.1), {}, r"beta: expected a finite number >= 0, got -0.1"),
    (constrained, good(beta=float("nan")), {}, "beta: expected a finite number"),
    (constrained, good(beta=float("inf")), {}, "beta: expected a finite number"),
    (constrained, good(beta="0.5"), {}, "beta: expected a finite number"),
    (constrained, good(beta=1e39), {}, "beta: .*of a size that fp32 holds, 1.2e-38 to 3.4e.38"),
    (kl, good(), {"temperature": 1e-39}, "temperature: .*of a size that fp32 holds"),
    (kl, good(), {"softcap": 1e308}, "softcap: .*of a size that fp32 holds"),
    (constrained, good(), {"normalizer": 0}, "normalizer: expected a finite number > 0"),
    (logp, good(), {"ignore_index": None}, "ignore_index: expected an int that int64 holds"),
    (logp, good(), {"ignore_index": 1.5}, "ignore_index: expected an int that int64 holds"),
    (stats, good(), {"ignore_index": "x"}, "ignore_index: expected an int that int64 holds"),
    (constrained, good(), {"ignore_index": 2**70}, "ignore_index: expected an int that int64"),
    (
        constrained,
        good(),
        {"normalizer": 3, "reduction": "sum"},
        "normalizer: belongs to reduction='mean'",
    ),
    (
        constrained,
        good(),
        {"min_weight": 0.1},
        "min_weight: a floor belongs to objective='surrogate'",
    ),
    (
        constrained,
        good(),
        {"min_weight": -1, "objective": "surrogate"},
        "min_weight: expected a finite number >= 0",
    ),
    (kl, good(), {"temperature": 0}, "temperature: expected a finite number > 0, got 0"),
    (kl, good(), {"softcap": -1}, "softcap: expected a finite number > 0"),
    (
        kl,
        good(),
        {"direction": "js", "js_beta": 1.0},
        "js_beta: expected a finite number > 0 and < 1",
    ),
    (
        kl,
        good(),
        {"direction": "js", "js_beta": 0},
        "js_beta: expected a finite number > 0 and < 1",
    ),
    (stats, good(), {"js_beta": 2}, "js_beta"),
    # names
    (
        kl,
        good(),
        {"direction": "forward"},
        "direction: expected one of 'policy_ref', 'ref_policy', 'js', got 'forward'",
    ),
    (constrained, good(), {"reduction": "avg"}, "reduction: expected one of 'none', 'sum', 'mean'"),
    (constrained, good(), {"objective": "dpo"}, "objective: expected one of 'exact', 'surrogate'"),
]


@pytest.mark.parametrize(
    "call,args,kw,match", BAD, ids=[f"{i}-{b[3][:30]}" for i, b in enumerate(BAD)]
)
def test_bad_input_says_what_is_wrong(call, args, kw, match):
    call(good())  # the call itself is right
    with pytest.raises(ValueError, match=match):
        call(args, **kw)


def test_checked_mode_names_the_position():
    policy, ref = x(2, 3, V), x(2, 3, V)
    target = torch.tensor([[0, 1, 2], [3, 99, -7]])
    with dak.checked():
        with pytest.raises(
            ValueError,
            match=r"target: expected 0\.\.7 or ignore_index -100, got 99 at position \[1, 1\]",
        ):
            dak.token_logp(policy, target)
        with pytest.raises(
            ValueError, match=r"beta: expected values >= 0, got -1.0 at position \[0, 2\]"
        ):
            beta = torch.ones(2, 3)
            beta[0, 2] = -1
            dak.constrained_loss(
                policy, torch.zeros(2, 3, dtype=torch.long), beta=beta, ref_logits=ref
            )
        with pytest.raises(ValueError, match="normalizer: expected a finite number >= 0, got -1.0"):
            constrained(good(), normalizer=torch.tensor(-1.0))
        dak.token_logp(policy, target.clamp(0, V - 1))
    assert dak.token_logp(policy, target)[1, 1].isnan()  # and outside of it: poison, no error


def test_frozen_reference_inside_no_grad_is_accepted():
    leaf = x(T, V).requires_grad_()
    with torch.no_grad():
        assert torch.isfinite(dak.token_kl(x(T, V), leaf)).all()


def test_numbers_of_numpy_are_numbers():
    a, half = good(), np.float32(0.5)
    assert torch.equal(
        kl(a, temperature=half, softcap=np.int64(3)), kl(a, temperature=0.5, softcap=3)
    )
    args = dict(beta=half, normalizer=half, ignore_index=np.int64(-100))
    assert torch.equal(constrained(a, **args), constrained(a, beta=0.5, normalizer=0.5))


def test_rows_up_to_vocabulary_edges():
    a = good(target=torch.tensor([0, V - 1, V - 1, 0]))
    assert torch.isfinite(logp(a)).all()
