"""Builds the two native libraries. Everything declarative is in pyproject.toml.

    deepalign_kernels/_native_cpu.so     csrc/*.cpp, csrc/cpu/**
    deepalign_kernels/_native_cuda.so    csrc/cuda/*

Both are plain shared libraries on libtorch's stable ABI, loaded with torch.ops.load_library. No
Python symbols are inside, so one build serves every CPython and every torch >= 2.10. They are two
because the CUDA one needs symbols that a CPU-only torch lacks; those are looked up at load time.

Environment:
    DEEPALIGN_BUILD_NATIVE   auto (default): build what this machine can and say what is missing;
                             0: pure Python and Triton; 1: fail loudly
    DEEPALIGN_BUILD_CUDA     the same for the CUDA library; auto builds it where nvcc is, GPU or not
    DEEPALIGN_CUDA_ARCHS     default "80 90a 100", less what nvcc does not know
    DEEPALIGN_BUILD_TIMEOUT  seconds for one compiler call, default 900
    CXX, CXXFLAGS, NVCC, CUDA_HOME, MAX_JOBS  as usual
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.sdist import sdist
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
WORK = ROOT / "build" / "native"  # objects and logs, kept between builds
PACKAGE = "deepalign_kernels"
NOTE = "_native_build.txt"  # one line per library; backends.py quotes it
OLDEST_TORCH = (2, 10)
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # OLDEST_TORCH for the stable headers
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall"]
ISAS = {  # how csrc/cpu/rows/*.cpp are compiled on x86-64, least demanding first
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    # -w: GCC 12 finds fault with its own AVX-512 intrinsics; the other two have checked the code.
    "avx512": [*"-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -w".split()],
}
GET_COMPILER = (
    "Debian/Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; "
    "macOS: xcode-select --install; or point CXX at one"
)
SWITCHES = ("DEEPALIGN_BUILD_NATIVE", "DEEPALIGN_BUILD_CUDA")


class Unavailable(Exception):
    """A library cannot be built here. The message is one line: what is missing, how to get it."""


@dataclass(frozen=True)
class Step:
    """One compiler or linker call; it runs again when `command` changed or an input is newer."""

    output: Path
    command: list[str]
    inputs: list[Path]

    def beside(self, end: str) -> Path:
        return self.output.with_name(self.output.name + end)

    def run(self) -> None:
        stamp = self.beside(".cmd")
        line = shlex.join(self.command)
        if stamp.exists() and self.output.exists() and stamp.read_text() == line:
            made = stamp.stat().st_mtime
            if all(path.stat().st_mtime <= made for path in self.inputs):
                return
        stamp.unlink(missing_ok=True)
        started = time.time()
        self._call()
        stamp.write_text(line)
        os.utime(stamp, (started, started))  # an input edited meanwhile counts as newer
        print(f"  {self.output.name} ({time.time() - started:.1f} s)", flush=True)

    def _call(self) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        log = self.beside(".log")
        limit = float(os.environ.get("DEEPALIGN_BUILD_TIMEOUT") or 900)
        try:
            with log.open(
                "w"
            ) as sink:  # through a pipe, what a killed nvcc leaves behind would hold us
                done = subprocess.run(
                    self.command, stdout=sink, stderr=subprocess.STDOUT, timeout=limit
                )
        except subprocess.TimeoutExpired as error:
            more = "DEEPALIGN_BUILD_TIMEOUT allows more"
            raise Unavailable(f"{self.output.name} took over {limit:.0f} s; {more}") from error
        said = log.read_text(errors="replace").strip()
        if said:
            print(said, flush=True)
        if done.returncode:
            lines = said.splitlines() or [f"exit status {done.returncode}"]
            first = next((line for line in lines if "error" in line), lines[-1]).strip()
            raise Unavailable(f"{self.command[0]} failed on {self.output.name}: {first}")


def switch(name: str) -> str:
    """Value of one of SWITCHES: "auto", "0" or "1"."""
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "0", "1"):
        raise SetupError(f"{name}={value!r}: expected auto, 0 or 1")
    return value


def jobs() -> int:
    """Compilers to run side by side."""
    wanted = os.environ.get("MAX_JOBS")
    return max(1, int(wanted)) if wanted else max(2, min(4, os.cpu_count() or 2))


def run_all(steps: list[Step]) -> None:
    """Run independent steps side by side; the first failure cancels those not begun."""
    pool = ThreadPoolExecutor(jobs())
    try:
        for future in [pool.submit(step.run) for step in steps]:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def find_compiler() -> list[str]:
    """The C++ compiler's command: CXX, which may hold arguments, or the first that is installed."""
    if os.name != "posix":
        raise Unavailable("native kernels are built on Linux and macOS only")
    wanted = os.environ.get("CXX")
    for candidate in [wanted] if wanted else ["c++", "g++", "clang++"]:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    asked = f"CXX={wanted}" if wanted else "c++, g++ and clang++"
    raise Unavailable(f"no C++ compiler: {asked} not found ({GET_COMPILER})")


