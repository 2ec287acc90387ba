"""benchmarks/gpu.sh and what is made of its results: played on a CPU, stopped in the middle, and
read back from made-up files with known answers."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch
from bench_runs import SHAPE, _row, cell, small_rulers  # noqa: F401
from gpu_ops import OPS

from benchmarks.cases.logits import LOGITS
from benchmarks.gpu import calls as gpu
from benchmarks.gpu import harvest
from benchmarks.gpu import plan as gpu_plan
from benchmarks.gpu.plan import Call, Step
from benchmarks.harness import ceilings, cells, machine, measure, peers, providers, report, verdict
from benchmarks.studies import capped
from deepalign_kernels import backends

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = [pytest.mark.clean_memory, pytest.mark.usefixtures("one_thread")]
CHUNKS = ("-m", "benchmarks", "sweep", "chunks", "--device", "cpu", "--dtype", "fp32", "--shapes",
          "16x8x64", "--json", "{out}/chunks.json", "--workspaces")  # fmt: skip


# --- the plan and its rehearsal -------------------------------------------------------------------


def test_the_calls_fit_their_limits_and_the_dry_run_names_what_is_missing(monkeypatch, capsys):
    """Within 15 minutes: launches, sanitizers of both backends, error budget, speed, choices."""
    first, every = gpu_plan.affordable(900), gpu_plan.affordable(2100)
    assert [call.number for call in first] == [1, 2, 3, 4] and every == gpu.CALLS
    overhead = gpu_plan.START_SECONDS + gpu_plan.BETWEEN_SECONDS * len(first)
    assert overhead + sum(call.seconds for call in first) <= 900 == gpu_plan.TOTAL_SECONDS
    steps = [step.name for call in first for step in call.steps]
    assert len(set(steps)) == len(steps) and steps.index("memcheck triton") == 2
    assert set(harvest.SANITIZERS) < set(steps) and steps.index("logits") > 6
    for call in gpu.CALLS:
        assert call.seconds <= call.limit <= gpu_plan.COMMAND_SECONDS - 30
        played = [s for s in call.steps if s.rehearsal or s.tool == "ncu"]
        assert len(played) == len(call.steps)
    monkeypatch.setattr(gpu, "LIBRARIES", [ROOT / "deepalign_kernels" / "gone.so"])
    assert gpu.dry_run() == 1
    printed = capsys.readouterr().out
    assert "one GPU for 900 s: calls 1, 2, 3, 4, 790 s predicted" in printed
    for said in ("call 4, choose: 160 s", "gone.so is not there", "Only a GPU can say", "carry "):
        assert said in printed, said
    assert printed.count("runs if named, or with more --seconds") == 3


def test_calls_run_while_the_budget_lasts_or_when_they_are_named(tmp_path, monkeypatch, capsys):
    ran, clock = [], [0.0]

    def as_predicted(call, *_):
        ran.append(call.number)
        clock[0] += call.seconds
        return True

    monkeypatch.setattr(gpu, "run_call", as_predicted)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    handler = signal.getsignal(signal.SIGTERM)
    assert gpu.command([str(tmp_path)]) == 0 and ran == [1, 2, 3, 4]
    assert signal.getsignal(signal.SIGTERM) == handler
    said = "5 counters: not begun, 230 s predicted, 110 s left"
    assert said in capsys.readouterr().out
    ran.clear()
    assert gpu.command(["--seconds", "600", str(tmp_path)]) == 0 and ran == [1, 2]
    ran.clear()
    assert gpu.command([str(tmp_path), "6", "5"]) == 0 and ran == [5, 6]
    with pytest.raises(SystemExit):
        gpu.command(["--seconds", "60", str(tmp_path)])
    assert "expected time for one call at least, got 60" in capsys.readouterr().err


def test_wheels_are_installed_once_and_a_large_one_when_its_parts_came(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(gpu, "WHEELS", tmp_path / "wheels")
    monkeypatch.setattr(gpu, "SMALL", tmp_path / "wheels" / "small")
    monkeypatch.setattr(gpu, "SITE", tmp_path / "site")
    small = tmp_path / "wheels" / "small"
    small.mkdir(parents=True)
    (small / "a.whl").touch()
    (small / "large.txt").write_text("b.whl")

    def pip(command, **_):
        done.append([pathlib.Path(x).name for x in command if x.endswith(".whl")])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with_wheels = [call for call in gpu.CALLS if call.wheels]
    assert "b.whl is not whole" in gpu.install_peers(with_wheels[0]) and done == [["a.whl"]]
    for call in gpu.CALLS:
        for part in call.parts:  # what travels with a call is there during that one
            (tmp_path / "wheels" / f"part-{part}").write_bytes(b"x")
        gpu.install_peers(call)
    gpu.install_peers(with_wheels[-1])
    assert done == [["a.whl"], ["b.whl"]]
    assert (tmp_path / "site" / "b.whl").read_bytes() == b"xx"


@pytest.mark.slow
def test_a_rehearsal_leaves_files_that_harvest_reads(tmp_path, monkeypatch, capfd):
    steps = (Step("chunks", 1, 90, (), (*CHUNKS, "1,2")), Step("ncu native", 1, 9, (), None, "ncu"))
    monkeypatch.setattr(gpu, "CALLS", (Call(4, "linear", steps),))
    monkeypatch.setattr(gpu, "SITE", tmp_path / "peers")
    assert gpu.command(["--rehearse", str(tmp_path / "out")]) == 0
    assert len(json.loads((tmp_path / "out" / "chunks.json").read_text())["lines"]) == 3
    assert harvest.command([str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    assert printed.count("default rule") >= 1 and "A REHEARSAL" in printed
    assert "not played" in printed and "conformance  " in printed and "not begun" in printed


@pytest.mark.slow
def test_a_call_that_is_ended_leaves_what_it_has_and_no_process(tmp_path):
    many = ",".join(["1"] * 20_000)
    script = (
        "import sys; from benchmarks.gpu import calls as gpu\n"
        "from benchmarks.gpu.plan import Call, Step\n"
        f"step = Step('chunks', 1, 500, (), {(*CHUNKS, many)!r})\n"
        "gpu.CALLS = (Call(4, 'linear', (step,)),)\n"
        f"sys.exit(gpu.command(['--rehearse', {str(tmp_path)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    file, stop = tmp_path / "chunks.json", time.monotonic() + 400
    while not file.exists() and time.monotonic() < stop and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    kept = report.load(str(file))[3]["lines"]
    assert kept and all(line["ms"] > 0 for line in kept)
    assert json.loads((tmp_path / "call-4.json").read_text())["steps"][0]["state"] == "interrupted"
    time.sleep(0.3)
    assert report.load(str(file))[3]["lines"][: len(kept)] == kept
    size = file.stat().st_size
    time.sleep(0.5)
    assert file.stat().st_size == size  # nobody writes any more


def test_a_step_that_runs_too_long_is_stopped(tmp_path):
    slow = Step("slow", 1, 1, ("-c", "import time; print('began', flush=True); time.sleep(60)"))
    log = (tmp_path / "log").open("w")
    assert gpu.run_step(slow, tmp_path, False, log) == "stopped after 1 s"
    missing = Step("x", 1, 1, (), None, "no-such-tool")
    assert gpu.run_step(missing, tmp_path, False, log) == "failed: there is no no-such-tool"


def test_results_are_kept_after_every_cell():
    kept = []
    plan = cells.RunPlan([LOGITS["token_logp"]], [SHAPE], ["fp32"], wanted="plain", seconds=0.001)
    cells.run(plan, ceilings.Ceilings(), lambda t: None, lambda rows, _: kept.append(len(rows)))
    assert kept[:2] == [1, 2]  # forward, then forward and backward


def test_a_peer_that_cannot_run_is_played_in_a_rehearsal_alone(monkeypatch):
    gone = peers.Peer("trl", "no_such_module_here:x", {"token_logp": LOGITS["token_logp"].tokens})
    monkeypatch.setattr(peers, "ALL", (gone,))
    monkeypatch.delenv(providers.REHEARSAL, raising=False)
    assert not providers.available(*cell("token_logp"), "peers")[0]
    monkeypatch.setenv(providers.REHEARSAL, "1")
    (found,), _ = providers.available(*cell("token_logp"), "peers")
    assert found.note == "stands in: no_such_module_here is not installed"


def test_every_op_is_tested_as_itself_on_a_gpu():
    """An op that a backend lacks must keep no other from being tested."""
    needed = [set(ops) for _, ops in OPS.values()]
    assert set.union(*needed) == {op for op in backends.OPS if backends.module_of("triton", op)}
    assert {"token_js_parts"} in needed and sum("token_js_parts" in ops for ops in needed) == 1


# --- clocks and limits of a GPU -------------------------------------------------------------------


def test_the_gpu_sleeps_for_as_long_as_the_host_queues_laps(monkeypatch):
    slept = []

    class Event:
        record = lambda self: None  # noqa: E731
        elapsed_time = lambda self, other: 1.0  # noqa: E731

    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda n: slept.append(n / measure.CYCLES_PER_SECOND))
    assert measure.laps_of(lambda: time.sleep(0.002), "cuda", 8) == [1e-3] * 8
    assert slept[0] == measure.FIRST_SLEEP and 0.8 * 7 * 0.002 < slept[1] <= measure.LONGEST_SLEEP


@pytest.mark.parametrize(
    "gpu_name,limit,met",
    [
        ("NVIDIA H200", "1.65", False),
        ("NVIDIA H100 80GB HBM3", "2.37", True),
        ("other", "3.3", True),
    ],
)
def test_a_limit_is_that_of_the_card(gpu_name, limit, met):
    parts = dict(op="token_logp", phase="fwd_bwd", T=8192, V=128256, dtype="bf16")
    rows = [_row(2.0, provider="triton", **parts)]
    _, lines = verdict.judge(rows, ceilings.Ceilings(3e12, 2.15e12), "cuda", gpu_name)
    (line,) = [x for x in lines if x[0].startswith("token_logp fwd+bwd")]
    assert f"<= {limit} ms" in line[0] and (line[-1] == "met") is met


def test_a_commit_may_be_told(monkeypatch):
    monkeypatch.setenv(machine.COMMIT, "0123456789ab+")
    said = machine.describe("cpu")
    assert (said["commit"], said["dirty"]) == ("0123456789ab", True)


# --- harvest: made-up results with known answers --------------------------------------------------


def plan_lines(op, native, triton, call=None, kernel="", plans=None, **more):
    """Lines of plans.json: native's time, and Triton's for the table's plan and others."""
    where = {"call": call or op, "op": op, "T": 8, "V": 9, "dtype": "bf16", "failed": None, **more}
    yield {**where, "backend": "native", "kernel": "", "plan": None, "table": False, "ms": native}
    for k, (plan, ms) in enumerate({(8, 32, 0): triton, **(plans or {})}.items()):
        ours = {"backend": "triton", "kernel": kernel or op, "plan": list(plan)}
        yield {**where, **ours, "table": k == 0, "ms": ms}


