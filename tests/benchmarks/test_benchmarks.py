"""The benchmark harness: what it times, what it refuses, what it counts. No test of speed."""

import dataclasses
import json
import math
import pathlib

import pytest
import torch
from bench_runs import SHAPE, _row, cell, run, small_rulers  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

import deepalign_kernels as dak
from benchmarks.__main__ import main
from benchmarks.cases.linear import LINEAR
from benchmarks.cases.logits import LOGITS, Shape, for_case, make_inputs, traffic, work_of
from benchmarks.harness import ceilings, compare, gate, machine, peers, report
from benchmarks.harness.cells import Caller
from benchmarks.harness.main import parser, plan_of
from benchmarks.harness.providers import Provider, available
from deepalign_kernels import backends

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = [pytest.mark.clean_memory, pytest.mark.usefixtures("one_thread")]


# --- the harness runs -----------------------------------------------------------------------------


def finite(row):
    assert row.failed is None, row
    assert row.H or row.ruler_rate > 0, row
    numbers = (row.ms, row.p10_ms, row.p90_ms, row.extra_bytes, row.error, row.ideal_bytes)
    assert all(x is not None and math.isfinite(x) for x in numbers), row
    assert 0 < row.p10_ms <= row.ms <= row.p90_ms and row.laps >= 3, row


def test_every_logits_op_gets_finite_numbers_from_each_provider():
    rows, _ = run(LOGITS.values(), dtypes=("fp32", "bf16"))
    for row in rows:
        finite(row)
    cells = {(r.op, r.phase, r.dtype) for r in rows}
    assert len(cells) == 2 * sum(len(c.phases) for c in LOGITS.values())
    ours = {"eager", *["native"] * (backends.native_library("cpu") is None)}
    assert {r.provider for r in rows} == {*ours, "plain"}


@pytest.mark.slow
def test_every_linear_op_gets_finite_numbers():
    rows, _ = run(LINEAR.values(), shape=Shape(10, 96, 16), wanted="eager,plain")
    assert {r.op for r in rows} == LINEAR.keys()
    for row in rows:
        finite(row)
        assert row.ideal_flops > 0


@pytest.mark.slow
def test_compile_is_timed_after_its_compilation():
    if any(p.name == "compile" for p in available(*cell("token_logp"), "compile")[1]):
        pytest.skip("no C++ compiler")
    rows, _ = run([LOGITS["token_logp"]], "compile", phases=("fwd",))
    finite(rows[0])
    assert rows[0].first_call_s > 10 * rows[0].ms * 1e-3


def test_left_out_rows_are_checked_and_shrink_the_ideal():
    whole, _ = run([LOGITS["token_kl/policy_ref"]])
    half, _ = run([LOGITS["token_kl/policy_ref"]], trained=0.5)
    for row in half:
        finite(row)
    assert half[0].ideal_bytes == pytest.approx(whole[0].ideal_bytes / 2, rel=0.05)


def test_command_line_quick(tmp_path, capsys):
    file = tmp_path / "quick.json"
    flags = ["--quick", "--shapes", "16x512", "--dtypes", "fp32", "--seconds", "0.002"]
    assert (
        main([*flags, "--ops", "token_kl/policy_ref", "--threads", "1", "--json", str(file)]) == 0
    )
    printed = capsys.readouterr().out
    assert "token_kl fwd >= 10x plain" in printed and "plain" in printed
    data = json.loads(file.read_text())
    assert {"cpu", "threads", "torch", "commit", "dirty", "load_average"} <= data["machine"].keys()
    assert data["ceilings"]["read"] > 0 and len(data["rows"]) >= 4
    assert main(["readme", str(file)]) == 0
    assert "| `token_kl/policy_ref` fwd+bwd |" in capsys.readouterr().out
    assert main(["compare", str(file), str(file)]) == 0
    assert main(["--ops", "no_such_op"]) == 2


def test_default_plan_covers_the_shapes_and_dtypes_of_the_targets():
    plan = plan_of(parser("run").parse_args(["--device", "cpu"]))
    assert [str(s) for s in plan.shapes] == ["2048x32000", "1024x128256"]
    assert plan.dtypes == ["fp32", "bf16"] and plan.phases == ("fwd", "fwd_bwd")
    assert not plan.once & {"token_logp", "token_kl/policy_ref", "constrained_loss/ref_logits"}


