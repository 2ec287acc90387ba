"""The microbenchmark of one GCG step: its values, what its gate refuses, what it writes."""

import json
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("transformers", reason="benchmarks.gcg needs transformers")

import torch
from transformers import LlamaForCausalLM

from benchmarks.studies import gcg, gcg_job

ROOT = pathlib.Path(__file__).parents[2]
SMALL = "--quick --device cpu --model 64x2x211 --candidates 5 --prompt 6 --suffix 4 --target 3"
PARTS = ("gradient", "score", "score cached")
pytestmark = [pytest.mark.clean_memory, pytest.mark.usefixtures("one_thread")]


def flags(more=""):
    return [*SMALL.split(), *more.split()]


@pytest.fixture
def job():
    return gcg_job.make_job(gcg.arguments(flags()))


def in_fp64(job):
    """(losses [B], gradient [suffix, V]) of a copy of the model in fp64, written down once more."""
    model = LlamaForCausalLM(job.model.config).double().eval()
    model.load_state_dict(job.model.state_dict())
    table = model.model.embed_tokens.weight.detach()
    one_hot = torch.nn.functional.one_hot(job.ids, len(table)).double().requires_grad_()
    scores = model(inputs_embeds=one_hot @ table).logits
    losses = torch.zeros(len(job.ids), dtype=torch.float64)
    length = job.ids.shape[1]
    for position in range(length - job.target, length):
        row = scores[:, position - 1]
        picked = row[torch.arange(len(row)), job.ids[:, position]]
        losses = losses + (row.exp().sum(1).log() - picked) / job.target
    (gradient,) = torch.autograd.grad(losses[0], one_hot)
    return losses.detach(), gradient[0, job.prompt : length - job.target]


@pytest.mark.parametrize("name", gcg_job.WAYS)
def test_every_way_agrees_with_fp64(job, name):
    way, (losses, gradient) = gcg_job.WAYS[name], in_fp64(job)
    assert losses.std() > 1e-2  # the suffix matters
    for cached in (False, True):
        for batch in (2, 5):  # two sub-batches and a rest; one
            got = job.score(way, batch, cached)
            torch.testing.assert_close(got.double(), losses, rtol=1e-5, atol=0)
    got = job.gradient(way)
    error = (got.double() - gradient).abs().max() / gradient.abs().max()
    assert got.shape == (4, 211) and error < 1e-5


def test_truth_of_the_gate(job):
    """What the ways are held against is itself right, and the body's fp32 is all its error."""
    losses, gradient = in_fp64(job)
    torch.testing.assert_close(job.score(gcg_job.by_fp64, 5), losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        job.gradient(gcg_job.by_fp64).double(), gradient, rtol=1e-4, atol=1e-6
    )


def test_the_prefix_does_not_grow(job):
    for _ in range(2):
        job.score(gcg_job.by_logits, 5, cached=True)
        assert job.prefix.get_seq_length() == 6
        assert [len(layer.keys) for layer in job.prefix.layers] == [1, 1]


def one_late(model, inputs, wanted):
    """The row of each token instead of the one that predicts it."""
    logits = model(**inputs).logits[:, -wanted.shape[1] :].float()
    return gcg_job.nll(logits, wanted)


def swapped(model, inputs, wanted):
    """Right values, two candidates exchanged."""
    return gcg_job.by_logits(model, inputs, wanted).roll(1)


def scaled(model, inputs, wanted):
    """The sum for the mean: the ranking is right, the gradient three times too long."""
    return gcg_job.by_dak(model, inputs, wanted) * wanted.shape[1]


@pytest.mark.parametrize("wrong,dtype", [(one_late, "fp32"), (swapped, "bf16"), (scaled, "fp32")])
@pytest.mark.parametrize("name", gcg_job.WAYS)
def test_a_wrong_way_is_refused(monkeypatch, capsys, name, wrong, dtype):
    monkeypatch.setitem(gcg.WAYS, name, wrong)
    monkeypatch.setattr(
        gcg.measure, "interleave", lambda runners, *_, **__: [r.run("cpu", 1) for r in runners]
    )
    status = gcg.command(flags(f"--dtype {dtype}"))
    assert status == (1 if name == "dak" else 0)  # only our own failure is the benchmark's
    refused = [line for line in capsys.readouterr().out.splitlines() if "refused" in line]
    assert {line.split("  ")[0] for line in refused} >= {"score", "score cached"}
    assert all(f" {name} " in line for line in refused)
    assert len(refused) == 2 if wrong is swapped else 3  # one gradient cannot be exchanged


