"""benchmarks.pieces: it runs, refuses wrong results, and writes what it prints."""

import dataclasses
import json

import pytest
import torch

from benchmarks.studies import pieces
from deepalign_kernels import backends

needs_gemm = pytest.mark.skipif(
    not backends.native_gemm("cpu"), reason="no native library, or no AVX2 in this CPU"
)
pytestmark = [  # its memory is its business, and timed
    pytest.mark.clean_memory,
    pytest.mark.usefixtures("one_thread"),
]


def test_a_quick_run_prints_and_writes_every_line(tmp_path, capsys):
    file = tmp_path / "pieces.json"
    assert pieces.command(["--quick", "--json", str(file)]) == 0
    printed = capsys.readouterr().out.splitlines()
    data = json.loads(file.read_text())
    assert data["format"] == pieces.FORMAT and data["machine"]["commit"] in printed[0]
    assert len(printed) == 2 + len(data["lines"])
    assert {line["piece"] for line in data["lines"]} == {"gemm", "pages", "columns"}
    fields = {f.name for f in dataclasses.fields(pieces.Line)}
    for line in data["lines"]:
        assert line.keys() == fields
        assert 0 < line["p10"] <= line["value"] <= line["p90"] and line["laps"] >= 3
    if backends.native_gemm("cpu"):
        assert [x for x in data["lines"] if x["variant"] == "native bf16 -> fp32"]


@pytest.mark.slow
def test_columns_on_one_thread_and_on_all():
    torch.set_num_threads(2)
    lines = pieces.columns(0.001)
    assert {line.threads for line in lines} == {1, 2} and torch.get_num_threads() == 2
    assert len(lines) == 2 * 2 * 2 * 2  # ops, dtypes, phases


@needs_gemm
def test_a_wrong_product_gets_no_number(monkeypatch):
    right = pieces.native_mm

    def wrong(*operands):
        out = right(*operands)
        out[-1, -1] += 0.01
        return out

    monkeypatch.setattr(pieces, "native_mm", wrong)
    with pytest.raises(AssertionError, match="scores native bf16 -> fp32: 1 of"):
        pieces.gemm(pieces.Shape(16, 40, 24), 0.001)


def test_a_wrong_row_gets_no_number(monkeypatch):
    right = pieces.row_calls

    def wrong(*case):
        call, plain = right(*case)
        return lambda gradient: call(gradient) * (1.001 if gradient else 1), plain

    monkeypatch.setattr(pieces, "row_calls", wrong)
    with pytest.raises(AssertionError, match="token_logp bwd fp32"):
        pieces.columns(0.001)


def test_memory_that_was_not_written_gets_no_number(monkeypatch):
    class Unwilling(torch.Tensor):
        def fill_(self, value):
            return self

    monkeypatch.setattr(pieces, "fresh", lambda *_: torch.zeros(8).as_subclass(Unwilling))
    with pytest.raises(AssertionError, match="expected 1.0 everywhere"):
        pieces.pages(1 << 12, 0.001)


def test_what_it_cannot_run_is_refused(capsys):
    for wrong in (["--only", "gemms"], ["--shape", "16x40"]):
        with pytest.raises(SystemExit):
            pieces.command(["--quick", *wrong])
    assert "expected some of gemm, pages, columns" in capsys.readouterr().err
