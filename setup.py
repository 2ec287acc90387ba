"""Builds the two native libraries. Everything declarative is in pyproject.toml.

    deepalign_kernels/_native_cpu.so     csrc/*.cpp, csrc/cpu/**
    deepalign_kernels/_native_cuda.so    csrc/cuda/*

Both are plain shared libraries on libtorch's stable ABI, loaded with torch.ops.load_library. No
Python symbols are inside, so one build serves every CPython and every torch >= 2.10. They are two
because the CUDA one needs symbols that a CPU-only torch lacks; those are looked up at load time.
Ninja compiles what changed since the last build, headers included.

Environment:
    DEEPALIGN_BUILD_NATIVE   auto (default): build what this machine can and say what is missing;
                             0: pure Python and Triton; 1: fail loudly
    DEEPALIGN_BUILD_CUDA     the same for the CUDA library; auto builds it where nvcc and a GPU are
    DEEPALIGN_CUDA_ARCHS     default "80 90a 100", less what nvcc does not know
    CXX, CXXFLAGS, LDFLAGS, NVCC, CUDA_HOME, MAX_JOBS  as usual; CXXFLAGS also links
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    have = f"setuptools {setuptools.__version__} is too old to build with"
    sys.exit(f"deepalign_kernels: {have}, 77 is the oldest: pip install 'setuptools>=77'")

from setuptools import Command, Distribution, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build import build  # noqa: E402
from setuptools.errors import SetupError  # noqa: E402

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
WORK = ROOT / "build" / "native"  # objects and ninja's files, kept between builds
PACKAGE = "deepalign_kernels"
NOTE = "_native_build.txt"  # one line per library; backends.py quotes it
OLDEST_TORCH = (2, 10)
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # OLDEST_TORCH for the stable headers
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall"]
ISAS = {  # how csrc/cpu/{rows,panels}/*.cpp are compiled on x86-64, least demanding first
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    # -w: GCC 12 finds fault with its own AVX-512 intrinsics; the other two have checked the code.
    "avx512": [*"-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -w".split()],
}
GET_COMPILER = (
    "Debian/Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; "
    "macOS: xcode-select --install; or point CXX at one"
)
RULES = """
rule compile
  command = $call -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $of
rule link
  command = $call -o $out
  description = $of
