"""The benchmark harness: what it times, what it refuses, what it counts. No test of speed."""

import ctypes
import dataclasses
import json
import math
import pathlib
import subprocess
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import deepalign_kernels as dak
from benchmarks import (
    ceilings,
    compare,
    growth,
    harness,
    machine,
    measure,
    memory,
    peers,
    report,
    verdict,
)
from benchmarks.__main__ import main, plan_of
from benchmarks.cases import LOGITS, Case, Shape, for_case, make_inputs, traffic, work_of
from benchmarks.harness import Caller, Row
from benchmarks.linear_cases import LINEAR
from benchmarks.providers import Provider, available
from deepalign_kernels import backends

ROOT = pathlib.Path(__file__).parent.parent
SHAPE = Shape(12, 640)
pytestmark = pytest.mark.clean_memory


@pytest.fixture(autouse=True)
def one_thread():
    """More threads than a shared machine has free cores wait for each other at every op."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(table, wanted="ours,eager", shape=SHAPE, dtypes=("fp32",), **more):
    plan = harness.Plan(list(table), [shape], list(dtypes), wanted=wanted, seconds=0.002, **more)
    return harness.run(plan, ceilings.Ceilings(), lambda text: None)


@pytest.fixture(autouse=True)
def small_rulers(monkeypatch):
    monkeypatch.setattr(machine, "last_level_cache", lambda device: 1 << 18)


# --- the harness runs -----------------------------------------------------------------------------


def finite(row):
    assert row.failed is None, row
    numbers = (row.ms, row.p10_ms, row.p90_ms, row.extra_bytes, row.error, row.ideal_bytes)
    assert all(x is not None and math.isfinite(x) for x in numbers), row
    assert 0 < row.p10_ms <= row.ms <= row.p90_ms and row.laps >= 3, row


def test_every_logits_op_gets_finite_numbers_from_each_provider():
    rows, _ = run(LOGITS.values(), dtypes=("fp32", "bf16"))
    for row in rows:
        finite(row)
    cells = {(r.op, r.phase, r.dtype) for r in rows}
    assert len(cells) == 2 * sum(len(c.phases) for c in LOGITS.values())
    ours = {"reference", *["native"] * (backends.native_library("cpu") is None)}
    assert {r.provider for r in rows} == {*ours, "eager"}


def test_every_linear_op_gets_finite_numbers():
    rows, _ = run(LINEAR.values(), shape=Shape(10, 96, 16), wanted="reference,eager")
    assert {r.op for r in rows} == LINEAR.keys()
    for row in rows:
        finite(row)
        assert row.ideal_flops > 0


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
    assert "token_kl fwd >= 10x eager" in printed and "eager" in printed
    data = json.loads(file.read_text())
    assert {"cpu", "threads", "torch", "commit", "dirty", "load_average"} <= data["machine"].keys()
    assert data["ceilings"]["read"] > 0 and len(data["rows"]) >= 4
    assert main(["readme", str(file)]) == 0
    assert "| `token_kl/policy_ref` fwd+bwd |" in capsys.readouterr().out
    assert main(["compare", str(file), str(file)]) == 0
    assert main(["--ops", "no_such_op"]) == 2


def test_default_plan_covers_the_shapes_and_dtypes_of_the_targets():
    from benchmarks.__main__ import parser

    plan = plan_of(parser().parse_args(["run", "--device", "cpu"]))
    assert [str(s) for s in plan.shapes] == ["2048x32000", "1024x128256"]
    assert plan.dtypes == ["fp32", "bf16"] and plan.phases == ("fwd", "fwd_bwd")
    assert not plan.once & {"token_logp", "token_kl/policy_ref", "constrained_loss/ref_logits"}


# --- the gate -------------------------------------------------------------------------------------


def cell(name, phase="fwd_bwd"):
    return LOGITS[name], "cpu", torch.float32, phase


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
    rows, _ = run([wrong], wanted="reference,eager", phases=("fwd_bwd",))
    ours, eager = rows
    assert ours.ms is None and ours.failed is not None and said in ours.failed
    finite(eager)


def test_a_wrong_shape_is_refused():
    case = LOGITS["token_logp"]
    short = dataclasses.replace(case, ours=lambda x: case.ours(x).sum())
    rows, _ = run([short], "reference", phases=("fwd",))
    assert rows[0].failed


def test_a_wrong_scalar_gradient_is_refused_though_its_entries_are_tiny():
    """A mean divides gradients by T: an absolute bound alone would let this through."""
    case = LOGITS["constrained_loss/ref_logp"]

    def ours(x):
        return case.ours({**x, "policy": _Bent.apply(x["policy"], lambda g: g * 1.001)})

    rows, _ = run([dataclasses.replace(case, ours=ours)], "reference", shape=Shape(512, 320))
    assert [bool(r.failed) for r in rows] == [False, True]  # fwd has no gradient
    assert "gradient of policy" in rows[1].failed


def test_a_wrong_peer_is_refused_and_the_exit_status_is_about_ours(monkeypatch):
    half = {"token_logp": lambda x: 0.5 * LOGITS["token_logp"].tokens(x)}
    wrong = peers.Peer("trl", "math:pi", half)
    monkeypatch.setattr(peers, "ALL", (wrong,))
    rows, _ = run([LOGITS["token_logp"]], "trl,eager", phases=("fwd",))
    by_name = {r.provider: r for r in rows}
    assert "bound" in by_name["trl"].failed
    finite(by_name["eager"])
    quick = ["--quick", "--shapes", "12x640", "--dtypes", "fp32", "--ops", "token_logp"]
    assert main([*quick, "--providers", "trl,eager"]) == 0
    monkeypatch.setitem(
        LOGITS, "token_logp", dataclasses.replace(LOGITS["token_logp"], ours=_raises)
    )
    assert main([*quick, "--providers", "reference"]) == 1


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


def _row(ms, spread=0.01, extra=1 << 20, **more):
    parts = dict(op="token_kl/js", phase="fwd", T=8, V=9, H=0, dtype="fp32", provider="native")
    times = dict(ms=ms, p10_ms=ms * (1 - spread), p90_ms=ms * (1 + spread), extra_bytes=extra)
    return Row(**{**parts, "group": "ours", **times, **more})


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
    reference = Provider("reference", "ours", case.ours)
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


# --- memory ---------------------------------------------------------------------------------------

MIB = 1 << 20
_LIB = torch.library.Library("deepalign_test_memory", "DEF")
_LIB.define("scratch(Tensor x, int size) -> Tensor")


def _scratch(x, size):
    hidden = torch.empty(size, dtype=torch.uint8).fill_(1)  # freed before the op returns
    return x + hidden[0]


_LIB.impl("scratch", _scratch, "CPU")


def test_memory_inside_an_op_is_seen():
    x = torch.ones(4)
    for size in (8 * MIB, 24 * MIB):
        _, peak = memory.measured(
            lambda n=size: torch.ops.deepalign_test_memory.scratch(x, n), "cpu"
        )
        assert size <= peak.allocated <= size + 4096
        if peak.resident is not None:
            assert size - MIB <= peak.resident <= size + 8 * MIB


def test_results_and_gradients_count_and_freed_memory_does_not_add_up():
    def three_in_turn():
        for _ in range(3):
            torch.ones(2 * MIB)  # 8 MiB each
        return torch.ones(MIB)  # 4 MiB

    _, peak = memory.measured(three_in_turn, "cpu")
    assert 8 * MIB <= peak.allocated <= 8 * MIB + 4096


def test_plain_malloc_shows_in_the_resident_reading():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.memset.argtypes = (
        [ctypes.c_void_p],
        [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t],
    )

    def outside_torch():
        block = libc.malloc(48 * MIB)
        libc.memset(block, 1, 48 * MIB)
        libc.free(block)

    _, peak = memory.measured(outside_torch, "cpu")
    if peak.resident is None:
        pytest.skip("no /proc/self/clear_refs")
    assert peak.allocated < MIB and peak.resident >= 47 * MIB


def test_extra_memory_of_the_reference_is_counted_in_matrices():
    rows, _ = run([LOGITS["token_kl/policy_ref"]], "reference", shape=Shape(32, 4096))
    matrix = 32 * 4096 * 4
    assert rows[0].extra_bytes > 2 * matrix  # two log-softmaxes at least
    assert rows[1].gradient_bytes == matrix and rows[1].beyond_gradient > matrix


# --- clocks, rulers, figures ----------------------------------------------------------------------


def test_providers_take_turns_and_inputs_rotate():
    order = []
    runners = [
        measure.Runner(lambda k, n=name: order.append((n, k)), torch.no_grad) for name in "ab"
    ]
    measure.interleave(runners, "cpu", seconds=0, rounds=4)
    assert [n for n, _ in order] == list("aabb" * 4)
    assert [k for n, k in order if n == "a"] == list(range(8))
    assert [len(r.laps) for r in runners] == [4, 4]


def test_the_first_call_of_a_turn_does_not_count():
    runner = measure.Runner(lambda k: time.sleep(0.02 * (k % 2 == 0)), torch.no_grad)
    for _ in range(3):
        runner.run("cpu", 1)
    assert len(runner.laps) == 3 and max(runner.laps) < 0.01


def test_input_sets_together_leave_the_cache():
    assert measure.input_sets(1 << 20, 1 << 20, 1 << 40) == 4
    assert measure.input_sets(1 << 30, 1 << 20, 1 << 40) == 2
    assert measure.input_sets(1 << 30, 1 << 20, 1 << 29) == 1


def test_rulers_read_everything_and_keep_the_best():
    c = ceilings.Ceilings()
    ceilings.bandwidth(c, "cpu", 8 << 20, laps=3)
    ways = {k: v for k, v in c.ways.items() if k.startswith("read")}
    assert c.read == max(ways.values()) and c.copy > 0
    assert len(ways) >= 5


def test_growth_exponents():
    sizes = [2.0**i for i in range(8)]
    assert growth.exponent(sizes, [3 * s for s in sizes]) == pytest.approx(1)
    assert growth.exponent(sizes, [s**2 for s in sizes]) == pytest.approx(2)
    assert growth.reason(1.0, 1.0) == "linear"
    assert "fixed cost" in growth.reason(0.5, 1.0)


def test_growth_writes_figures(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [_row(ms, T=t, extra=t * MIB) for t, ms in ((8, 1.0), (16, 2.0), (32, 4.0))]
    growth.figure(rows, "T", "test", str(tmp_path), print)
    assert (tmp_path / "growth_T.png").stat().st_size > 5000


def test_verdict_takes_the_worst_place():
    rows = []
    for V, native in ((100, 1.0), (200, 1.5)):
        for name, ms in (("native", native), ("eager", 12.0)):
            parts = dict(op="token_kl/policy_ref", V=V, provider=name, ideal_bytes=10**6)
            rows.append(_row(ms, **parts))
    rulers = ceilings.Ceilings(read=1.25e9, copy=1e9)
    header, lines = verdict.judge(rows, rulers, "cpu")
    by_text = {line[0]: line[1:] for line in lines}
    assert by_text["token_kl fwd >= 10x eager"] == ["12x", "8x", "NOT MET"]
    assert by_text["token_kl fwd >= 70% of read bandwidth"] == ["80%", "53%", "NOT MET"]
    assert by_text["token_kl fwd+bwd >= 8x eager"][-1] == "not measured"


def test_peers_say_why_they_are_not_run(monkeypatch):
    gone = peers.Peer("trl", "no_such_module_here:x", {"token_logp": LOGITS["token_logp"].tokens})
    elsewhere = [peer for peer in peers.ALL if peer.device == "cuda"]
    monkeypatch.setattr(peers, "ALL", (gone, *elsewhere))
    found, absent = available(*cell("token_logp"), "peers")
    assert not found
    whys = {a.name: a.why for a in absent}
    assert whys["trl"] == "no_such_module_here is not installed"
    assert whys["quack"] == "runs on cuda only"


# --- files ----------------------------------------------------------------------------------------


def test_every_public_op_has_a_case():
    ops = {name.partition("/")[0] for name in (*LOGITS, *LINEAR)}
    public = {n for n in dak.__all__ if n.startswith(("token_", "constrained", "linear_"))}
    assert public - {"linear_token_stats"} <= ops


def test_gpu_script_is_sound_bash_and_knows_its_phases():
    script = ROOT / "benchmarks" / "gpu.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    bad = subprocess.run(["bash", script, "/tmp", "nope"], capture_output=True, text=True)
    assert bad.returncode == 2 and "logits" in bad.stderr


def test_files_stay_small():
    for file in (ROOT / "benchmarks").iterdir():
        if file.suffix in (".py", ".sh"):
            assert len(file.read_text().splitlines()) <= 400, file


def test_cases_name_known_ops():
    for case in (*LOGITS.values(), *LINEAR.values()):
        assert isinstance(case, Case)
        assert {op for ops in case.ops.values() for op in ops} <= backends.STEMS.keys()
