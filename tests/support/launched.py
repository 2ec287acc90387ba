"""Triton's launch path for the GPUs named, each pretended: `python -m launched sm_90,sm_80`.

Prints a line per GPU with the number of variants compiled; test_triton_offline.py runs this in a
process of its own, `.ci/matrix` under other versions of Triton. The first GPU named gets every
dtype and mode; the others the plain ones.
"""

import contextlib
import sys
from unittest import mock

import torch
from gpu_ops import OPS, kernels
from linear_cases import as_on_a_gpu

from deepalign_kernels import backends, use_backend
from deepalign_kernels.triton_kernels import _offline, _pretend


def count():
    return sum(map(_pretend.compiled, kernels()))


def launch(arch, *args, **options):
    return [
        (x, x.kernel[(1,)](*x.args, **x.constexprs, **x.options))
        for x in _offline.launches(arch, *args, **options)
    ]


def code(compiled):
    """Machine code without the names of source files: Triton's cache may know the same source by
    the path of another checkout."""
    text, _, _ = compiled.asm["ptx"].partition(".section")
    assert ".entry" in text and "ret;" in text
    return [line for line in text.splitlines() if ".file" not in line]


def every_kernel(arch):
    """Each kernel, as the offline compilation launches it: the same code, compiled once."""
    seen = launch(arch, "bf16", "bf16", 128256, 0.7, 0.0)
    for x, compiled in {x.name: (x, k) for x, k in seen}.values():
        # what is compiled offline is what the launcher compiles
        assert code(compiled) == code(_offline.compile_launch(x, arch)), x.name
    assert {id(x.kernel) for x, _ in seen} <= {id(k) for k in kernels()}
    before = count()
    assert before >= 15, before
    # Neither token count, aligned vocabulary nor scalars cause another compilation.
    for T, V, temperature, b in ((1, 4096, 0.9, 0.3), (2, 8192, 0.5, 0.9), (33, 32000, 3, 0.1)):
        launch(arch, "bf16", "bf16", V, temperature, 0.0, T=T, js_beta=b)
        assert count() == before, (T, V, count(), before)
    launch(arch, "bf16", "bf16", 4098, 0.7, 0.0)
    assert count() > before  # rows that no wide load can read


def every_mode(arch):
    launch(arch, "bf16", "bf16", 4096, 1.0, 30.0, masks=False, js_beta=0.01)
    launch(arch, "fp32", "bf16", 4096, 1.0, 0.0)
    launch(arch, "fp16", "fp16", 4097, 1.0, 0.0)


def public_ops():
    """What test_gpu.py runs on a GPU, linear ops included: another number of tokens, beta or
    temperature compiles nothing."""
    for name, (op, _) in OPS.items():
        seen = []
        with as_on_a_gpu(8) if "linear" in name else contextlib.nullcontext():
            for T, beta, temperature in ((8, 0.5, 0.7), (1, 0.1, 0.9), (33, 2.0, 0.5)):
                x, y = torch.zeros(2, 2, T, 4096, dtype=torch.bfloat16)
                target = torch.zeros(2, T, dtype=torch.int64)
                target[:, 0] = -100
                made = op(x.requires_grad_(), y, target, beta, temperature=temperature)
                if not isinstance(made, tuple):
                    torch.autograd.grad(made, x)
                seen.append(count())
        assert len(set(seen)) == 1, (name, seen)


def any_backend(name, op, device, dtype=None):
    return None if name == "triton" else f"{name} is not looked at here"


def main(archs):
    first, *_ = archs
    for arch in archs:
        with _pretend.gpu(arch):
            every_kernel(arch)
            if arch == first:
                every_mode(arch)
                with mock.patch.object(backends, "unavailable", any_backend), use_backend("triton"):
                    public_ops()
            print(arch, count(), "kernels launched")


if __name__ == "__main__":
    main(sys.argv[1].split(","))