# --- the gate -------------------------------------------------------------------------------------


class _Bent(torch.autograd.Function):
    """Identity whose gradient is changed by `bend`."""

    @staticmethod
    def forward(ctx, x, bend):
        ctx.bend = bend
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.bend(grad.clone()), None


def _last_row_off(grad):
    grad[-1, 7] += 1e-3
    return grad


def _bent(bend):
    def ours(x):
        return LOGITS["token_kl/policy_ref"].ours({**x, "policy": _Bent.apply(x["policy"], bend)})

    return ours


def _value_off(x):
    return LOGITS["token_kl/policy_ref"].ours(x) * (1 + 1e-4)


def _swapped(x):
    return LOGITS["token_kl/ref_policy"].ours(x)


def _not_a_number(x):
    return LOGITS["token_kl/policy_ref"].ours(x) * float("nan")


def _raises(x):
    raise RuntimeError("planted")


@pytest.mark.parametrize(
    "planted,said",
    [
        (_value_off, "refused: value"),
        (_swapped, "refused: value"),
        (_not_a_number, "refused: value: not finite"),
        (_bent(lambda g: g * (1 + 1e-4)), "refused: gradient of policy"),
        (_bent(_last_row_off), "refused: gradient of policy"),
        (_raises, "RuntimeError: planted"),
    ],
    ids="value swapped nan gradient one_entry raises".split(),
)
def test_a_planted_wrong_kernel_gets_no_number(planted, said):
    wrong = dataclasses.replace(LOGITS["token_kl/policy_ref"], ours=planted)
    rows, _ = run([wrong], wanted="eager,plain", phases=("fwd_bwd",))
    ours, plain = rows
    assert ours.ms is None and ours.failed is not None and said in ours.failed
    finite(plain)


@pytest.mark.slow
def test_large_gradients_are_checked_in_slices_and_chunks(monkeypatch):
    """One wrong entry of the head's gradient, in its last slice; the truth is a sum over chunks."""
    monkeypatch.setattr(gate, "SLICE", 100)
    monkeypatch.setattr(gate, "CHUNK_ELEMENTS", {True: 3 * 96, False: 640})
    case = LINEAR["linear_constrained_loss"]

    def ours(x):
        return case.ours({**x, "weight": _Bent.apply(x["weight"], _last_row_off)})

    for wrong, said in ((case, None), (dataclasses.replace(case, ours=ours), "gradient of weight")):
        rows, _ = run([wrong], "eager", shape=Shape(10, 96, 16), phases=("fwd_bwd",))
        assert rows[0].failed is None if said is None else said in rows[0].failed


def test_a_wrong_shape_is_refused():
    case = LOGITS["token_logp"]
    short = dataclasses.replace(case, ours=lambda x: case.ours(x).sum())
    rows, _ = run([short], "eager", phases=("fwd",))
    assert rows[0].failed


def test_a_wrong_scalar_gradient_is_refused_though_its_entries_are_tiny():
    """A mean divides gradients by T: an absolute bound alone would let this through."""
    case = LOGITS["constrained_loss/ref_logp"]

    def ours(x):
        return case.ours({**x, "policy": _Bent.apply(x["policy"], lambda g: g * 1.001)})

    rows, _ = run([dataclasses.replace(case, ours=ours)], "eager", shape=Shape(512, 320))
    assert [bool(r.failed) for r in rows] == [False, True]  # fwd has no gradient
    assert "gradient of policy" in rows[1].failed


def test_a_wrong_peer_is_refused_and_the_exit_status_is_about_ours(monkeypatch):
    half = {"token_logp": lambda x: 0.5 * LOGITS["token_logp"].tokens(x)}
    wrong = peers.Peer("trl", "math:pi", half)
    monkeypatch.setattr(peers, "ALL", (wrong,))
    rows, _ = run([LOGITS["token_logp"]], "trl,plain", phases=("fwd",))
    by_name = {r.provider: r for r in rows}
    assert "bound" in by_name["trl"].failed
    finite(by_name["plain"])
    quick = ["--quick", "--shapes", "12x640", "--dtypes", "fp32", "--ops", "token_logp"]
    assert main([*quick, "--providers", "trl,plain"]) == 0
    monkeypatch.setitem(
        LOGITS, "token_logp", dataclasses.replace(LOGITS["token_logp"], ours=_raises)
    )
    assert main([*quick, "--providers", "eager"]) == 1


