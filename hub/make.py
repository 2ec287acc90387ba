"""`python hub/make.py FOLDER`: the layout of a kernel repository of the Hugging Face Hub.

    FOLDER/build.toml, torch-ext/deepalign_kernels/   what kernel-builder takes: Python and Triton
    FOLDER/build/torch-{cuda,rocm}/                   the same, as the `kernels` package loads it
    FOLDER/build/torch-stable-abi210-cpu-*/           with the native CPU library
    FOLDER/benchmarks/benchmark.py, CARD.md, LICENSE

The Hub loads a package from any folder, several versions of it in one process. So imports become
relative, and every op is registered under a name that the contents of the sources give. Left out is
what needs more than torch and Triton: hf, train, data, the toy world, the tests' tools.

DEEPALIGN_BUILD_NATIVE=0 makes build/torch-cpu/ instead of the native one. `make hub` builds it to
run with glibc 2.28.
"""

from __future__ import annotations

import base64
import hashlib
import json
import pathlib
import platform
import re
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import setup  # noqa: E402

NAME = "deepalign_kernels"
TAKEN = ("__init__", "backends", "check", "rules", "losses", "ops", "reference")
TAKEN += ("triton_kernels",)
TOOLS = ("_offline.py", "_pretend.py", "_sass.py")  # of triton_kernels, for work on the kernels
VERSION = 0  # of the Hub's interface: 0 stands for "may still change"
LICENSE = "Apache-2.0"


def sources() -> list[pathlib.Path]:
    """The Python files that go along."""
    files = [path for name in TAKEN for path in (setup.ROOT / NAME).glob(f"{name}.py")]
    files += [path for name in TAKEN for path in (setup.ROOT / NAME / name).rglob("*.py")]
    return sorted(path for path in files if path.name not in TOOLS)


def namespace(files: list[pathlib.Path]) -> str:
    """A name for the ops of this build that no other build has."""
    digest = hashlib.sha1()
    for path in [*files, *sorted(path for path in setup.CSRC.rglob("*.*") if path.is_file())]:
        digest.update(path.read_bytes())
    return f"_{NAME}_{digest.hexdigest()[:10]}"


def relative(text: str, depth: int) -> str:
    """`text` with relative imports, for a file `depth` folders below the package's own."""
    dots = "." * (depth + 1)
    text = re.sub(rf"^(\s*)from {NAME} import", rf"\1from {dots} import", text, flags=re.M)
    return re.sub(rf"^(\s*)from {NAME}\.", rf"\1from {dots}", text, flags=re.M)


def renamed(text: str, ops: str) -> str:
    """`text` with the ops' namespaces, `deepalign` and `deepalign_native`, replaced."""
    text = text.replace("deepalign_native", f"{ops}_native")
    text = re.sub(r"(?<=torch\.ops\.)deepalign\b", ops, text)
    return re.sub(r'(?<=["\'])deepalign(?=::|["\'])', ops, text)


def write_package(folder: pathlib.Path, files: list[pathlib.Path], ops: str) -> None:
    for path in files:
        place = path.relative_to(setup.ROOT / NAME)
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(renamed(relative(path.read_text(), len(place.parts) - 1), ops))


def write_metadata(folder: pathlib.Path, ops: str, backend: str) -> None:
    """metadata.json beside a variant's files, which it has the digests of."""
    files = sorted(path for path in folder.rglob("*.*") if path.name != "metadata.json")

    def digest(path: pathlib.Path) -> str:
        return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()

    digests = {str(path.relative_to(folder)): digest(path) for path in files}
    about = {"name": NAME.replace("_", "-"), "id": ops, "version": VERSION, "license": LICENSE}
    about |= {"python-depends": [], "backend": {"type": backend}}
    about |= {"digest": {"algorithm": "sha256", "files": digests}}
    (folder / "metadata.json").write_text(json.dumps(about, indent=2) + "\n")


def write_variant(
    folder: pathlib.Path, variant: str, backend: str, files: list[pathlib.Path], ops: str
) -> pathlib.Path:
    place = folder / "build" / variant
    write_package(place, files, ops)
    # where `kernels` before 0.13 looks
    old = place / NAME / "__init__.py"
    old.parent.mkdir()
    old.write_text("from .. import *  # noqa: F403\n")
    write_metadata(place, ops, backend)
    return place


def main(folder: pathlib.Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    files = sources()
    ops = namespace(files)
    write_package(folder / "torch-ext" / NAME, files, ops)
    for backend in ("cuda", "rocm"):
        write_variant(folder, f"torch-{backend}", backend, files, ops)
    if setup.switch("DEEPALIGN_BUILD_NATIVE") == "0":
        write_variant(folder, "torch-cpu", "cpu", files, ops)
    else:
        library, _ = setup.build_cpu(f"{ops}_native")
        abi = "".join(map(str, setup.OLDEST_TORCH))
        system = f"{platform.machine()}-{platform.system().lower()}"
        place = write_variant(folder, f"torch-stable-abi{abi}-cpu-{system}", "cpu", files, ops)
        shutil.copy(library, place / "_native_cpu.so")
        write_metadata(place, ops, "cpu")
    (folder / "benchmarks").mkdir()
    shutil.copy(ROOT / "hub" / "benchmark.py", folder / "benchmarks")
    for name in ("build.toml", "CARD.md"):
        shutil.copy(ROOT / "hub" / name, folder)
    shutil.copy(ROOT / "LICENSE", folder)
    print(f"{folder}: {ops}; {', '.join(sorted(path.name for path in folder.glob('build/*')))}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).resolve())