"""
GPUS = ("/dev/nvidiactl", "/dev/dxg")  # Linux, WSL
SWITCHES = ("DEEPALIGN_BUILD_NATIVE", "DEEPALIGN_BUILD_CUDA")


class Unavailable(Exception):
    """A library cannot be built here. The message is one line: what is missing, how to get it."""


@dataclass(frozen=True)
class Compiled:
    """An object file, and the compiler call that makes it."""

    source: Path
    output: Path
    command: list[str]


def switch(name: str) -> str:
    """Value of one of SWITCHES: "auto", "0" or "1"."""
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "0", "1"):
        raise SetupError(f"{name}={value!r}: expected auto, 0 or 1")
    return value


def flags(name: str) -> list[str]:
    """What the user has put into CXXFLAGS or LDFLAGS."""
    return shlex.split(os.environ.get(name, ""))


def call(command: list[str]) -> None:
    """Run a compiler or ninja, showing what it says.

    Raises:
        Unavailable: it failed; the message is its first line with "error".
    """
    pipe, said = subprocess.PIPE, []
    with subprocess.Popen(
        command, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            if not line.startswith("ninja: no work"):
                print(line, end="", flush=True)
            said.append(line.strip())
    if process.returncode:
        said = [line for line in said if line] or [f"exit status {process.returncode}"]
        first = next((line for line in said if "error" in line), said[-1])
        raise Unavailable(f"{Path(command[0]).name} failed: {first}")


def find_ninja() -> str:
    """Path of ninja: where pip puts it beside this Python, or on PATH."""
    places = (sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath))
    found = shutil.which("ninja", path=os.pathsep.join(places))
    if not found:
        raise Unavailable("no ninja found (pip install ninja)")
    return found


def link(library: Path, objects: list[Compiled], command: list[str]) -> None:
    """Bring `library` up to date: compile what is not, then call `command`."""

    def path(x: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(x))

    def step(output: Path, rule: str, inputs: list[Path], call: list[str]) -> str:
        line = f"build {path(output)}: {rule} {' '.join(map(path, inputs))}"
        return f"{line}\n  call = {shlex.join(call).replace('$', '$$')}\n  of = {output.name}\n"

    steps = [step(x.output, "compile", [x.source], x.command) for x in objects]
    steps.append(step(library, "link", [x.output for x in objects], command))
    plan = library.with_suffix(".ninja")
    plan.parent.mkdir(parents=True, exist_ok=True)
    plan.write_text(f"builddir = {path(plan.parent)}\n{RULES}{''.join(steps)}")
    jobs = os.environ.get("MAX_JOBS")
    call([find_ninja(), "-f", str(plan), *(["-j", jobs] if jobs else [])])


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
    """Folder of the installed torch. It is not imported: that takes seconds.

    pip hides the environment it installs into from an isolated build, torch with it; that Python's
    own folder still tells where it is. Any torch will do: see the stable ABI above.
    """
    how = "pip install torch, then pip install --no-build-isolation ."
    spec = importlib.util.find_spec("torch")
    found = spec.submodule_search_locations if spec else None
    folder = Path(found[0] if found else Path(sysconfig.get_path("platlib")) / "torch")
    if not (folder / "version.py").exists():
        raise Unavailable(f"no torch to build against in {sys.executable} ({how})")
    version = re.findall(r"__version__ = '(.*)'", (folder / "version.py").read_text())[0]
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise Unavailable(
            f"torch {version} is too old to build against, 2.10 is the oldest ({how})"
        )
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        raise Unavailable(f"torch {version} in {folder} comes without the stable ABI's headers")
    return folder


def build_cpu(namespace: str = "deepalign_native") -> tuple[Path, str]:
    """Compile and link the CPU library, its ops registered in torch.ops.NAMESPACE.

    Returns: the file, and a line that says how it was made.
    """
    compiler, torch = find_compiler(), find_torch()
    rows = sorted([*CSRC.glob("cpu/rows/*.cpp"), *CSRC.glob("cpu/panels/*.cpp")])
    once = sorted([*CSRC.glob("cpu/*.cpp"), *CSRC.glob("cpu/gemm/*.cpp")])
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = ISAS if x86 else {"portable": []}
    base = [*compiler, *CXX_FLAGS, *DEFINES, *([] if x86 else ["-DDAK_ONLY_PORTABLE"])]
    base += [f"-I{CSRC}", "-isystem", str(torch / "include"), *flags("CXXFLAGS")]
    # This is also the link order, and it matters: of a template that several objects instantiate
    # the linker keeps the first copy, which has to be the one that runs on every machine.
    plan = [(source, "", []) for source in once]
    for isa, options in isas.items():
        plan += [(source, f".{isa}", [f"-DDAK_ISA={isa}", *options]) for source in rows]
    registers = Compiled(
        CSRC / "bindings.cpp",
        WORK / "cpu" / f"{namespace}.o",
        [*base, f"-DDAK_NAMESPACE={namespace}"],
    )
    objects = [registers]
    for source, isa, options in plan:
        output = WORK / "cpu" / f"{source.parent.name}.{source.stem}{isa}.o"
        objects.append(Compiled(source, output, [*base, *options]))
    if sys.platform == "darwin":
        libraries = ["-undefined", "dynamic_lookup"]
    else:
        libraries = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu"]
    command = [*compiler, "-shared", *flags("CXXFLAGS"), *(str(x.output) for x in objects)]
    library = WORK / "cpu" / f"{namespace}.so"
    link(library, objects, [*command, *libraries, *flags("LDFLAGS")])
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


def build_cuda(asked: bool, cpu: str) -> tuple[Path, str]:
    """Compile and link the CUDA library: if `asked`, GPU or not. Returns what `build_cpu` does."""
    if not cpu.startswith("built"):  # the schemas are registered by the CPU library
        raise Unavailable(f"it needs the CPU library, which is {cpu}")
    if not list(CSRC.glob("cuda/*.cu")):
        raise Unavailable("no CUDA sources in csrc/cuda")
    if not asked and not any(Path(device).exists() for device in GPUS):
        raise Unavailable(f"no NVIDIA GPU here ({SWITCHES[1]}=1 builds it all the same)")
    sources = sorted([*CSRC.glob("cuda/*.cu"), *CSRC.glob("cuda/*.cpp")])
    nvcc, torch = find_nvcc(), find_torch()
    archs = cuda_archs(nvcc)
    host = ["-ccbin", find_compiler()[0]] if os.environ.get("CXX") else []
    base = [nvcc, *host, "-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    base += [*DEFINES, "-DUSE_CUDA", f"-I{CSRC}", "-isystem", str(torch / "include")]
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    oldest = archs[0].rstrip("a")
    code.append(f"-gencode=arch=compute_{oldest},code=compute_{oldest}")  # PTX for GPUs not listed

    objects = []
    for source in sources:
        command = [*base, *code] if source.suffix == ".cu" else base
        objects.append(Compiled(source, WORK / "cuda" / f"{source.name}.o", command))
    # libtorch by name, although nothing is taken from it: in a CUDA build of torch it brings
    # libtorch_cuda, which the torch at hand may lack, into reach of the loader.
    command = [nvcc, *host, "-shared", "-cudart", "static", *(str(x.output) for x in objects)]
    command += [f"-L{torch / 'lib'}", "-Xlinker", "--no-as-needed"]
    command += ["-Xlinker", "--exclude-libs=ALL", "-ltorch", "-ltorch_cpu"]
    library = WORK / "cuda" / "_native_cuda.so"
    link(library, objects, command)
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
        cpu = self._one(build_cpu, target / "_native_cpu.so", native, SWITCHES[0])
        make = functools.partial(build_cuda, cuda == "1", cpu)
        mode, name = (native, SWITCHES[0]) if native == "0" else (cuda, SWITCHES[1])
        lines = {"cpu": cpu, "cuda": self._one(make, target / "_native_cuda.so", mode, name)}
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
        return []  # MANIFEST.in names them


class Wheel(bdist_wheel):
    """py3-none-any without native code, py3-none-<platform> with it: no tie to CPython's ABI."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


if __name__ == "__main__":  # also how build frontends call it
    setup(
        distclass=NativeDistribution,
        cmdclass={"build": Build, "build_ext": BuildNative, "bdist_wheel": Wheel},
    )
