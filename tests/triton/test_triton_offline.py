"""Triton kernels compiled for GPUs that are not here: no spills, wide loads, no recompilation.

Each test asks a fresh process, because here Triton may have been imported as an interpreter.
Triton's cache makes a second run quick.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")

TESTS = pathlib.Path(__file__).parents[1]
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


def fresh(*arguments):
    paths = (str(TESTS.parent), str(TESTS / "support"), os.environ.get("PYTHONPATH", ""))
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_the_report_of_every_kernel(tmp_path):
    """One test: pytest-xdist would compile for each of its processes."""
    file = tmp_path / "reports.json"
    fresh("-m", "deepalign_kernels.triton_kernels._offline", "--quick", "--json", str(file))
    reports = json.loads(file.read_text())
    for arch in ARCHS:
        mine = [r for r in reports if r["arch"] == arch]
        assert {r["kernel"] for r in mine} >= {"token_kl_fwd", "token_kl_bwd", "constrained_loss"}
        no_spills_and_wide_accesses(mine)
    # Several programs hide each other's waiting.
    assert not [r for r in reports if r["resident_warps"] < 8]
    a_lane_is_one_thread_for_every_vocabulary(reports)
    no_more_instructions_per_column_than_published(reports)


def no_spills_and_wide_accesses(reports):
    assert not [r for r in reports if r["spills"]]
    aligned = [r for r in reports if r["vocab"] == "aligned"]
    assert not [r for r in aligned if r["load_bits"] != 128]
    writing = [r for r in aligned if r["kernel"].endswith("_bwd") or "grad" in r["kernel"]]
    assert writing and not [r for r in writing if r["store_bits"] != 128]


def a_lane_is_one_thread_for_every_vocabulary(reports):
    """One layout per kernel: VEC columns on a thread, so that a load is whole pieces of a row and
    no sum crosses threads inside the loop."""
    assert {r["vocab"] for r in reports} == {"aligned", "even", "unaligned"}
    for r in reports:
        vec = {"aligned": 128, "even": 32, "unaligned": 16}[r["vocab"]] // 8
        vec = max(1, vec // (4 if r["dtype"] == "fp32" else 2))
        assert r["layouts"] == f"{vec}x{64 if r['arch'] == 'gfx942' else 32}", r


# Instructions per column, sm_90, bf16, plain scores: the sweeps' share of a kernel's time where it
# is not memory that binds.
MOST = {
    ("token_logp_fwd", ""): 8.5,
    ("token_kl_fwd", "OWN_IS_REF=False"): 27.5,
    ("token_kl_bwd", "DIRECTION=0"): 28.5,
    ("token_kl_bwd", "DIRECTION=2"): 50,
    ("token_js_fwd", ""): 60,
    ("constrained_loss", ""): 34.5,
    ("token_stats", "WITH_JS=True"): 75,
    ("token_entropy_fwd", ""): 11,
    ("token_entropy_bwd", ""): 20,
}


def no_more_instructions_per_column_than_published(reports):
    key = ("sm_90", "bf16", "aligned", "plain")
    mine = [r for r in reports if (r["arch"], r["dtype"], r["vocab"], r["scores"]) == key]
    for (kernel, mode), most in MOST.items():
        counts = [
            r["instructions"] for r in mine if r["kernel"] == kernel and r["modes"].startswith(mode)
        ]
        assert counts and 0 < max(counts) <= most, (kernel, mode, counts)


@pytest.mark.slow
def test_the_launcher_takes_every_kernel():
    """Binder, specialisation, cache key, compilation and the check of globals, as on a GPU: only
    the driver is pretended."""
    said = fresh("-m", "launched", "sm_90,sm_80")
    assert [line.split()[0] for line in said.splitlines()] == ["sm_90", "sm_80"]