def test_a_provider_that_overwrites_its_inputs_gets_a_copy_each_time():
    case = LOGITS["token_logp"]

    def destroys(x):
        value = case.tokens(x)
        x["policy"].zero_()
        return value

    sets = [for_case(case, make_inputs(SHAPE, torch.float32, "cpu", seed=s)) for s in (0, 1)]
    caller = Caller(Provider("p", "peers", destroys, consumes=True), case, "fwd", sets)
    for k in (0, 1, 2):
        caller.prepare(k)
        value, _ = caller.call(k)
        torch.testing.assert_close(value, case.tokens(sets[k % 2]).detach())
    assert all(x["policy"].abs().sum() > 0 for x in sets)


# --- comparing runs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "after,flagged",
    [
        (_row(1.2), True),
        (_row(1.02), False),
        (_row(0.8), False),
        (_row(1.2, spread=0.3), False),  # the spread covers it
        (_row(1.0), False),
        (_row(1.0, extra=4 << 20), True),
        (_row(1.0, extra=(1 << 20) + 4096), False),
    ],
    ids="slower_20 slower_2 faster noisy same memory little_memory".split(),
)
def test_compare_flags_regressions(after, flagged):
    found = compare.changes([_row(1.0)], [after])
    assert any(c.regression for c in found) is flagged


def test_compare_flags_a_number_that_is_gone():
    gone = dataclasses.replace(_row(1.0), ms=None, p10_ms=None, failed="refused: value")
    assert [c.regression for c in compare.changes([_row(1.0)], [gone])] == [True]


def test_compare_exit_status(tmp_path, capsys):
    files = []
    for name, ms in (("a", 1.0), ("b", 1.2), ("c", 1.02)):
        files.append(str(tmp_path / f"{name}.json"))
        report.save(files[-1], machine.describe("cpu"), ceilings.Ceilings(), [_row(ms)])
    assert compare.main(files[0], files[1]) == 1
    assert "REGRESSION" in capsys.readouterr().out
    assert compare.main(files[0], files[2]) == 0


# --- bytes ----------------------------------------------------------------------------------------


class _Bytes(TorchDispatchMode):
    """Bytes of the tensors that go into and come out of every deepalign op, None left out."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "deepalign":
            results = out if isinstance(out, tuple) else (out,)
            self.total += sum(x.nbytes for x in (*args, *results) if isinstance(x, torch.Tensor))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("phase", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("name", ["token_logp", "token_kl/policy_ref", "token_kl/js"])
def test_ideal_bytes_are_those_of_the_tensors_that_cross_the_op(name, phase, dtype):
    case, itemsize = LOGITS[name], dtype.itemsize
    x = for_case(case, make_inputs(SHAPE, dtype, "cpu"))
    x["upstream"] = x["upstream"].requires_grad_(False)
    reference = Provider("eager", "ours", case.ours)
    with dak.use_backend("eager"), _Bytes() as seen:
        Caller(reference, case, phase, [x]).call(0)
    assert work_of(case, SHAPE, itemsize, phase).bytes == seen.total


def test_passes_over_the_logits_by_hand():
    matrix = SHAPE.T * SHAPE.V * 2
    counts = {  # (op, phase) -> passes read and written, as one would count them on paper
        ("token_logp", "fwd_bwd"): (2, 1),
        ("token_kl/policy_ref", "fwd"): (2, 0),
        ("token_kl/policy_ref", "fwd_bwd"): (4, 1),
        ("constrained_loss/ref_logits", "fwd_bwd"): (2, 1),
        ("constrained_loss/ref_logp", "fwd_bwd"): (1, 1),
    }
    for (op, phase), (read, written) in counts.items():
        assert traffic(LOGITS[op], SHAPE, 2, phase, True) == (read * matrix, written * matrix)


def test_linear_flops_by_hand():
    shape = Shape(3, 5, 7)
    gemm = 2 * 3 * 5 * 7
    counts = {"linear_token_logp": 3, "linear_token_logp/frozen_head": 2, "linear_token_kl/js": 4}
    for name, gemms in counts.items():
        assert work_of(LINEAR[name], shape, 4, "fwd_bwd").flops == gemms * gemm
