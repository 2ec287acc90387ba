"""Counts of instructions (callgrind), recorded and compared."""

import json

import pytest

from benchmarks.offline import instructions


def test_changed_counts_are_listed():
    before = {"a f32": 10.0, "b f32": 10.0, "c f32": 10.0, "gone f32": 1.0}
    after = {"a f32": 10.1, "b f32": 10.3, "c f32": 9.7, "new f32": 1.0}
    assert [(line[0], line[3]) for line in instructions.changes(before, after)] == [
        ("b f32", "1.030x"),
        ("c f32", "0.970x"),
        ("gone f32", "-"),
        ("new f32", "-"),
    ]


@pytest.mark.slow
@pytest.mark.skipif(instructions.missing() is not None, reason=str(instructions.missing()))
def test_instructions_are_counted_and_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(instructions, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(instructions, "TYPES", ("bf16",))
    assert instructions.main(True, lambda text: None) == 0
    record = json.loads(instructions.RECORD.read_text())
    assert 1 < record["counts"]["token_logp/fwd bf16"] < 20
    forward, stats = (record["counts"][f"{n}/fwd bf16"] for n in ("token_logp", "token_stats"))
    assert stats > 2 * forward
    record["counts"]["token_logp/fwd bf16"] /= 1.1
    instructions.RECORD.write_text(json.dumps(record))
    assert instructions.main(False, lambda text: None) == 1
    assert "1.1" in capsys.readouterr().out.splitlines()[-1]
