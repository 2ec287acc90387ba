"""The compiled CUDA C++ kernels, without a GPU: every architecture, no spills, room for several
blocks on a multiprocessor. They run in test_cuda_on_host.py, and in test_gpu.py where a GPU is."""

import json
import shutil

import cuda_on_host
import pytest
import torch

from benchmarks.offline import cuda_cpp, sass
from deepalign_kernels import backends

ARCHS = ("sm_80", "sm_90a", "sm_100")
ROW_KERNELS = ("logp_rows", "kl_rows", "js_rows", "parts_rows", "stats_rows")


@pytest.fixture(scope="module")
def kernels():
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc: the CUDA C++ kernels are not compiled here")
    found = cuda_cpp.kernels()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_is_compiled_and_none_spills(kernels, arch):
    mine = [k for k in kernels if k.arch == arch]
    for name in (*ROW_KERNELS, "logp_grad", "kl_grad"):
        variants = {(k.dtype, k.softcap) for k in mine if k.name == name}
        assert len(variants) == 6, (name, variants)
    assert {k.dtype for k in mine if k.name == "scale_rows"} == {"fp32", "bf16", "fp16"}
    assert not [k for k in mine if k.stack or k.local]


def test_several_blocks_hide_each_others_waiting(kernels):
    wanted = {"logp_rows": 3, "kl_rows": 3, "js_rows": 2, "parts_rows": 2, "stats_rows": 2}
    for k in kernels:
        assert cuda_cpp.by_registers(k.registers) >= wanted.get(k.name, 4), k


def test_the_report_has_a_line_for_every_kernel(kernels):
    lines = cuda_cpp.table(128256, ["sm_90"]).splitlines()
    assert sum(line.startswith("sm_90a") for line in lines) == sum(
        k.arch == "sm_90a" for k in kernels
    )


@pytest.mark.slow
def test_instructions_per_column_stay_as_few_as_recorded(kernels):
    """Jensen-Shannon and token_stats are bound by them, not by memory."""
    found = sass.counts(cuda_cpp.LIBRARY)
    assert isinstance(found, dict), found
    record = json.loads(sass.RECORD.read_text())
    assert found.keys() == sass.OPS.keys() == record["counts"].keys()
    assert found["token_kl/js/fwd"] <= 60 and found["token_kl/js/bwd"] <= 50
    more = {op: (record["counts"][op], n) for op, n in found.items()
            if n > 1.05 * record["counts"][op]}  # fmt: skip
    assert not more or record["compiler"] != sass.compiler(), more


def test_rows_of_real_vocabularies_stay_on_the_chip():
    h200, a100 = cuda_cpp.GPUS["sm_90a"], cuda_cpp.GPUS["sm_80"]
    for columns in (32000, 50257, 128256, 151936, 262144):
        for itemsize in (2, 4):
            for matrices in (1, 2):
                assert cuda_cpp.plan(h200, columns, itemsize, matrices).resident
    assert cuda_cpp.plan(a100, 32768, 2, 2).resident
    assert not cuda_cpp.plan(a100, 128256, 2, 2).resident
    assert cuda_cpp.plan(h200, 128256, 2, 2).blocks == 3


@pytest.mark.slow
@pytest.mark.skipif(
    cuda_on_host.why_not() is not None, reason=f"cuda_on_host: {cuda_on_host.why_not()}"
)
@pytest.mark.parametrize("shared,major", [(227 << 10, 9), (163 << 10, 8), (128 << 10, 9)])
def test_the_report_plans_as_the_kernels_do(shared, major):
    """offline/cuda_cpp.py repeats make_plan of csrc/cuda/plan.h, but for the block size."""
    gpu = cuda_cpp.Gpu(shared, shared + 1024, major >= 9)
    target = torch.zeros(1, dtype=torch.int64)
    for columns in (5, 4099, 32000, 128256):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.zeros(1, 1, columns, dtype=dtype)
            with cuda_on_host.pretend(shared, major=major) as host:
                logp = backends._choose("token_logp_fwd", "cpu", dtype, "native")
                kl = backends._choose("token_kl_fwd", "cpu", dtype, "native")
                for matrices, call in (
                    (1, lambda f=logp, x=x: f(x, target, -100, 1.0, 0.0)),
                    (2, lambda f=kl, x=x: f(x, x, None, 0, 0.5, 1.0, 0.0)),
                ):
                    call()
                    plan = cuda_cpp.plan(gpu, columns, x.element_size(), matrices)
                    assert host.host_last_cluster() == plan.cluster
                    if plan.resident:  # the scratch grows with the block
                        least = plan.bytes - cuda_cpp.SCRATCH
                        assert least < host.host_last_bytes() <= plan.bytes