def find_nvcc() -> str:
    """Path of nvcc: NVCC, else under CUDA_HOME, else on PATH."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which(os.environ.get("NVCC") or (f"{home}/bin/nvcc" if home else "nvcc"))
    if not found:
        raise Unavailable("no nvcc found (install the CUDA toolkit, or set NVCC or CUDA_HOME)")
    return found


def find_torch() -> Path:
    """Folder of the installed torch. It is not imported: that takes seconds."""
    how = "pip install torch, then pip install --no-build-isolation ."
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(f"no torch to build against in {sys.executable} ({how})")
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise Unavailable(
            f"torch {version} is too old to build against, 2.10 is the oldest ({how})"
        )
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        raise Unavailable(f"torch {version} in {folder} comes without the stable ABI's headers")
    return folder


def headers(other: str) -> list[Path]:
    """Headers that the sources of one library may include: all but those of the `other` one."""
    found = [path for end in ("h", "hpp", "cuh", "inc") for path in CSRC.rglob(f"*.{end}")]
    return [path for path in found if path.parent.name != other]


def native_sources() -> list[str]:
    """Everything in csrc/, relative to this file."""
    return sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*") if path.is_file())


def build_cpu() -> tuple[Path, str]:
    """Compile and link the CPU library. Returns the file and a line that says how it was made."""
    compiler, torch = find_compiler(), find_torch()
    rows = sorted(CSRC.glob("cpu/rows/*.cpp"))
    once = sorted(path for room in ("", "cpu/", "cpu/gemm/") for path in CSRC.glob(f"{room}*.cpp"))
    if not once:
        raise Unavailable(f"no C++ sources in {CSRC}")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = ISAS if x86 else {"portable": []}
    base = [*compiler, *CXX_FLAGS, *DEFINES, *([] if x86 else ["-DDAK_ONLY_PORTABLE"])]
    base += [f"-I{CSRC}", "-isystem", str(torch / "include")]
    base += shlex.split(os.environ.get("CXXFLAGS", ""))
    # This is also the link order, and it matters: of a template that several objects instantiate
    # the linker keeps the first copy, which has to be the one that runs on every machine.
    plan = [(source, "", []) for source in once]
    for isa, flags in isas.items():
        plan += [(source, isa, [f"-DDAK_ISA={isa}", *flags]) for source in rows]
    steps = []
    for source, isa, flags in plan:
        output = WORK / "cpu" / f"{source.parent.name}.{source.stem}{isa and '.' + isa}.o"
        command = [*base, *flags, "-c", str(source), "-o", str(output)]
        steps.append(Step(output, command, [source, *headers("cuda")]))
    run_all(steps)

    library = WORK / "_native_cpu.so"
    objects = [step.output for step in steps]
    if sys.platform == "darwin":
        link = ["-undefined", "dynamic_lookup"]
    else:
        link = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu"]
    command = [*compiler, "-shared", *map(str, objects), "-o", str(library), *link]
    Step(library, command, objects).run()
    return library, f"built with {' '.join(compiler)}: {' '.join(isas)}"


def cuda_archs(nvcc: str) -> list[str]:
    """Architectures to build for, as in "80" or "90a"; what this nvcc does not know is left out."""
    wanted = os.environ.get("DEEPALIGN_CUDA_ARCHS")
    if wanted:
        return wanted.replace(",", " ").replace(";", " ").split()
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, timeout=60)
    known = listed.stdout.split()
    archs = [arch for arch in ("80", "90a", "100") if f"sm_{arch.rstrip('a')}" in known]
    if not archs:
        raise Unavailable(f"{nvcc} knows none of sm_80, sm_90, sm_100 (CUDA 12 or newer is needed)")
    return archs


def build_cuda() -> tuple[Path, str]:
    """Compile and link the CUDA library; needs nvcc but no GPU. Returns what `build_cpu` does."""
    sources = sorted([*CSRC.glob("cuda/*.cu"), *CSRC.glob("cuda/*.cpp")])
    if not any(path.suffix == ".cu" for path in sources):
        raise Unavailable("no CUDA sources in csrc/cuda")
    nvcc, torch = find_nvcc(), find_torch()
    archs = cuda_archs(nvcc)
    host = ["-ccbin", find_compiler()[0]] if os.environ.get("CXX") else []
    base = [nvcc, *host, "-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    base += [*DEFINES, "-DUSE_CUDA", f"-I{CSRC}", "-isystem", str(torch / "include")]
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    code += ["--threads", str(max(1, jobs() // len(sources)))]  # architectures side by side
    oldest = archs[0].rstrip("a")
    code.append(f"-gencode=arch=compute_{oldest},code=compute_{oldest}")  # PTX for GPUs not listed

    steps = []
    for source in sources:
        output = WORK / "cuda" / f"{source.name}.o"
        flags = code if source.suffix == ".cu" else []
        command = [*base, *flags, "-c", str(source), "-o", str(output)]
        steps.append(Step(output, command, [source, *headers("cpu")]))
    run_all(steps)

    library = WORK / "_native_cuda.so"
    objects = [step.output for step in steps]
    # libtorch by name, although nothing is taken from it: in a CUDA build of torch it brings
    # libtorch_cuda, which the torch at hand may lack, into reach of the loader.
    link = ["-shared", "-cudart", "static", f"-L{torch / 'lib'}", "-Xlinker", "--no-as-needed"]
    link += ["-Xlinker", "--exclude-libs=ALL", "-ltorch", "-ltorch_cpu"]
    Step(library, [nvcc, *host, *map(str, objects), "-o", str(library), *link], objects).run()
    return library, f"built with {nvcc}: {' '.join('sm_' + arch for arch in archs)}"


class NativeDistribution(Distribution):
    """Knows, once build_ext has run, whether native code goes into the wheel."""

    native: dict[str, str] | None = None  # library -> line for NOTE; None before the build

    def has_ext_modules(self) -> bool:
        return any(line.startswith("built") for line in (self.native or {}).values())


class Build(build):
    # build_ext decides by itself whether there is something to do.
    sub_commands = [
        (name, None if name == "build_ext" else test) for name, test in build.sub_commands
    ]


class BuildNative(Command):
    """Puts the libraries that can be built, and NOTE, into the package."""

    description = "build the native libraries"
    user_options = [("inplace", "i", "put the libraries beside the Python sources")]
    boolean_options = ["inplace"]
    distribution: NativeDistribution

    def initialize_options(self) -> None:
        self.inplace = False
        self.editable_mode = False
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        if self.distribution.native is not None:  # bdist_wheel asks twice
            return
        target = self._target()
        target.mkdir(parents=True, exist_ok=True)
        native, cuda = (switch(name) for name in SWITCHES)
        lines = {"cpu": self._one(build_cpu, target / "_native_cpu.so", native, SWITCHES[0])}
        if not lines["cpu"].startswith("built"):  # the schemas are registered by the CPU library
            if native != "0" and cuda == "1":
                raise SetupError(f"{SWITCHES[1]}=1, but the CPU library is {lines['cpu']}")
            cuda = "0"
            (target / "_native_cuda.so").unlink(missing_ok=True)
            lines["cuda"] = f"not built: it needs the CPU library, which is {lines['cpu']}"
        elif cuda == "auto" and not list(CSRC.glob("cuda/*.cu")):  # nothing missing, nothing to say
            (target / "_native_cuda.so").unlink(missing_ok=True)
            lines["cuda"] = "not built: no CUDA sources in csrc/cuda"
        else:
            lines["cuda"] = self._one(build_cuda, target / "_native_cuda.so", cuda, SWITCHES[1])
        (target / NOTE).write_text("".join(f"{name}: {line}\n" for name, line in lines.items()))
        self.distribution.native = lines

    def _one(self, make, target: Path, mode: str, name: str) -> str:
        """Build one library into `target`, or leave none there. Returns its line for NOTE."""
        try:
            if mode == "0":
                raise Unavailable(f"switched off by {name}=0")
            library, line = make()
        except Unavailable as error:
            target.unlink(missing_ok=True)  # a stale one would be loaded without a word
            if mode == "1":
                raise SetupError(f"{name}=1, but {target.name} cannot be built: {error}") from error
            print(f"{PACKAGE}: {target.name} is not built: {error}", flush=True)
            return f"not built: {error}"
        if not target.exists() or target.stat().st_mtime != library.stat().st_mtime:
            fresh = target.with_suffix(".new")
            shutil.copy2(library, fresh)
            os.replace(fresh, target)  # processes that have the old one loaded keep it
            print(f"{PACKAGE}: {target.name} {line}", flush=True)
        return line

    def _target(self) -> Path:
        if self.inplace or self.editable_mode:
            return ROOT / PACKAGE
        assert self.build_lib is not None
        return Path(self.build_lib) / PACKAGE

    # What setuptools asks of every step of `build`.

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (*self._target().glob("_native_*.so"), self._target() / NOTE)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return native_sources()


class Wheel(bdist_wheel):
    """py3-none-any without native code, py3-none-<platform> with it: no tie to CPython's ABI."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class SourceArchive(sdist):
    """Takes csrc/ along."""

    def make_distribution(self) -> None:
        self.filelist.extend(native_sources())
        super().make_distribution()


if __name__ == "__main__":  # also how build frontends call it
    setup(
        distclass=NativeDistribution,
        cmdclass={
            "build": Build,
            "build_ext": BuildNative,
            "bdist_wheel": Wheel,
            "sdist": SourceArchive,
        },
    )
