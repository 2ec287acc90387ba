"""The rules of the house as tests: imports point one way, one stem through every room, a lean
import."""

import ast
import collections
import contextlib
import pathlib
import re
import subprocess
import sys
from typing import get_origin

import pytest
import torch

import deepalign_kernels as dak
from deepalign_kernels import backends

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "deepalign_kernels"
CSRC = ROOT / "csrc"


def table_of_rooms():
    """The table "Rooms" of the architecture page: (room -> rooms it may import, room -> lines)."""
    text = (ROOT / "docs" / "develop" / "architecture.md").read_text()
    may_import, at_most = {}, {}
    for line in re.findall(r"^\| `.*", text.split("## Rooms")[1].split("\n## ")[0], re.M):
        room, _, imports, lines = (cell.strip() for cell in line.strip("|").split("|"))
        room = room.strip("`")
        may_import[room] = None if imports == "all" else set(re.findall("`(.+?)`", imports))
        at_most |= {room: int(lines)} if lines else {}
    return may_import, at_most


MAY_IMPORT, AT_MOST = table_of_rooms()


def room_of(file):
    """The longest name of a room that holds `file`, a path inside the package."""
    parts = file.with_suffix("").parts
    names = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in MAY_IMPORT), parts[0])


def imports_of(file):
    """Rooms that `file` imports from."""
    tree = ast.parse(file.read_text())
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n)]
    for_types = {id(inner) for guard in guards for n in guard.body for inner in ast.walk(n)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{a.name}" for a in node.names]
        else:
            continue
        for first, *parts in (name.split(".") for name in names):
            if first != "deepalign_kernels":
                continue
            while parts and not (PACKAGE / "/".join(parts)).is_dir():
                if (PACKAGE / "/".join(parts)).with_suffix(".py").exists():
                    break
                parts.pop()
            yield room_of(pathlib.Path(*parts)) if parts else "__init__"


def test_imports_point_one_way():
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        inside = file.relative_to(PACKAGE)
        room = room_of(inside)
        assert room in MAY_IMPORT, (
            f"{room}: a new room; say in docs/develop/architecture.md what it may import"
        )
        allowed = MAY_IMPORT if MAY_IMPORT[room] is None else MAY_IMPORT[room] | {room}
        wrong += [f"{inside} -> {x}" for x in imports_of(file) if x not in allowed]
    assert not wrong, wrong


def test_the_table_of_rooms_is_what_is():
    """Each room that it names exists, and imports each room that it may import."""
    used = {room: set() for room in MAY_IMPORT}
    files = collections.Counter()
    for file in PACKAGE.rglob("*.py"):
        room = room_of(file.relative_to(PACKAGE))
        used[room].update(imports_of(file))
        files[room] += 1
    assert set(files) == set(MAY_IMPORT)
    unused = {room: allowed - used[room] for room, allowed in MAY_IMPORT.items() if allowed}
    assert not any(unused.values()), unused


@pytest.mark.parametrize(
    "file,line,right",
    [
        ("report/page.py", "from deepalign_kernels.runs.store import Store", True),
        ("report/page.py", "from deepalign_kernels import hf", False),
        ("attack/finetune.py", "from deepalign_kernels.train import loop", True),
        ("attack/prefill.py", "from deepalign_kernels.train import loop", False),
        ("runs/store.py", "import deepalign_kernels.check", False),
    ],
)
def test_a_wrong_arrow_is_found(file, line, right, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    for name in ("runs/store.py", "train/loop.py", "hf/attach.py", "check.py", file):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(line if name == file else "")
    with contextlib.nullcontext() if right else pytest.raises(AssertionError, match=file):
        test_imports_point_one_way()


def test_rooms_keep_to_their_lines():
    assert len(AT_MOST) > 5
    for room, lines in AT_MOST.items():
        files = [*(PACKAGE / room).rglob("*.py"), *PACKAGE.glob(f"{room}.py")]
        assert sum(len(file.read_text().splitlines()) for file in files) <= lines, room


def test_no_relative_imports():
    for file in PACKAGE.rglob("*.py"):
        levels = [
            n.level for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)
        ]
        assert not any(levels), file


# (op, room) without a kernel: nothing is missing by accident, since the test below wants exactly
# these. On a GPU Triton runs token_entropy.
MISSING = {("token_entropy_fwd", "cuda"), ("token_entropy_bwd", "cuda")}


def test_one_stem_through_every_room():
    missing = set()
    for op, stem in backends.STEMS.items():
        for room in ("reference", "ops/logits"):
            assert (PACKAGE / room / f"{stem}.py").exists(), f"{op}: {room}/{stem}.py"
        kernels = {
            "triton": PACKAGE / "triton_kernels" / f"{stem}.py",
            "cpu": CSRC / "cpu" / f"{stem}.cpp",
            "cuda": CSRC / "cuda" / f"{stem}.cpp",
        }
        for place, file in kernels.items():
            if not file.exists() or op not in file.read_text():
                missing.add((op, place))
    assert missing == MISSING


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
    for name in dak.__all__:  # the aliases of types have their docstring in the file alone
        assert get_origin(getattr(dak, name)) or getattr(dak, name).__doc__, name
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
    for file in (ROOT / "tests").rglob("*.py"):
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


def test_fresh_memory_is_poisoned_and_obeys_a_device():
    assert torch.empty(2).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
    with torch.device("meta"):  # in whatever test of a process the first such block stands
        assert torch.empty(2).is_meta