def outcome(ops, state="passed", test="tests/ops/test_gpu.py::test_x", **more):
    parts = {"id": test, "outcome": state, "backend": "native", "device": "cuda", "why": ""}
    return {**parts, **({"ops": ops} if ops else {}), **more}


def test_verified_are_the_ops_that_were_tested_are_clean_and_won():
    plans = [
        *plan_lines("token_logp_fwd", 1.0, 1.2),
        *plan_lines("token_logp_bwd", 1.0, 1.02),  # no faster
        *plan_lines("token_kl_fwd", 1.0, 1.5),
        *plan_lines("token_kl_fwd", 1.0, 0.9, call="token_kl_fwd_js"),  # slower in one mode
        *plan_lines("token_kl_bwd", 1.0, 1.5, plans={(16, 32, 0): 0.9}),  # another plan wins
        *plan_lines("token_stats_fwd", 1.0, 1.5),
        *plan_lines("constrained_loss_fwd", 1.0, 1.5),
        *plan_lines("constrained_loss_fused", None, 1.5),
        *plan_lines("scale_grad", 1.0, 1.5),
    ]
    tests = [outcome([op]) for op in backends.OPS if op != "scale_grad"]
    tests += [outcome(["scale_grad"], backend="triton")]
    tests += [outcome(None, "failed", "tests/ops/test_token_stats.py::test_y[cuda-native]")]
    tests += [outcome(None, "failed", "tests/test_x.py::test_z", backend="triton")]
    told = harvest.verified(tests, plans, clean=True)
    assert [op for op, why in told.items() if not why] == [
        "token_logp_fwd",
        "constrained_loss_fwd",
    ]
    for op, why in {
        "token_logp_bwd": "did not win",
        "token_kl_fwd": "did not win: 0.67 to 1.11",
        "token_kl_bwd": "did not win",
        "token_stats_fwd": "failed tests/ops/test_token_stats",
        "constrained_loss_fused": "not timed",
        "scale_grad": "no test of its own",
    }.items():
        assert told[op].startswith(why), (op, told[op])
    assert all(harvest.verified(tests, plans, clean=False).values())
    unnamed = [*tests, outcome(None, "failed", "tests/test_x.py::test_z")]
    assert all(harvest.verified(unnamed, plans, clean=True).values())


