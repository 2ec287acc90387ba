"""Fixtures: which backend a test runs on, and fresh memory that holds NaN.

Without a GPU, Triton kernels run in the interpreter; the variable must be set before Triton is
imported.
"""

import collections
import contextlib
import importlib.util
import json
import os
import pathlib
from unittest import mock

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from deepalign_kernels import backends, use_backend

REHEARSAL = bool(os.environ.get("DEEPALIGN_GPU_REHEARSAL"))  # of benchmarks/gpu.sh, without a GPU
DEVICES = ("cpu", *["cuda"] * torch.cuda.is_available())
PLACES = [(d, b) for d in DEVICES for b in backends.BACKENDS]
INTERPRETED = ("cpu", "triton")
ISAS = ("portable", "avx2", "avx512")  # as the native library numbers them


def lesser_isas():
    """The instruction sets this processor has beside the one that the native kernels use."""
    if backends.native_library("cpu"):
        return ()
    return ISAS[: torch.ops.deepalign_native.use_isa(-1)]


@contextlib.contextmanager
def instruction_set(name):
    """The native CPU kernels of one of ISAS inside the block."""
    before = torch.ops.deepalign_native.use_isa(ISAS.index(name))
    try:
        yield
    finally:
        torch.ops.deepalign_native.use_isa(before)


def patch_triton_once():
    """A launch in the interpreter patches `triton.language`, and Triton does it again at each call
    of a device function: half of its time. Once for each module and launch is enough."""
    from triton.runtime import interpreter

    patch, launch, done = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(fn):
        if fn.__module__ not in done:
            done.add(fn.__module__)
            return patch(fn)

    def launch_anew(self, *args, **kwargs):
        done.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew


def pytest_configure(config):
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        patch_triton_once()
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    if torch.cuda.is_available() or REHEARSAL:
        config.pluginmanager.register(Outcomes(config), "outcomes")
    config.addinivalue_line("markers", "rehearsed: of the GPU tests, those a CPU can play")
    config.addinivalue_line(
        "markers", "clean_memory: torch.empty is left alone (see poisoned_memory)"
    )
    config.addinivalue_line(
        "markers", "interpreter_slow: of `device`, Triton's interpreter is left to `make test`"
    )
    config.addinivalue_line(
        "markers",
        "every_isa(fast): `device` also runs the native kernels of lesser instruction sets; with"
        " fast=True when there is little time, too",
    )


@pytest.hookimpl(trylast=True)  # a case runs on all backends before the next: see cases.truth
def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        every = metafunc.definition.get_closest_marker("every_isa")
        later = [] if every and every.kwargs.get("fast") else [pytest.mark.slow]
        isas = lesser_isas() if every else ()
        lesser = [pytest.param(("cpu", "native", isa), marks=later) for isa in isas]
        slow = metafunc.definition.get_closest_marker("interpreter_slow")
        places = [
            pytest.param(place, marks=[pytest.mark.slow] * bool(slow and place == INTERPRETED))
            for place in PLACES
        ]
        metafunc.parametrize("device", places + lesser, ids="-".join, indirect=True)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:  # by marker: a keyword is also the name of any folder above the test
            played = REHEARSAL and item.get_closest_marker("rehearsed")
            if item.get_closest_marker("gpu") and not played:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class Outcomes:
    """What a run on a GPU leaves: a line of JSON per test as it ends, in the file that
    DEEPALIGN_TEST_LOG names, so that a run which is stopped leaves what it has; and, last of all
    that is printed, how many tests were skipped, and why."""

    def __init__(self, config):
        worker = hasattr(config, "workerinput")  # its reports reach the main process as well
        self.file = None if worker else os.environ.get("DEEPALIGN_TEST_LOG")
        self.skipped = collections.Counter()

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        why = report.longrepr[2] if report.skipped and type(report.longrepr) is tuple else ""
        if report.skipped:
            self.skipped[why.removeprefix("Skipped: ")] += 1
        if self.file:
            line = {"id": report.nodeid, "outcome": report.outcome, "why": why}
            with pathlib.Path(self.file).open("a") as file:
                file.write(json.dumps(line | dict(report.user_properties)) + "\n")

    def pytest_unconfigure(self, config):
        if self.skipped and not hasattr(config, "workerinput"):
            whys = "; ".join(f"{n} x {why}" for why, n in self.skipped.most_common(9))
            print(f"SKIPPED {self.skipped.total()} tests: {whys}")


def ops_of(request):
    """The ops that a test parametrised by `op`, such as "token_kl/js" or "token_kl_fwd", runs; one
    of all else."""
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("op")
    stem = backends.STEMS.get(case, case.partition("/")[0]) if isinstance(case, str) else None
    return [op for op in backends.OPS if backends.STEMS[op] == stem] or ["token_kl_fwd"]


@pytest.fixture
def device(request, record_property):
    """Device to run on, with one backend forced; every op of a test runs on that backend or
    raises."""
    where, name, *isa = request.param
    record_property("device", where)
    record_property("backend", name)
    for op in ops_of(request):
        if why := backends.unavailable(name, op, where):
            pytest.skip(f"{name} on {where}: {why}")
    with use_backend(name), instruction_set(*isa) if isa else contextlib.nullcontext():
        yield torch.device(where)


@pytest.fixture
def backend(device):
    return backends.selected("token_kl_fwd", device.type)


@pytest.fixture
def interpreted(device, backend):
    """Triton kernels run in Triton's interpreter, at some 100 columns a millisecond."""
    return backend == "triton" and device.type == "cpu"


@pytest.fixture
def one_thread():
    """More threads than a shared machine has free cores wait for each other at every op."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """Fresh float memory holds NaN, so that an element which no kernel writes is seen.

    torch notes at the first `with torch.device(...)` of a process which functions make tensors;
    that must not be the one of here, or `torch.empty` obeys no such block ever after.
    """
    with torch.device("cpu"):
        torch.empty(0)
    if request.node.get_closest_marker("clean_memory"):
        yield
        return

    def poison(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            if type(x) is torch.Tensor and x.is_floating_point() and x.device.type != "meta":
                x.detach().fill_(float("nan"))  # a leaf that requires a gradient as well
            return x

        return made

    with (
        mock.patch("torch.empty", poison(torch.empty)),
        mock.patch("torch.empty_like", poison(torch.empty_like)),
    ):
        yield
