"""The rules of the house as tests: imports point one way, one stem through every room, a lean
import."""

import ast
import pathlib
import subprocess
import sys

import deepalign_kernels as dak
from deepalign_kernels import backends

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "deepalign_kernels"
MAY_IMPORT = {  # room -> the rooms it may import
    "rules": set(),
    "reference": {"rules"},
    "triton_kernels": {"traffic"},
    "traffic": set(),
    "testing": set(),
    "_memory": set(),
    "backends": set(),
    "check": {"backends"},
    "modes": set(),
    "ops": {"backends", "check", "ops/logits", "ops/linear"},
    "ops/shard": {"check"},
    "ops/logits": {"backends", "check", "ops", "ops/shard", "rules"},
    "ops/linear": {"backends", "check", "ops", "ops/logits", "ops/shard", "rules"},
    "losses": {"check", "ops"},
    "hf": {"check", "modes", "ops", "losses", "rules"},
    "data": {"check"},
    "train": {"check", "data", "modes", "ops", "losses", "hf", "rules", "__init__"},
    "toyworld": {"data", "ops", "losses", "hf", "train", "__init__"},
    "__init__": {"backends", "check", "losses", "ops"},
    "__main__": {"backends", "__init__"},
}


def room_of(file):
    """The longest name of a room that holds `file`, a path inside the package."""
    parts = file.with_suffix("").parts
    names = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in MAY_IMPORT), parts[0])


def imports_of(file):
    """Rooms that `file` imports from."""
    for node in ast.walk(ast.parse(file.read_text())):
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
            f"{room}: a new room; say in tests/test_house.py what it may import"
        )
        wrong += [
            f"{inside} -> {x}" for x in imports_of(file) if x not in MAY_IMPORT[room] | {room}
        ]
    assert not wrong, wrong


def test_no_relative_imports():
    for file in PACKAGE.rglob("*.py"):
        levels = [
            n.level for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)
        ]
        assert not any(levels), file


# Ops that came with their specification first: (op, room) without a kernel yet. Take out what is
# written; nothing new is left here by accident, since the test below wants exactly these.
MISSING: set[tuple[str, str]] = set()


def test_one_stem_through_every_room():
    missing = set()
    for op, stem in backends.STEMS.items():
        for room in ("reference", "ops/logits"):
            assert (PACKAGE / room / f"{stem}.py").exists(), f"{op}: {room}/{stem}.py"
        kernels = {f"triton_kernels/{stem}.py": "triton_kernels", f"cpu/{stem}.cpp": "csrc/cpu"}
        for file, room in kernels.items():
            path = (PACKAGE if room == "triton_kernels" else ROOT / "csrc") / file
            if not path.exists() or op not in path.read_text():
                missing.add((op, room))
    assert missing == MISSING


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
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "csrc").rglob("*.*")]:
        assert len(file.read_text().splitlines()) <= 450, file