def test_a_plan_that_wins_everywhere_becomes_an_entry():
    wide, tall, gone = (8, 64, 0), (16, 32, 0), (32, 32, 0)
    plans = [
        *plan_lines("token_kl_fwd", 1.0, 1.0, plans={wide: 0.8, tall: 0.7, gone: 0.1}),
        *plan_lines("token_kl_fwd", 1.0, 1.0, V=10, plans={wide: 0.8, tall: 1.1, gone: None}),
        *plan_lines("token_kl_bwd", 1.0, 1.0, plans={wide: 0.98}),  # within the scatter
    ]
    ((kernel, (plan, share)),) = harvest.entries(plans).items()
    assert (kernel, plan) == ("token_kl_fwd", list(wide)) and share == pytest.approx(0.8)
    assert [harvest._row_of(c) for c in ("sm_80", "sm_89", "sm_90", "sm_120")] == [
        "sm_80", "sm_80", "sm_90", "sm_100"
    ]  # fmt: skip


def test_counters_are_read_from_ncus_table():
    head = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    lines = ["==PROF== text", head, '"0","kl_rows","dram__bytes_read.sum","byte","2,000"']
    lines += ['"0","kl_rows","gpu__time_duration.sum","ns","1,500.5"']
    (launch,) = harvest.counters("\n".join(lines))
    assert launch == {
        "kernel": "kl_rows", "dram__bytes_read.sum": 2000.0, "gpu__time_duration.sum": 1500.5
    }  # fmt: skip


