"""Triton kernels compiled for GPUs that are not here: no spills, wide loads, no recompilation.

Each test asks a fresh process, because here Triton may have been imported as an interpreter.
Triton's cache makes a second run quick.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


def fresh(*arguments):
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    file = tmp_path_factory.mktemp("offline") / "reports.json"
    fresh("-m", "deepalign_kernels.triton_kernels._offline", "--quick", "--json", str(file))
    return json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills(reports, arch):
    mine = [r for r in reports if r["arch"] == arch]
    assert {r["kernel"] for r in mine} >= {"token_kl_fwd", "token_kl_bwd", "constrained_loss"}
    assert not [r for r in mine if r["spills"]]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_aligned_rows_move_16_bytes_at_a_time(reports, arch):
    mine = [r for r in reports if r["arch"] == arch and r["vocab"] == "aligned"]
    assert not [r for r in mine if r["load_bits"] != 128]
    writing = [r for r in mine if r["kernel"].endswith("_bwd") or "grad" in r["kernel"]]
    assert writing and not [r for r in writing if r["store_bits"] != 128]


@pytest.mark.slow
def test_several_programs_hide_each_others_waiting(reports):
    assert not [r for r in reports if r["resident_warps"] < 8]


SAME_KEY = """
import torch
from deepalign_kernels.triton_kernels import _launch, _offline
from deepalign_kernels.triton_kernels import constrained_loss, token_kl, token_logp, token_stats

def keys(B, T, V, beta, temperature, ignore, dtype=torch.bfloat16):
    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    n = B * T
    # a view into longer sequences: the batch stride grows with T as well
    x, y = (new(B, T + 1, V, dtype=dtype)[:, 1:] for _ in range(2))
    out, row, pair = new(B, T, V, dtype=dtype), new(n), new(n, 2)
    target, valid = new(n, dtype=torch.int64), new(n, dtype=torch.bool)
    tail = (temperature, 0.0)
    with _launch.recording("sm_90") as launches:
        token_logp.token_logp_fwd(x, target, ignore, *tail)
        token_logp.token_logp_bwd(row, x, target, pair, ignore, *tail, out)
        for direction in range(3):
            token_kl.token_kl_fwd(x, y, valid, direction, beta, *tail)
            token_kl.token_kl_bwd(row, x, y, valid, pair, pair, row, direction, beta, *tail, out)
        loss = (ignore, False, 0.0, *tail)
        constrained_loss.constrained_loss_fwd(x, target, row, y, None, *loss)
        constrained_loss.constrained_loss_fused(x, target, row, None, row, new(), *loss, out)
        token_stats.token_stats_fwd(x, y, target, valid, ignore, beta, *tail)
    return [_offline.specialization(launch, "sm_90") for launch in launches]

base = keys(2, 24, 1001, 0.5, 0.7, -100)
for T in (1, 2, 16, 17, 4096, 100_000):
    assert keys(2, T, 1001, 0.5, 0.7, -100) == base, T
assert keys(1, 24, 1001, 0.5, 0.7, -100) == base
assert keys(2, 24, 1003, 0.25, 0.9, 0) == base  # another odd vocabulary, beta, temperature, index
assert keys(2, 24, 1024, 0.5, 0.7, -100) != base  # wide loads are another kernel
assert keys(2, 24, 1024, 0.5, 0.7, -100) == keys(3, 7, 128256, 0.1, 2.0, 16)
"""


def test_neither_token_count_nor_scalars_cause_a_recompilation():
    fresh("-c", SAME_KEY)


SAME_SOURCE = """
from deepalign_kernels.triton_kernels import _offline

for launch in _offline._launches("sm_90", "bf16", "bf16", 128256, 1.0, 0.0):
    source = _offline.source(launch)
    for i, (kind, hint) in enumerate(_offline.specialization(launch, "sm_90")):
        name = launch.kernel.arg_names[i]
        assert source.signature[name] == kind, (launch.name, name, source.signature[name], kind)
        if kind != "constexpr":
            assert ((i,) in source.attrs) == (hint == "D"), (launch.name, name)
"""


def test_what_is_compiled_offline_is_what_the_launcher_would_compile():
    fresh("-c", SAME_SOURCE)
