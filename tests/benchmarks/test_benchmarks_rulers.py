"""What the benchmarks measure with: memory, clocks, ceilings, figures, and their files."""

import ctypes
import json
import pathlib
import time

import pytest
import torch
from bench_runs import SHAPE, _row, cell, run, small_rulers  # noqa: F401

import deepalign_kernels as dak
from benchmarks.cases.linear import LINEAR
from benchmarks.cases.logits import LOGITS, Case, Shape
from benchmarks.harness import ceilings, measure, memory, peers, report, verdict
from benchmarks.harness.providers import available
from benchmarks.studies import growth
from deepalign_kernels import backends

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = [pytest.mark.clean_memory, pytest.mark.usefixtures("one_thread")]


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
    rows, _ = run([LOGITS["token_kl/policy_ref"]], "eager", shape=Shape(32, 4096))
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


def test_every_way_of_a_ruler_keeps_its_memory():
    """They know addresses: memory that is gone would be written to."""
    a = torch.ones(1 << 16, dtype=torch.int32)
    b = torch.zeros_like(a)
    for ways, needs in (
        (ceilings._libc_copies(a, b), (a, b)),
        (ceilings._libc_reads(a), (a,)),
        (ceilings._torch_reads(a), (a,)),
    ):
        for way in ways.values():
            cells = [c.cell_contents for c in way.__closure__]
            outer = [c.cell_contents for f in cells if callable(f) for c in f.__closure__ or ()]
            held = [x for x in (*cells, *outer) if isinstance(x, torch.Tensor)]
            assert all(any(x.data_ptr() == n.data_ptr() for x in held) for n in needs), ways
            way()
    assert torch.equal(a, b)


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
        for name, ms in (("native", native), ("plain", 12.0)):
            parts = dict(op="token_kl/policy_ref", V=V, provider=name, ideal_bytes=10**6)
            rows.append(_row(ms, **parts))
    rulers = ceilings.Ceilings(read=1.25e9, copy=1e9)
    header, lines = verdict.judge(rows, rulers, "cpu")
    by_text = {line[0]: line[1:] for line in lines}
    assert by_text["token_kl fwd >= 10x plain"] == ["12x", "8x", "NOT MET"]
    assert by_text["token_kl fwd >= 70% of read bandwidth"] == ["80%", "53%", "NOT MET"]
    assert by_text["token_kl fwd+bwd >= 8x plain"][-1] == "not measured"


def test_a_row_is_held_against_the_bandwidth_of_its_own_cell():
    rulers = ceilings.Ceilings(read=2e9, copy=1e9)
    row = _row(1.0, ideal_bytes=10**6)
    assert report.achieved(row, rulers) == ("read", 0.5)
    row.ruler_rate = 1.25e9
    assert report.achieved(row, rulers) == ("read", 0.8)
    assert report.line(row, {}, rulers)[7] == "80% read 1"


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


def test_every_public_op_with_a_kernel_has_a_case():
    ops = {name.partition("/")[0] for name in (*LOGITS, *LINEAR)}
    public = {n for n in dak.__all__ if n.startswith(("token_", "constrained", "linear_"))}
    bare = {stem for op, stem in backends.STEMS.items() if not backends.module_of("triton", op)}
    bare.add("linear_token_profile")  # what it adds to linear_token_stats is plain torch
    assert public - bare <= ops


def test_files_stay_small():
    for file in (ROOT / "benchmarks").rglob("*.*"):
        if file.suffix in (".py", ".sh"):
            assert len(file.read_text().splitlines()) <= 400, file


def test_cases_name_known_ops():
    for case in (*LOGITS.values(), *LINEAR.values()):
        assert isinstance(case, Case)
        assert {op for ops in case.ops.values() for op in ops} <= backends.STEMS.keys()


def test_names_of_providers_in_files_of_before():
    file = ROOT / "benchmarks" / "results" / "growth-cpu-2core-2026-11-23" / "growth.json"
    stored = json.loads(file.read_text())
    assert stored["format"] == 1
    names = [row["provider"] for row in stored["rows"]]
    now = [row.provider for row in report.load(str(file))[2]]
    assert {"eager", "reference"} <= {*names} and {"plain", "eager"} <= {*now}
    assert [n == "eager" for n in names] == [n == "plain" for n in now]