@pytest.mark.parametrize("name,refused", [("dak", True), ("logits", False)])
def test_our_own_result_has_the_tighter_bound(monkeypatch, name, refused):
    """5e-6 off, in fp32: what others may lose is no excuse for this library."""
    way = gcg.WAYS[name]
    monkeypatch.setitem(gcg.WAYS, name, lambda *inputs: way(*inputs) * (1 + 5e-6))
    args = gcg.arguments(flags())
    rows = gcg.run_part("score", gcg_job.make_job(args), args)
    assert [r.way for r in rows if r.failed] == [name] * refused


def test_nan_is_refused():
    good = torch.ones(3)
    with pytest.raises(gcg.gate.Refused, match="relative error"):
        gcg.held(torch.tensor([1.0, float("nan"), 1.0]), good.double(), good, 1e-3)
    with pytest.raises(gcg.gate.Refused, match="shape"):
        gcg.held(good[:2], good.double(), good, 1e-3)


def test_our_bound_is_the_budget():
    """Twice the error of plain torch, not the wide bound of the others."""
    truth = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    eager = (truth * (1 + 1e-4)).float()
    assert gcg.held((truth * (1 + 1.9e-4)).float(), truth, eager, None) < 2e-4
    with pytest.raises(gcg.gate.Refused):
        gcg.held((truth * (1 + 2.2e-4)).float(), truth, eager, None)


@pytest.mark.slow
def test_largest_batch():
    """CUDA only in earnest: here memory ends where the function says so."""

    def fits_up_to(limit):
        def score(batch):
            if batch > limit:
                raise torch.OutOfMemoryError("planted")

        return score

    assert gcg.largest(fits_up_to(1000), 512) == 512
    assert gcg.largest(fits_up_to(200), 512) == 128
    assert gcg.largest(fits_up_to(1), 5) == 1
    assert gcg.largest(fits_up_to(0), 512) == 0


BAD = {
    "--candidates 0": "candidates",
    "--candidates x": "--candidates",
    "--prompt 0": "prompt",
    "--suffix -1": "suffix",
    "--target 0": "target",
    "--seconds nan": "seconds",
    "--cap-gib 0": "cap_gib",
    "--model 64x2": "model",
    "--model 65x2x211": "model",
    "--model 64x0x211": "model",
    "--dtype fp8": "--dtype",
    "--device tpu": "--device",
    "--nothing 1": "--nothing",
}


@pytest.mark.parametrize("bad,named", BAD.items())
def test_bad_arguments(bad, named, capsys):
    assert gcg.command(flags(bad)) == 2
    out, err = capsys.readouterr()
    assert out == "" and named in err and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_without_a_device(capsys):
    assert gcg.command(["--device", "cuda"]) == 2
    assert "device" in capsys.readouterr().err


def test_json_and_table(tmp_path, capsys):
    file = tmp_path / "new" / "gcg.json"
    assert gcg.command([*flags(), "--json", str(file)]) == 0
    printed = capsys.readouterr().out.splitlines()
    data = json.loads(file.read_text())
    assert {"cpu", "threads", "torch", "commit", "dirty"} <= data["machine"].keys()
    assert data["versions"].keys() == {"deepalign_kernels", "torch", "transformers"}
    asked = data["arguments"]
    assert asked["candidates"] == 5 and asked["dtype"] == "fp32" and asked["sizes"] == [64, 2, 211]
    assert data["backend"] in gcg.backends.BACKENDS
    rows = data["rows"]
    assert [(r["part"], r["way"]) for r in rows] == [(p, w) for p in PARTS for w in gcg_job.WAYS]
    for row in rows:
        assert row["failed"] is None and row["fits"] is None and row["extra_bytes"] > 0
        assert 0 < row["p10_ms"] <= row["ms"] <= row["p90_ms"] and 0 <= row["error"] < 1e-5
        assert (row["candidates_per_s"] is None) == (row["part"] == "gradient")
        assert row["batch"] == (1 if row["part"] == "gradient" else 5)
        if row["candidates_per_s"]:
            assert row["candidates_per_s"] == pytest.approx(5e3 / row["ms"])
    assert [line.split()[0] for line in printed[-10:]] == [
        "part",
        *["gradient"] * 3,
        *["score"] * 6,
    ]


def test_no_logits_of_ignored_positions():
    """Memory tells the ways apart: [B, length, V], [B, target, V], and less than that."""
    args = gcg.arguments(flags("--model 64x1x4001 --candidates 32"))
    rows = gcg.run_part("score", gcg_job.make_job(args), args)
    extra = {row.way: row.extra_bytes for row in rows}
    tile = 32 * 4001 * 4  # bytes of one position's logits
    assert extra["logits"] >= 13 * tile > extra["logits_to_keep"] >= 2 * 3 * tile
    assert extra["dak"] < 2 * 3 * tile


@pytest.mark.slow
def test_from_a_shell():
    command = [sys.executable, "-m", "benchmarks", "gcg", "--model", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "model" in done.stderr
