"""hub/make.py: what it writes is loaded by the Hub's own `kernels` package."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LOAD = """
import importlib.util, pathlib, sys
import torch
import deepalign_kernels as dak
from kernels import get_local_kernel

folder = pathlib.Path(sys.argv[1])
hub = get_local_kernel(folder)
assert hub.__file__.startswith(str(folder)) and hasattr(torch.ops, hub.__name__)
assert not [name for name in sys.modules if name.startswith(("transformers", "matplotlib"))]
x, y = torch.randn(1, 5, 99, requires_grad=True), torch.randint(99, (1, 5))
results = []
for module in (hub, dak):  # two versions in one process
    with module.use_backend("eager"):
        logp = module.token_logp(x, y)
        results.append((logp, *torch.autograd.grad(logp.sum(), x)))
assert all(map(torch.equal, *results)) and hub.token_logp is not dak.token_logp

spec = importlib.util.spec_from_file_location("benchmark", folder / "benchmarks" / "benchmark.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)
for workloads in (benchmark.Logits(), benchmark.HiddenStates()):
    workloads.kernel, workloads.tokens, workloads.vocabulary = hub, 4, 64
    workloads.setup()
    names = [name[10:] for name in dir(workloads) if name.startswith("benchmark_")]
    for name in names:
        getattr(workloads, f"benchmark_{name}")()
        wanted = getattr(workloads, f"verify_{name}")()
        torch.testing.assert_close(workloads.out, wanted, atol=1e-5, rtol=1e-5)
    print(*names)
"""


@pytest.mark.slow
def test_the_layout_of_the_hub_is_loaded_by_its_own_package(tmp_path, monkeypatch):
    pytest.importorskip("kernels", reason="kernels, of the dev extra, is not installed")
    monkeypatch.setenv("DEEPALIGN_BUILD_NATIVE", "0")  # the C++ takes minutes: `make hub` has it
    for command in (["hub/make.py", str(tmp_path)], ["-c", LOAD, str(tmp_path)]):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert "linear_token_logp" in done.stdout and "constrained_loss" in done.stdout
    for variant in ("torch-cpu", "torch-cuda", "torch-rocm"):
        assert (tmp_path / "build" / variant / "metadata.json").exists()
    for file in (tmp_path / "torch-ext").rglob("*.py"):
        assert "from deepalign_kernels" not in file.read_text().split('"""')[-1], file
