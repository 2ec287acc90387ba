"""Building and installing: what is in the wheel, its tag, what is said where tools are missing."""

from __future__ import annotations

import ctypes
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
import setuptools

from deepalign_kernels import backends

ROOT = pathlib.Path(__file__).resolve().parents[1]
NO_COMPILER = "/nonexistent/c++"
HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
KERNEL = """
#include "probe.h"
#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
extern "C" __attribute__((visibility("default"))) int JOIN(probe_, DAK_ISA)() { return PROBE; }
"""


SEEN_BY_AN_ISOLATED_BUILD = """
import sys
sys.path[:] = [path for path in sys.path if "site-packages" not in path]
"""


@pytest.fixture
def checkout(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of what a build reads, with one tiny native kernel in place of csrc/."""
    copy = tmp_path / "checkout"
    built = shutil.ignore_patterns("_native_*", "__pycache__")
    shutil.copytree(ROOT / "deepalign_kernels", copy / "deepalign_kernels", ignore=built)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    rows = copy / "csrc" / "cpu" / "rows"
    rows.mkdir(parents=True)
    (copy / "csrc" / "bindings.cpp").write_text('extern "C" int probe_binding() { return 0; }\n')
    (rows / "probe.cpp").write_text(KERNEL)
    (rows / "probe.h").write_text("#define PROBE 7\n")
    return copy


def call(folder: pathlib.Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND` in `folder` with none of the build's variables set but `variables`."""
    ours = ("CXX", "CXXFLAGS", "LDFLAGS", "NVCC", "CUDA_HOME", "MAX_JOBS")
    kept = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("DEEPALIGN_")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**kept, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def isolated(folder: pathlib.Path) -> str:
    """PYTHONPATH of a build that sees setuptools and no other package, as pip makes it."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SEEN_BY_AN_ISOLATED_BUILD)
    for part in pathlib.Path(setuptools.__file__).parents[1].glob("setuptools*"):
        (folder / part.name).symlink_to(part)  # its metadata too, for its version
    return str(folder)


def wheel(folder: pathlib.Path, **variables: str) -> subprocess.CompletedProcess[str]:
    offline = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    return call(folder, "-m", "pip", "wheel", ".", "-v", *offline, "-w", "out", **variables)


def contents(folder: pathlib.Path) -> tuple[str, set[str], str]:
    """Tag of the one wheel in folder/out, its native libraries, and its build note."""
    (path,) = (folder / "out").glob("*.whl")
    tag = path.stem.split("-", 2)[2]
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert "deepalign_kernels/py.typed" in names
        note = archive.read("deepalign_kernels/_native_build.txt").decode()
    return tag, {pathlib.Path(name).name for name in names if name.endswith(".so")}, note


@pytest.mark.slow
def test_switched_off_the_wheel_is_pure(checkout: pathlib.Path) -> None:
    built = wheel(checkout, DEEPALIGN_BUILD_NATIVE="0")
    assert built.returncode == 0, built.stdout
    tag, libraries, note = contents(checkout)
    assert (tag, libraries) == ("py3-none-any", set())
    assert "cpu: not built: switched off by DEEPALIGN_BUILD_NATIVE=0" in note


@pytest.mark.slow
def test_auto_without_a_compiler_says_so_and_goes_on(checkout: pathlib.Path) -> None:
    built = wheel(checkout, CXX=NO_COMPILER)
    assert built.returncode == 0, built.stdout
    tag, libraries, note = contents(checkout)
    assert (tag, libraries) == ("py3-none-any", set())
    for text in (built.stdout, note):
        assert f"no C++ compiler: CXX={NO_COMPILER} not found" in text
        assert "apt-get install g++" in text


@pytest.mark.slow
def test_required_without_a_compiler_fails_and_names_it(checkout: pathlib.Path) -> None:
    built = wheel(checkout, CXX=NO_COMPILER, DEEPALIGN_BUILD_NATIVE="1")
    assert built.returncode != 0
    assert NO_COMPILER in built.stdout
    assert not list(checkout.glob("out/*.whl"))


@pytest.mark.parametrize("name", ["DEEPALIGN_BUILD_NATIVE", "DEEPALIGN_BUILD_CUDA"])
def test_a_bad_value_fails_and_names_the_variable(checkout: pathlib.Path, name: str) -> None:
    built = call(checkout, "setup.py", "build_ext", "--inplace", **{name: "yes"})
    assert built.returncode != 0
    assert f"{name}='yes': expected auto, 0 or 1" in built.stdout


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
@pytest.mark.slow
def test_native_wheel_is_for_the_platform_and_any_python(checkout: pathlib.Path) -> None:
    built = wheel(checkout, DEEPALIGN_BUILD_NATIVE="1")
    assert built.returncode == 0, built.stdout
    tag, libraries, note = contents(checkout)
    assert tag.startswith("py3-none-") and not tag.endswith("-any")
    assert libraries == {"_native_cpu.so"}
    assert "cpu: built with " in note and "cuda: not built: no CUDA sources" in note


def test_cuda_is_left_alone_where_no_gpu_is(checkout: pathlib.Path) -> None:
    if any(pathlib.Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
        pytest.skip("a GPU is here")
    (checkout / "csrc" / "cuda").mkdir()
    (checkout / "csrc" / "cuda" / "probe.cu").write_text("not CUDA\n")
    command = ("setup.py", "build_ext", "--inplace")
    assert "no NVIDIA GPU here" in call(checkout, *command, NVCC=sys.executable).stdout
    asked = call(checkout, *command, NVCC=sys.executable, DEEPALIGN_BUILD_CUDA="1")
    assert asked.returncode != 0 and "_native_cuda.so cannot be built" in asked.stdout


def test_an_old_setuptools_is_told_in_one_line(checkout: pathlib.Path) -> None:
    (checkout / "old").mkdir()
    (checkout / "old" / "setuptools.py").write_text('__version__ = "65.5.0"\n')
    built = call(checkout, "setup.py", "--version", PYTHONPATH=str(checkout / "old"))
    assert built.returncode != 0 and len(built.stdout.splitlines()) == 1
    assert "setuptools 65.5.0 is too old" in built.stdout and "pip install" in built.stdout


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_inplace_build_has_every_isa_and_repeats_only_what_changed(checkout: pathlib.Path) -> None:
    command = ("setup.py", "build_ext", "--inplace")
    hidden = isolated(checkout / "isolated")  # torch as well, which is found all the same
    first = call(checkout, *command, DEEPALIGN_BUILD_NATIVE="1", PYTHONPATH=hidden)
    assert first.returncode == 0, first.stdout
    library = checkout / "deepalign_kernels" / "_native_cpu.so"
    isas = (
        first.stdout.split("_native_cpu.so built with ")[1].splitlines()[0].split(": ")[1].split()
    )
    assert isas[0] == "portable"
    loaded = ctypes.CDLL(str(library))
    assert [getattr(loaded, f"probe_{isa}")() for isa in isas] == [7] * len(isas)

    again = call(checkout, *command, DEEPALIGN_BUILD_NATIVE="1")
    assert again.returncode == 0 and "[1/" not in again.stdout
    (checkout / "csrc" / "cpu" / "rows" / "probe.h").write_text("#define PROBE 8\n")
    changed = call(checkout, *command, DEEPALIGN_BUILD_NATIVE="1")
    assert changed.returncode == 0 and "rows.probe.portable.o" in changed.stdout
    assert "bindings" not in changed.stdout  # it does not include the header


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_code_that_does_not_compile_leaves_no_stale_library(checkout: pathlib.Path) -> None:
    command = ("setup.py", "build_ext", "--inplace")
    assert call(checkout, *command, DEEPALIGN_BUILD_NATIVE="1").returncode == 0
    (checkout / "csrc" / "bindings.cpp").write_text("not C++\n")
    auto = call(checkout, *command)
    assert auto.returncode == 0 and "_native_cpu.so is not built" in auto.stdout
    assert not (checkout / "deepalign_kernels" / "_native_cpu.so").exists()
    assert call(checkout, *command, DEEPALIGN_BUILD_NATIVE="1").returncode != 0


@pytest.mark.slow
def test_module_prints_a_row_for_each_op() -> None:
    shown = call(ROOT, "-m", "deepalign_kernels")
    assert shown.returncode == 0, shown.stdout
    rows = {
        line.split()[0]: line.split()[1] for line in shown.stdout.splitlines() if line[:1].isalpha()
    }
    for op in backends.OPS:
        assert rows[op] in backends.BACKENDS
    for label in ("torch:", "triton:", "native"):
        assert label in rows


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout of git")
def test_the_source_archive_has_every_file_of_git_and_building_it_warns_of_nothing(
    tmp_path: pathlib.Path,
) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tests" / "__pycache__").mkdir()
    (tmp_path / "tests" / "__pycache__" / "conftest.pyc").touch()
    (tmp_path / "deepalign_kernels" / "_native_cpu.so").touch()
    made = call(tmp_path, "setup.py", "egg_info")
    assert made.returncode == 0 and "warning" not in made.stdout, made.stdout
    (sources,) = tmp_path.glob("*.egg-info/SOURCES.txt")
    here_alone = (".github/", ".gitignore", ".pre-commit-config.yaml")  # of no use in an archive
    wanted = {name for name in files if not name.startswith(here_alone)}
    got = {name for name in sources.read_text().splitlines() if ".egg-info/" not in name}
    assert got - {"setup.cfg"} == wanted
