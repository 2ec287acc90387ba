"""report_to: the log's numbers in trackers; what the terminal says while a run goes on."""

import struct

import pytest
from tiny_chat import RECORDS, build_model, build_tokenizer
from train_runs import RUN, log_of

from deepalign_kernels.train import TrainConfig, TrainingRun, log

tracking = pytest.importorskip("accelerate.tracking")
OPTIONS = {**RUN, "max_steps": 4, "eval_every": 2, "learning_rate": 1e-3}


def run(out, **options):
    config = TrainConfig(out, **{**OPTIONS, **options})
    data = build_model(0), build_tokenizer(), config, RECORDS
    return TrainingRun(*data, eval_data=RECORDS[:2])


class Kept(tracking.GeneralTracker):
    """What a tracker is told."""

    name, requires_logging_directory, tracker = "kept", False, None
    every = []

    def __init__(self, project, **options):
        super().__init__()
        self.about, self.lines, self.open = (project, options), [], False
        Kept.every.append(self)

    def start(self):
        self.open = True

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **_):
        assert self.open
        self.lines.append((step, values))

    def finish(self):
        self.open = False


def test_a_tracker_gets_what_the_log_gets(tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "kept", Kept)
    monkeypatch.setattr(Kept, "every", [])
    run(tmp_path, report_to="kept").train()
    (kept,) = Kept.every
    lines = [r for r in log_of(tmp_path) if r["event"] in ("step", "eval")]
    assert [step for step, _ in kept.lines] == [r["step"] for r in lines] == [0, 1, 2, 2, 3, 4, 4]
    assert not kept.open and kept.config["objective"] == "constrained"
    for (_, values), record in zip(kept.lines, lines, strict=True):
        place = "train" if record["event"] == "step" else "eval"
        for name in ("objective", "nll", "nll_at"):
            said = record.get(name)
            if isinstance(said, list):
                assert values[f"{place}/{name}/1"] == said[0]
                assert values.get(f"{place}/{name}/rest") == said[-1]
            else:
                assert values.get(f"{place}/{name}") == said
        assert all(isinstance(x, (int, float)) for x in values.values())


def events_of(folder):
    """(step, {tag: value}) of tensorboard's files: records of length, checksum, bytes, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.glob("events*")):
        raw, at = file.read_bytes(), 0
        while at < len(raw):
            (size,) = struct.unpack_from("<Q", raw, at)
            event = Event.FromString(raw[at + 12 : at + 12 + size])
            yield event.step, {v.tag: v.simple_value for v in event.summary.value}
            at += size + 16


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    run(tmp_path, report_to="tensorboard").train()
    found = {}
    for step, values in events_of(tmp_path / "tensorboard"):
        found |= {(step, name): value for name, value in values.items()}
    for record in log_of(tmp_path):
        if record["event"] == "step":
            nll = found[record["step"], "train/nll"]
            assert nll == pytest.approx(record["nll"], rel=1e-6)
    assert (4, "eval/nll_at/1") in found


def test_a_tracker_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="report_to: 'tensorbord' is no .*mean 'tensorboard'"):
        TrainConfig(tmp_path, report_to="tensorbord")
    with pytest.raises(ValueError, match="report_to: 'mlflow' is not installed"):
        TrainConfig(tmp_path, report_to="mlflow")
    assert TrainConfig(tmp_path, report_to="none").report_to == "none"


def test_the_line_of_progress_says_how_long_it_will_take(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    progress = log.Progress(total=100, done=10, show=True)
    for _ in range(5):
        now[0] += 8
        progress.step()
    progress.say({"objective": -0.5, "nll": 1.25, "lr": 1e-5, "tokens_per_s": 1650.0})
    line = "train: step 15/100, 0:11:20 left: objective -0.5, nll 1.25, lr 1e-05, tokens_per_s "
    assert capsys.readouterr().err == f"{line}1.65e+03\n"
