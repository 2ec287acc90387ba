"""The rules of the house as tests: imports point one way, one stem through every room, a lean
import."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import deepalign_kernels as dak
from deepalign_kernels import backends

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "deepalign_kernels"
CSRC = ROOT / "csrc"
MAY_IMPORT = {  # room -> the rooms it may import
    "reference": set(),
    "triton_kernels": {"traffic"},
    "traffic": set(),
    "testing": set(),
    "_memory": set(),
    "backends": set(),
    "ops": {"backends"},
    "losses": {"ops"},
    "hf": {"ops", "losses"},
    "train": {"ops", "losses", "hf", "__init__"},
    "toyworld": {"ops", "losses", "hf", "train", "__init__"},
    "__init__": {"backends", "losses", "ops"},
    "__main__": {"backends", "__init__"},
}


def imports_of(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = (
                [f"{node.module}.{a.name}" for a in node.names]
                if node.module == "deepalign_kernels"
                else [node.module]
            )
        else:
            continue
        for name in names:
            parts = (name or "").split(".")
            if parts[0] == "deepalign_kernels":
                known = len(parts) > 1 and (
                    (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists()
                )
                yield parts[1] if known else "__init__"


def test_imports_point_one_way():
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert room in MAY_IMPORT, (
            f"{room}: a new room; say in tests/test_house.py what it may import"
        )
        wrong += [
            f"{file.relative_to(PACKAGE)} -> {x}"
            for x in imports_of(file)
            if x != room and x not in MAY_IMPORT[room]
        ]
    assert not wrong, wrong


def test_no_relative_imports():
    for file in PACKAGE.rglob("*.py"):
        levels = [
            n.level for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)
        ]
        assert not any(levels), file


@pytest.mark.parametrize("op,stem", backends.STEMS.items())
def test_one_stem_through_every_room(op, stem):
    for room in ("reference", "triton_kernels", "ops"):
        assert (PACKAGE / room / f"{stem}.py").exists(), f"{op}: {room}/{stem}.py"
    for room in ("cpu", "cuda"):
        assert (CSRC / room / f"{stem}.cpp").exists(), f"{op}: csrc/{room}/{stem}.cpp"


def included_by(file):
    """The headers of csrc that `file` includes, and those that they include."""
    names = re.findall(r'#include "(\S+)"', file.read_text())
    found = {CSRC / name for name in names if (CSRC / name).exists()}
    return found.union(*map(included_by, found))


def test_a_search_for_a_stem_prints_its_c_plus_plus_too():
    """Every kernel is named after an op, and headers that few ops share say which ones."""
    stems = sorted(set(backends.STEMS.values()))
    kernels = [*(CSRC / "cpu" / "rows").glob("*.cpp"), *(CSRC / "cuda").glob("*.cu")]
    users = {}
    for file in kernels:
        stem = file.stem.removesuffix("_grad") if file.stem not in stems else file.stem
        assert stem in stems and stem in file.read_text(), file
        for header in included_by(file):
            users.setdefault(header, set()).add(stem)
    for header, own in users.items():
        told = header.read_text()
        assert len(own) > 2 or all(stem in told for stem in own), f"{header} of {sorted(own)}"


def test_row_kernels_know_no_torch():
    for file in [*CSRC.glob("cpu/rows/*"), *CSRC.glob("cpu/vec/*"), *CSRC.glob("cuda/*.cu*")]:
        for header in (file, *included_by(file)):
            assert "#include <torch" not in header.read_text(), f"{file}: {header}"


def test_importing_the_package_is_light_and_touches_no_device():
    code = (
        "import sys, torch\n"
        "names = ('transformers', 'triton', 'numpy.f2py', 'matplotlib', 'trl')\n"
        "before = [m for m in names if m in sys.modules]\n"  # whatever torch itself imports
        "import deepalign_kernels\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert [m for m in names if m in sys.modules] == before\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_public_names():
    assert sorted(dak.__all__) == list(dak.__all__)
    for name in dak.__all__:
        assert getattr(dak, name).__doc__, name
    for name in (
        "token_logp",
        "token_kl",
        "constrained_loss",
        "token_stats",
        "BetaSchedule",
        "response_positions",
        "use_backend",
    ):
        assert name in dak.__all__


def test_test_files_share_through_files_of_their_own():
    """A name that another test file needs would vanish when that test moves."""
    for file in (ROOT / "tests").glob("*.py"):
        modules = [
            name
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in [getattr(node, "module", None) or node.names[0].name]
        ]
        assert not [m for m in modules if m.startswith("test_")], file


def test_files_stay_small():
    for file in [*PACKAGE.rglob("*.py"), *CSRC.rglob("*.*")]:
        assert len(file.read_text().splitlines()) <= 450, file
