"""Fixtures: which backend a test runs on, and fresh memory that holds NaN.

Without a GPU, Triton kernels run in the interpreter; the variable must be set before Triton is
imported.
"""

import contextlib
import os
from unittest import mock

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from deepalign_kernels import backends, use_backend

DEVICES = ("cpu", *["cuda"] * torch.cuda.is_available())
PLACES = [(d, b) for d in DEVICES for b in backends.BACKENDS]
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


def pytest_configure(config):
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    config.addinivalue_line(
        "markers", "clean_memory: torch.empty is left alone (see poisoned_memory)"
    )
    config.addinivalue_line(
        "markers", "every_isa: `device` also runs the native kernels of lesser instruction sets"
    )


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        every = metafunc.definition.get_closest_marker("every_isa")
        lesser = [("cpu", "native", isa) for isa in lesser_isas()] if every else []
        metafunc.parametrize("device", PLACES + lesser, ids="-".join, indirect=True)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device(request):
    """Device to run on, with one backend forced; every op of a test runs on that backend or
    raises."""
    where, name, *isa = request.param
    if why := backends.unavailable(name, "token_kl_fwd", where):
        pytest.skip(f"{name} on {where}: {why}")
    with use_backend(name), instruction_set(*isa) if isa else contextlib.nullcontext():
        yield torch.device(where)


@pytest.fixture
def backend(device):
    return backends.selected("token_kl_fwd", device.type)


@pytest.fixture
def one_thread():
    """More threads than a shared machine has free cores wait for each other at every op."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """Fresh float memory holds NaN, so that an element which no kernel writes is seen."""
    if "clean_memory" in request.keywords:
        yield
        return

    def poison(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            if type(x) is torch.Tensor and x.is_floating_point() and x.device.type != "meta":
                x.fill_(float("nan"))
            return x

        return made

    with (
        mock.patch("torch.empty", poison(torch.empty)),
        mock.patch("torch.empty_like", poison(torch.empty_like)),
    ):
        yield
