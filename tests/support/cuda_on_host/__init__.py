"""csrc/cuda compiled for the CPU and run there: see cuda_runtime.h in this folder.

`load()` builds the library (half a minute, then kept under build/) and `pretend` sets the GPU that
it pretends to be.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator
from unittest import mock

import torch

from deepalign_kernels import backends

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
WORK = ROOT / "build" / "cuda_on_host"
THREADS = 64  # of a block, instead of 256: two warps show every race, and fibers are slow
FLAGS = [
    *"-O2 -std=c++20 -fPIC -fvisibility=hidden -Wall -Wno-unknown-pragmas".split(),
    "-U_FORTIFY_SOURCE",  # it takes jumps between stacks for an attack
    *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA", f"-DDAK_CUDA_THREADS={THREADS}"),
]


def why_not() -> str | None:
    """Why it cannot be built here, in a line; None if it can."""
    if os.uname().sysname != "Linux":
        return "the fibers need Linux"
    return None if shutil.which("g++") else "no g++"


def _sources() -> list[pathlib.Path]:
    ours = [p for p in (ROOT / "csrc" / "cuda").iterdir() if p.suffix in (".cu", ".cpp")]
    return sorted([p for p in ours if p.name != "bindings.cpp"]) + sorted(HERE.glob("*.cpp"))


def _compile(source: pathlib.Path, target: pathlib.Path, newest: float) -> None:
    if target.exists() and target.stat().st_mtime > newest:
        return
    folder = pathlib.Path(torch.__file__).parent
    places = [f"-I{HERE}", f"-I{ROOT / 'csrc'}", "-isystem", str(folder / "include")]
    fresh = target.with_suffix(f".{os.getpid()}.new")
    command = ["g++", *FLAGS, *places, "-x", "c++", "-c", str(source), "-o", str(fresh)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "warning" not in done.stderr, done.stderr[-4000:]
    fresh.replace(target)


def _build() -> pathlib.Path:
    headers = [
        p for p in (*(ROOT / "csrc").rglob("*"), *HERE.rglob("*")) if p.suffix[:2] in (".h", ".c")
    ]
    newest = max(p.stat().st_mtime for p in headers)
    library = WORK / "cuda_on_host.so"
    if library.exists() and library.stat().st_mtime > newest:
        return library
    objects = []
    for source in _sources():
        target = WORK / f"{source.parent.name}.{source.name}.o"
        _compile(source, target, newest)
        objects.append(str(target))
    fresh = library.with_suffix(f".{os.getpid()}.new")
    torch_lib = pathlib.Path(torch.__file__).parent / "lib"
    # -Bsymbolic: what stands in for a CUDA build of torch must win over the torch at hand.
    link = ["-Wl,-Bsymbolic", f"-L{torch_lib}", "-Wl,--no-as-needed", "-ltorch_cpu"]
    subprocess.run(["g++", "-shared", *objects, "-o", str(fresh), *link], check=True)
    fresh.replace(library)
    return library


@functools.cache
def load() -> ctypes.CDLL:
    WORK.mkdir(parents=True, exist_ok=True)
    with open(WORK / "lock", "w") as lock:  # the processes of pytest-xdist build it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = _build()
    torch.ops.load_library(str(library))
    loaded = ctypes.CDLL(str(library))
    loaded.host_last_bytes.restype = ctypes.c_uint64
    return loaded


@contextlib.contextmanager
def pretend(
    shared: int = 227 << 10,
    *,
    major: int = 9,
    ptx: int = 90,
    big_clusters: bool = True,
    order: int = 0,
) -> Iterator[ctypes.CDLL]:
    """Run the ops of the block on a pretended GPU.

    Args:
        shared: bytes of shared memory that a block may have; a multiprocessor has 1 KiB more.
        major: compute capability; clusters from 9 on.
        ptx: what the kernels were compiled for; 80 on a GPU newer than the build.
        big_clusters: whether clusters of 16 blocks fit.
        order: of the warps of a cluster: 0 ascending, 1 descending, else a seed.
    """
    library = load()
    library.host_device(shared, shared + 1024, major, ptx, int(big_clusters), order)

    def chosen(op: str, device: str, dtype: torch.dtype, forced: str):
        return getattr(torch.ops.deepalign_cuda_on_host, op).default

    with mock.patch.object(backends, "_choose", chosen):
        yield library
