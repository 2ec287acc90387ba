"""How a backend is chosen, forced and refused."""

import warnings

import pytest
import torch

import deepalign_kernels as dak
from deepalign_kernels import backends, check


def test_auto_takes_the_best_that_can_run():
    order = [
        b for b in backends.ORDER["cpu"] if backends.unavailable(b, "token_kl_fwd", "cpu") is None
    ]
    assert backends.selected("token_kl_fwd", "cpu") == order[0]
    assert backends.selected("token_kl_fwd", "cpu", torch.float64) == "eager"


def test_a_forced_backend_that_cannot_run_raises():
    x = torch.randn(2, 5, dtype=torch.float64)
    with (
        dak.use_backend("native"),
        pytest.raises(RuntimeError, match="'native' was asked for but cannot run: fp64"),
    ):
        dak.token_kl(x, x)
    with dak.use_backend("triton"), pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        backends._choose.cache_clear()
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
            dak.token_kl(x.float(), x.float())


def test_an_op_with_its_specification_alone_runs_eagerly(monkeypatch):
    """On a GPU as well: auto moves down to it, and a forced backend says what is missing."""
    for name, there in (
        ("STEMS", {"token_new_fwd": "token_kl"}),
        ("native_library", lambda _: None),
    ):
        monkeypatch.setattr(backends, name, there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("deepalign_kernels.reference.token_kl.token_new_fwd", len, raising=False)
    for device in ("cpu", "cuda"):
        assert backends.selected("token_new_fwd", device) == "eager"
        assert backends.choose("token_new_fwd", device, torch.float32) is len
        assert "no native kernel" in (backends.reason("native", "token_new_fwd", device) or "")
    assert (
        backends.reason("triton", "token_new_fwd", "cuda") == "no Triton kernel for token_new_fwd"
    )
    with dak.use_backend("triton"), pytest.raises(RuntimeError, match="no Triton kernel"):
        backends.choose("token_new_fwd", "cuda", torch.float32)


def test_want_of_native_code_is_told_once_with_its_cure(monkeypatch):
    """Not where the user asked for eager, and not for fp64, which has no other backend."""
    x = torch.randn(2, 5)
    caches = (backends._choose, backends._runs_eagerly, backends._warn_of_device)
    monkeypatch.setattr(backends, "native_library", lambda _: "no C++ compiler")
    try:
        for cache in caches:
            cache.cache_clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with dak.use_backend("eager"):
                dak.token_kl(x, x)
            dak.token_kl(x.double(), x.double())
            assert not told
            for _ in range(2):
                dak.token_kl(x, x)
                dak.linear_token_logp(x, x, torch.tensor([0, 1]))
    finally:
        for cache in caches:
            cache.cache_clear()
    (warning,) = told
    assert warning.category is RuntimeWarning
    for part in ("25 times slower", "no C++ compiler", "pip install"):
        assert part in str(warning.message)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'cuda'"), dak.use_backend("cuda"):
        pass


def test_the_block_restores_what_was_forced_before():
    with dak.use_backend("eager"):
        with pytest.raises(KeyError), dak.use_backend("auto"):
            raise KeyError
        assert backends.selected("token_kl_fwd", "cpu") == "eager"


def test_blocks_of_two_threads_may_overlap():
    """A opens, B opens, A closes, B closes: what held before holds again, of checked() too."""
    before = backends.selected("token_kl_fwd", "cpu"), check.checking()
    for first, second in ((dak.use_backend("eager"), dak.use_backend("auto")),
                          (dak.checked(), dak.checked(False))):  # fmt: skip
        first.__enter__(), second.__enter__()
        first.__exit__(None, None, None)
        second.__exit__(None, None, None)
        assert (backends.selected("token_kl_fwd", "cpu"), check.checking()) == before


def test_every_reason_is_a_sentence():
    for op in backends.OPS:
        for device in ("cpu", "cuda"):
            for name in backends.BACKENDS:
                why = backends.reason(name, op, device)
                assert why is None or len(why) > 10


def test_cuda_cpp_without_a_gpu_run_is_held_back(monkeypatch):
    """Only ops listed as verified may be taken by auto; the table says why the others are not."""
    monkeypatch.setattr(backends, "unavailable", lambda *a, **k: None)
    monkeypatch.setattr(backends, "CUDA_CPP_VERIFIED", frozenset({"token_kl_fwd"}))
    assert backends.selected("token_kl_fwd", "cuda") == "native"
    assert backends.selected("token_kl_bwd", "cuda") == "triton"
    assert "not verified" in (backends.reason("native", "token_kl_bwd", "cuda") or "")
    with dak.use_backend("native"):
        assert backends.selected("token_kl_bwd", "cuda") == "native"
