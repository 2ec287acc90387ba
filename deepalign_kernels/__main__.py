"""`python -m deepalign_kernels`: versions; which backend runs each op on each device, and why."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from deepalign_kernels import __version__, backends

DEVICES = ("cpu", "cuda")  # torch calls ROCm devices "cuda" too


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def runtime() -> str:
    """The GPU runtime of this torch and the GPUs it sees."""
    if torch.version.hip:
        built = f"ROCm {torch.version.hip}"
    elif torch.version.cuda:
        built = f"CUDA {torch.version.cuda}"
    else:
        return "none (a CPU build of torch)"
    if not torch.cuda.is_available():
        return f"{built}, no device"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{built}, {', '.join(names)}"


def versions() -> list[tuple[str, str]]:
    """(what, version or state) lines."""
    lines = [
        ("deepalign_kernels", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("triton", version("triton")),
        ("GPU runtime", runtime()),
        ("CPU capability", torch.backends.cpu.get_cpu_capability()),
    ]
    for device in DEVICES:
        why_not = backends.native_library(device)
        lines.append((f"native {device}", one_line(why_not) if why_not else "loaded"))
    return lines


def one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def chosen(op: str, device: str) -> str:
    """Backend that runs `op` on `device` tensors, "-" where none can."""
    if device == "cuda" and not torch.cuda.is_available():
        return "-"
    try:
        return backends.selected(op, device)
    except RuntimeError:  # the one that is forced cannot
        return "-"


def table() -> str:
    """A row for each op, a column for each device; numbers point into the list of reasons below."""
    numbers: dict[str, int] = {}  # reason -> its number, in order of appearance
    rows = [["op", *DEVICES]]
    for op in backends.OPS:
        row = [op]
        for device in DEVICES:
            whys = ((name, backends.reason(name, op, device)) for name in backends.BACKENDS)
            texts = [f"{name} on {device}: {one_line(why)}" for name, why in whys if why]
            marks = "".join(f" [{numbers.setdefault(text, len(numbers) + 1)}]" for text in texts)
            row.append(chosen(op, device) + marks)
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    legend = [f"[{number}] {text}" for text, number in numbers.items()]
    return "\n".join([*lines, "", "not taken, because:", *legend])


def main() -> None:
    for what, state in versions():
        print(f"{what + ':':<20}{state}")
    print(f"\n{table()}")


if __name__ == "__main__":
    main()
