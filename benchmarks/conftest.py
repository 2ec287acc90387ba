"""Options of `pytest benchmarks/bench_logits.py --benchmark-only`."""


def pytest_addoption(parser):
    group = parser.getgroup("deepalign benchmarks")
    group.addoption("--bench-shapes", default="2048x32000,1024x128256", help="comma-separated TxV")
    group.addoption("--bench-dtypes", default="fp32,bf16")
    group.addoption("--bench-providers", default="ours,baselines", help="see python -m benchmarks")
    group.addoption("--bench-device", default=None, help="cpu or cuda")
