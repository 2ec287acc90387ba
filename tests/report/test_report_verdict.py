"""The three sentences: what they may say of which runs."""

from made_runs import N, an_attack

from deepalign_kernels.report import read, verdict

PAPER = {5: 0.421, 10: 0.515, 20: 0.561, 40: 0.570}  # table 3, without k = 0


def test_without_k_0_nothing_is_said_of_a_rise(tmp_path):
    an_attack(tmp_path / "a", "m", PAPER)
    sentence = verdict.sentences(read.read([tmp_path / "a"]))[1]
    assert "no rise" not in sentence and "without a prefix" not in sentence
    assert "of m k = 0 was not measured, so a rise is not known: 58 % [" in sentence
    assert f"at k = 40 (n = {N})" in sentence
    an_attack(tmp_path / "b", "m", {0: 0.0, **PAPER})
    sentence = verdict.sentences(read.read([tmp_path / "b"]))[1]
    assert "m answers 0 % [0, 14] without a prefix and 58 % [" in sentence
    an_attack(tmp_path / "c", "m", {0: 0.5})
    assert "of m only k = 0 was measured: 50 %" in verdict.sentences(read.read([tmp_path / "c"]))[1]


def test_what_does_not_fit_into_a_sentence_is_counted(tmp_path):
    for i in range(6):
        an_attack(tmp_path / f"{i}", f"m{i}", {0: 0.0, 5: 1.0})
    sentence = verdict.sentences(read.read([tmp_path]))[1]
    assert "m3 answers" in sentence and "m4" not in sentence
    assert sentence.endswith("; and 2 more.")
