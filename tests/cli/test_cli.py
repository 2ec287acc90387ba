"""The `deepalign` command: finds a command, reads a file and flags, says what is wrong."""

import dataclasses
import logging
import sys
import types
from typing import Literal

import pytest

from deepalign_kernels.cli import main as cli
from deepalign_kernels.report import command as report


@dataclasses.dataclass(frozen=True)
class Beta:
    first: float = 0.5
    rest: float = 0.1


@dataclasses.dataclass(frozen=True)
class Options:
    """Train it."""

    model: str
    learning_rate: float = 2e-5
    objective: Literal["constrained", "sft"] = "constrained"
    save: bool = True
    depths: tuple[int, ...] = (5, 10)
    limit: int | None = 3
    beta: Beta = Beta()
    weights: dict[str, float] = dataclasses.field(default_factory=dict)


@pytest.fixture
def ran(monkeypatch):
    """Options that the command `toy`, and `data show`, were run with."""
    seen = []
    toy = types.ModuleType("toy_command")
    toy.Options, toy.run = Options, lambda options: seen.append(options)
    monkeypatch.setitem(sys.modules, "toy_command", toy)
    for name in ("toy", "data show"):
        monkeypatch.setitem(cli.COMMANDS, name, ("toy_command", "nothing"))
    return seen


def test_flags_win_over_the_file(ran, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: a b\nlearning_rate: 1e-4\nsave: false\ndepths: [1, 2]\nlimit: null\n"
        "beta:\n  rest: 0.2\nweights: {x: 1, y: 0.5}\n"
    )
    assert cli.main(["toy", "--config", str(file), "--learning-rate", "1e-3", "--depths", "7"]) == 0
    weights = {"x": 1.0, "y": 0.5}
    expected = Options("a b", 1e-3, "constrained", False, (7,), None, Beta(rest=0.2), weights)
    assert ran == [expected]
    assert cli.main(["data", "show", f"--config={file}", "--save", "--depths"]) == 0
    assert ran[1] == dataclasses.replace(expected, learning_rate=1e-4, save=True, depths=())


def test_a_file_names_what_stands_without_a_flag(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr("deepalign_kernels.report.command.run", seen.append)
    file = tmp_path / "report.yaml"
    file.write_text("runs: [a b, c]\ntitle: T\n")
    assert cli.main(["report", "--config", str(file), "--out", "x.html"]) == 0
    assert cli.main(["report", "d", f"--config={file}"]) == 0  # words win, as flags do
    assert [(o.runs, o.title, o.out) for o in seen] == [
        (("a b", "c"), "T", "x.html"),
        (("d",), "T", "report.html"),
    ]
    assert isinstance(seen[0], report.Options)
    monkeypatch.undo()
    file.write_text("title: T\n")
    assert cli.main(["report", "--config", str(file)]) == 2
    assert "runs: expected at least one folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text,said",
    [
        (
            "model: a\nlearning_rte: 1\n",
            "2: learning_rte is no option; did you mean 'learning_rate'?",
        ),
        ("model: a\nbeta:\n  frist: 1\n", "3: beta.frist is no option; did you mean 'beta.first'?"),
        ("- model\n", "r.yaml: a list, expected keys and values"),
        ("model: [\n", "r.yaml: not YAML"),
    ],
)
def test_a_wrong_file(ran, tmp_path, capsys, text, said):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    assert cli.main(["toy", "--config", str(file)]) == 2
    assert said in capsys.readouterr().err and not ran


@pytest.mark.parametrize(
    "words,said",
    [
        (["tyo"], "'tyo' is no command; did you mean 'toy'?"),
        (["data", "shwo"], "deepalign data: say which of data show"),
        (["zzz"], "commands: "),
        (["toy", "--config", "/nowhere.yaml"], "/nowhere.yaml: No such file"),
    ],
)
def test_wrong_words(ran, capsys, words, said):
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err and not ran


def test_a_wrong_flag_names_the_nearest(ran, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["toy", "--model", "a", "--learning-rte", "1"])
    assert "--learning-rate" in capsys.readouterr().err


def test_how_a_command_ends(ran, monkeypatch, capsys):
    def ends(error):
        monkeypatch.setattr(
            sys.modules["toy_command"], "run", lambda options: (_ for _ in ()).throw(error)
        )
        return cli.main(["toy", "--model", "a"]), capsys.readouterr().err  # fmt: skip

    assert ends(ValueError("k: 0, expected 1 or more")) == (2, "error: k: 0, expected 1 or more\n")
    assert ends(KeyboardInterrupt()) == (130, "interrupted\n")
    status, said = ends(ModuleNotFoundError("No module named 'datasets'", name="datasets"))
    assert status == 2 and "pip install" in said
    with pytest.raises(ZeroDivisionError):  # ours, not the user's: with its traceback
        ends(ZeroDivisionError())


def test_help_says_what_an_option_is_once(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert shown.count("steps between checkpoints, one more at the end") == 1


def test_info_and_help(capsys):
    assert cli.main(["info"]) == 0 and "native cpu" in capsys.readouterr().out
    assert cli.main([]) == 0 and "  info  " in capsys.readouterr().out
    assert cli.main(["--version"]) == 0


def test_noise_of_other_packages_is_left_out_and_nothing_else(caplog):
    for name, left_out in (
        ("torchao", "Failed to load /some/where/_C.so: no CUDA"),
        ("torch.utils._pytree", "<enum 'Kind'> is an Enum subclass and is now natively supported"),
    ):
        logging.getLogger(name).warning(left_out)
        logging.getLogger(name).warning("something of use")
    assert [r.message for r in caplog.records] == ["something of use"] * 2
