"""The cells of `python -m benchmarks` as pytest-benchmark cases, for its storage, comparison and
histograms:

pytest benchmarks/bench_logits.py --benchmark-only [--bench-shapes 64x4096] [--benchmark-autosave]

Plain `pytest` never collects this file. Providers do not take turns here, so on a noisy machine
trust the harness.
"""

from __future__ import annotations

import functools

import torch

from benchmarks.cases import logits as cases
from benchmarks.cases.logits import DTYPES, LOGITS, Shape
from benchmarks.harness import gate, machine, measure, memory, providers
from benchmarks.harness.cells import GIB, Caller


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    device = option("--bench-device") or machine.default_device()
    params, names = [], []
    for shape in map(Shape.parse, option("--bench-shapes").split(",")):
        for dtype in option("--bench-dtypes").split(","):
            for case in LOGITS.values():
                for phase in case.phases:
                    wanted = option("--bench-providers")
                    found, _ = providers.available(case, device, DTYPES[dtype], phase, wanted)
                    for provider in found:
                        params.append((case, phase, shape, dtype, provider, device))
                        names.append(f"{case.name}-{phase}-{shape}-{dtype}-{provider.name}")
    metafunc.parametrize("case,phase,shape,dtype,provider,device", params, ids=names)


@functools.lru_cache(maxsize=1)
def _sets(shape, dtype, device):
    first = cases.make_inputs(shape, DTYPES[dtype], device)
    size = sum(x.nbytes for x in first.values())
    n = measure.input_sets(size, machine.last_level_cache(device), 3 * GIB)
    return [first, *(cases.rotated(first, by) for by in range(1, n))]


def test_speed(benchmark, case, phase, shape, dtype, provider, device):
    torch._dynamo.reset()
    sets = [cases.for_case(case, x) for x in _sets(shape, dtype, device)]
    caller = Caller(provider, case, phase, sets)
    benchmark.group = f"{case.name} {phase} {shape} {dtype}"
    with provider.scope():
        if provider.compiles:
            caller.call(0)
        if provider.consumes:
            caller.prepare(0)
        (value, grads), peak = memory.measured(lambda: caller.call(0), device)
        scalar, ours = provider.reduction == "mean", provider.group == "ours"
        error = gate.check(gate.Gold(case, sets[0], phase), value, grads, ours=ours, scalar=scalar)
        del value, grads
        turn = iter(range(1 << 30))

        def setup():
            k = next(turn)
            if provider.consumes:
                caller.prepare(k)
            return (k,), {}

        def call(k):
            caller.call(k)
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(call, setup=setup, rounds=5, warmup_rounds=1)
    work = cases.work_of(case, shape, DTYPES[dtype].itemsize, phase)
    benchmark.extra_info.update(
        ideal_bytes=work.bytes,
        GBps=round(work.bytes / benchmark.stats["median"] / 1e9, 2),
        extra_bytes=peak.extra,
        error=error,
    )
