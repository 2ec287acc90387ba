"""Where a measurement was taken: everything a reader needs to judge or repeat it."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import subprocess
import time
from typing import Any

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
MEASURED = ("deepalign_kernels", "csrc", "benchmarks")  # what a commit must hold to repeat a run
PACKAGES = tuple("triton numpy liger_kernel trl quack-kernels cut-cross-entropy flash_attn".split())
# Says the commit where a copy of the tree has no git history; a + at its end: with changes.
COMMIT = "DEEPALIGN_COMMIT"


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe(device: str) -> dict[str, Any]:
    """JSON-able facts about machine, software and state; nothing that names a user or a host."""
    told = os.environ.get(COMMIT, "")
    facts: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device,
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "last_level_cache_bytes": last_level_cache(device),
        "transparent_hugepages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: v for name in PACKAGES if (v := _version(name))},
        "commit": told.rstrip("+") or _git("rev-parse", "--short=12", "HEAD"),
        "dirty": told.endswith("+") or bool(_git("status", "--porcelain", "--", *MEASURED)),
    }
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        facts["gpu"] = {"name": p.name, "sms": p.multi_processor_count, "bytes": p.total_memory}
        facts["gpu"]["capability"] = f"sm_{p.major}{p.minor}"
        facts["cuda"] = torch.version.cuda or torch.version.hip
    return facts


def last_level_cache(device: str) -> int:
    """Bytes of the last cache before main memory: a GPU's L2, or all of this CPU's largest caches
    together.
    """
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    caches: dict[tuple[int, str], int] = {}
    for index in pathlib.Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            level = int((index / "level").read_text())
            size = (index / "size").read_text().strip()
            shared = (index / "shared_cpu_list").read_text().strip()
        except OSError:
            continue
        power = {"K": 10, "M": 20, "G": 30}.get(size[-1], 0)
        caches[level, shared] = int(size.rstrip("KMG")) << power
    top = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == top) or 32 << 20


def cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def load_warning() -> str | None:
    """A line for the reader where other work competes for the cores."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > 0.3 * cores:
        return f"load average {load:.1f} on {cores} cores before the start: not a quiet machine"
    return None


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text().strip()
    except OSError:
        return ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