def test_wrong_predictions_are_those_far_from_bytes_and_operations():
    rows = [
        _row(1.1, op="a", ideal_bytes=10**9),
        _row(3.0, op="b", ideal_bytes=10**9),
        _row(3.0, op="c", ideal_bytes=10**9, ideal_flops=3 * 10**9, H=4),
        _row(3.0, op="d", ideal_bytes=10**9, group="peers"),
    ]
    lines = harvest.wrong(rows, read=1e12, copy=1e12, gemm={"fp32": 1e12})
    assert [(x[0], x[4], x[-1]) for x in lines] == [("b", "1", "3.00")]


def test_harvest_says_where_there_is_nothing(tmp_path):
    with pytest.raises(ValueError, match="DIR: expected the results"):
        harvest.command([str(tmp_path)])


@pytest.mark.slow
def test_recipes_under_a_limit_are_those_that_the_plan_says_fit():
    pytest.importorskip("transformers")
    names = capped.recipes(capped.SHAPE, 48, 2, 2048, "cuda")
    assert names == ["bf16-8bit-release", "bf16-4bit-release", "bf16-offload"]
    assert "bf16-offload" not in capped.recipes(capped.TINY, 24, 2, 64, "cpu")
    row = capped.one("fp32", capped.TINY, 24, 2, 64, 3, "cpu")
    assert len(row["seconds"]) == 2 and row["peak"] == pytest.approx(row["predicted"], rel=0.1)
    told = capped.line(row | {"seconds": [0.5, 0.25, 0.25], "peak": 3 << 30})
    assert told.startswith("| 24 | fp32 | 2 x 64 | 0.00 | 3.00 | ") and told.endswith(" | 512 |")
    assert "| no memory |" in capped.line(row | {"failed": "no memory"})
