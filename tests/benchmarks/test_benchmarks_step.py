"""A step beside other trainers: each way makes the steps it is timed by, on the same rows."""

import pytest

pytest.importorskip("transformers")

from benchmarks.studies import step

pytestmark = [pytest.mark.clean_memory, pytest.mark.usefixtures("one_thread")]
TINY = {
    "vocab_size": 3000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.slow
def test_every_way_makes_its_steps_and_logits_leave_the_peak(monkeypatch):
    monkeypatch.setitem(step.MODELS, "tiny", ("LlamaConfig", TINY))
    monkeypatch.setitem(step.SIZES, "tiny", (2, 64))
    here = [way for way, setting in step.WAYS if setting == "fp32" and "trl" not in way]
    assert len(here) == 3
    for way in here:
        assert step.one("tiny", way, "fp32", 2, 64, False) > 0
    peaks = {way: step.one("tiny", way, "fp32", 2, 64, True) for way in here}
    logits = 2 * 64 * 3000 * 4  # of which the plain loop holds more than one
    assert peaks["plain loop"] - peaks["this library, sft"] > logits
    assert peaks["this library, constrained"] == pytest.approx(peaks["this library, sft"], rel=0.02)
