"""A run that is killed, torn or started twice is the run that was never stopped."""

import dataclasses
import itertools
import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

import pytest

from deepalign_kernels import progress
from deepalign_kernels.runs import (
    Record,
    Run,
    Unit,
    derived_seed,
    fill,
    read_manifest,
    read_records,
)
from deepalign_kernels.runs import store as storing
from deepalign_kernels.runs.journal import Journal, read_journal
from deepalign_kernels.runs.store import read_times

ROOT = pathlib.Path(__file__).parents[2]
ABOUT = {"model": "m", "seed": 0, "depths": (5, 10)}


def records_of(unit, n=3):
    return [
        Record(
            "sample",
            "prefill",
            {"k": unit},
            f"p{i}",
            data={"logp": [-0.1 / (i + 1)], "seed": derived_seed(0, f"p{i}", unit)},
            text={"reply": "ä reply\n\u2028of " + "words " * 50},
        )
        for i in range(n)
    ]


def units(n=4):
    return [Unit(f"prefill/{u}", lambda u=u: records_of(u), 3) for u in range(n)]


def whole(folder):
    with Run(folder, ABOUT) as run:
        assert fill(run.records, units()) == 4
    return (folder / "records.jsonl").read_bytes()


def test_records_come_back(tmp_path):
    whole(tmp_path)
    got = list(read_records(tmp_path))
    assert got == [r for u in range(4) for r in records_of(u)]
    assert list(read_records(tmp_path, "metric")) == []


def test_every_cut_is_mended(tmp_path):
    """The file cut off at any byte, and every 97th with garbage behind: the same bytes again."""
    expected = whole(tmp_path / "whole")
    folder = tmp_path / "cut"
    with Run(folder, ABOUT):
        pass
    for at in [*range(0, len(expected), 97), len(expected) - 1]:
        for tail in (b"", b"\x00\xff garbage", b"{}\n"):
            (folder / "records.jsonl").write_bytes(expected[:at] + tail)
            with Run(folder, ABOUT) as run:
                fill(run.records, units())
            assert (folder / "records.jsonl").read_bytes() == expected


def test_killed_and_run_again(tmp_path):
    """kill -9 in the middle; the file is that of a run that nobody stopped."""
    code = (
        "import sys, time; sys.path[:0] = ['.', 'tests/runs']\n"
        "import test_runs_store as t\n"
        "from deepalign_kernels.runs import Run, Unit, fill\n"
        "def slow(make):\n"
        "    time.sleep(0.05)\n"
        "    return make()\n"
        "with Run(sys.argv[1], t.ABOUT) as run:\n"
        "    fill(run.records, [Unit(u.name, lambda u=u: slow(u.make)) for u in t.units(40)])\n"
    )
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", code, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT)
    file, limit = folder / "records.jsonl", time.monotonic() + 60
    while (file.stat().st_size if file.exists() else 0) < 2000:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with Run(folder, ABOUT) as run:
        assert 0 < fill(run.records, units(40)) < 40
    with Run(tmp_path / "whole", ABOUT) as run:
        fill(run.records, units(40))
    assert file.read_bytes() == (tmp_path / "whole" / "records.jsonl").read_bytes()


def test_a_unit_that_fails_leaves_the_others(tmp_path):
    def fails():
        yield records_of(9)[0]
        raise RuntimeError("planted")

    with Run(tmp_path, ABOUT) as run, pytest.raises(RuntimeError, match="planted"):
        fill(run.records, [*units(2), Unit("bad", fails)])
    assert len(list(read_records(tmp_path))) == 6


def test_a_unit_that_may_go_better_is_made_again_in_its_place(tmp_path):
    """A failure of a server's is written, read and made again; what succeeded meanwhile stays."""
    made = []

    def unit(number, good):
        def make():
            made.append(number)
            rows = records_of(number)
            if good:
                return rows
            failed = dataclasses.replace(rows[1], data={"again": True}, text={}, error="status 503")
            return [rows[0], failed, rows[2]]

        return Unit(f"prefill/{number}", make, 3)

    with Run(tmp_path, ABOUT) as run:
        fill(run.records, [unit(0, True), unit(1, False), unit(2, True)])
        assert [r.error for r in read_records(tmp_path)].count("status 503") == 1
        for good in (False, True, True):
            fill(run.records, [unit(n, good) for n in range(3)])
    assert made == [0, 1, 2, 1, 1]
    assert list(read_records(tmp_path)) == [r for n in range(3) for r in records_of(n)]
    with Run(tmp_path, ABOUT) as run:
        assert len(run.records.units) == 3
        with pytest.raises(ValueError, match="already"):
            run.records.commit("prefill/1", [])
    run = Journal(tmp_path / "marked.jsonl")
    run.commit("a", records_of(0), "one")
    assert run.has("a", "one") and not run.has("a", "two")
    run.commit("a", records_of(1), "two")
    run.close()
    assert list(read_journal(run.path)) == records_of(1)


def test_the_reader_sees_finished_units_alone(tmp_path):
    with Run(tmp_path, ABOUT) as run:
        run.records.commit("a", records_of(0))
        with (tmp_path / "records.jsonl").open("ab") as file:
            file.write(records_of(1)[0].line.encode() + b"\n")
        assert list(read_records(tmp_path)) == records_of(0)


def test_damage_is_named(tmp_path):
    whole(tmp_path)
    path = tmp_path / "records.jsonl"
    good = path.read_bytes()
    for wrong in (b'"k":', b'"k":NaN', b'"k":1},"more":{"k":1'):
        path.write_bytes(good.replace(b'"k":1', wrong, 1))
        with pytest.raises(ValueError, match=r"records.jsonl:5: not a record"):
            list(read_records(tmp_path))
    path.write_bytes(good.replace(b'"kind":"sample"', b'"kind":"simple"', 1))
    with pytest.raises(ValueError, match=r"not a record"):
        list(read_records(tmp_path))
    path.write_bytes(good)
    for record in read_records(tmp_path):  # the line is kept, and is what would be made again
        values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
        assert record.line == Record(**values).line and record.key == Record(**values).key
    first = good[: good.index(b'{"unit"')]
    path.write_bytes(first + good)
    with pytest.raises(ValueError, match=r"there twice"):
        list(read_records(tmp_path))
    with pytest.raises(ValueError, match="no such file"):
        list(read_journal(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_texts_are_private(tmp_path, mask):
    before = os.umask(mask)
    try:
        whole(tmp_path / "run")
        with Run(tmp_path / "run", ABOUT) as run:
            assert run.verdicts.units == set()
    finally:
        os.umask(before)
    for name in ("records.jsonl", "verdicts.jsonl", "manifest.json"):
        assert stat.S_IMODE((tmp_path / "run" / name).stat().st_mode) == 0o600, name
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700


def test_another_manifest_is_refused(tmp_path):
    whole(tmp_path)
    with pytest.raises(ValueError, match="another depths, extra, seed;"):
        Run(tmp_path, {"model": "m", "seed": 1, "extra": 2})
    kept = json.loads((tmp_path / "manifest.json").read_text())
    assert kept["depths"] == [5, 10] and kept["environment"]["versions"]["torch"]
    kept["environment"]["python"] = "2.0"
    (tmp_path / "manifest.json").write_text(json.dumps(kept))
    Run(tmp_path, ABOUT).records.close()


def test_two_writers(tmp_path):
    with Run(tmp_path, ABOUT), pytest.raises(ValueError, match="another process"):
        Run(tmp_path, ABOUT)
    Run(tmp_path, ABOUT).records.close()


def test_progress_tells_the_rest(tmp_path):
    said = []
    with Run(tmp_path, ABOUT) as run:
        fill(run.records, units(), said.append)
    assert said == ["12/12 records, 0 s left (prefill/3)"]
    times = [json.loads(line) for line in (tmp_path / "times.jsonl").read_text().splitlines()]
    assert [t["unit"] for t in times] == [u.name for u in units()]
    assert all(0 <= t["seconds"] < 60 for t in times) and not read_times(tmp_path)


def test_seconds_of_a_record_lie_apart(tmp_path):
    record = Record("search", "gcg", item="p", seconds=2.5)
    assert record == Record("search", "gcg", item="p") and "seconds" not in record.line
    with Run(tmp_path, ABOUT) as run:
        fill(run.records, [Unit("g", lambda: [record, Record("sample", "gcg", item="p")])])
    assert list(read_records(tmp_path))[0].seconds is None
    with (tmp_path / "times.jsonl").open("a") as file:
        file.write('{"unit": "killed he')
    assert read_times(tmp_path) == {record.key: 2.5}


def test_progress_within_a_unit(tmp_path, monkeypatch):
    """One unit of a day: its lines come from inside it, and the time left from what it tells."""
    clock, said = itertools.count(), []
    monkeypatch.setattr(storing.time, "monotonic", lambda: 0.5 * next(clock))

    def long():
        for step in range(1, 41):
            with progress.part(0.0, 0.5):
                progress.told(step, 40)
        yield from records_of(0)

    with Run(tmp_path, ABOUT) as run:
        fill(run.records, [Unit("gcg/0", long, 10)], said.append)
    shares = [int(line.partition(" % of it")[0].split()[-1]) for line in said[:-1]]
    assert shares == sorted(shares) and len(shares) > 5 and shares[-1] >= 45
    assert said[-1] == "10/10 records, 0 s left (gcg/0)"
    spent = [0.5 * step for step in range(2, 50)]  # ends of steps, by the planted clock
    for line, share in zip(said[:-1], shares, strict=True):
        left = float(line.partition(" records, ")[2].partition(" s left")[0])
        assert any(abs(t * (100 - share) / share - left) < 0.05 * left + 1 for t in spent)


def test_what_was_measured_is_no_setting(tmp_path):
    """It comes later, stands in the manifest, and hinders nobody who goes on."""
    with Run(tmp_path, ABOUT) as run:
        run.measured("self_check", {"rows": 2})
        run.measured("continues", True)
    about = read_manifest(tmp_path)
    assert about["measured"] == {"self_check": {"rows": 2}, "continues": True}
    assert about["depths"] == [5, 10] and about["environment"]
    with Run(tmp_path, ABOUT | {"chunk": 8}, may_lack=("chunk",)):
        assert read_manifest(tmp_path) == about
    with pytest.raises(ValueError, match="another chunk;"):
        Run(tmp_path, ABOUT | {"chunk": 8})
    with pytest.raises(ValueError, match="another seed;"):
        Run(tmp_path, {**ABOUT, "seed": 1, "chunk": 8}, may_lack=("chunk",))
    with pytest.raises(
        ValueError, match="another depths;"
    ):  # only what is not there is passed over
        Run(tmp_path, {**ABOUT, "depths": (1,)}, may_lack=("depths",))


def test_records_are_plain():
    with pytest.raises(ValueError, match="kind"):
        Record("thing", "x")
    with pytest.raises(ValueError, match="record 'x' of item 'p'"):
        Record("sample", "x", item="p", data={"v": float("nan")})
    with pytest.raises(ValueError, match="plain"):
        Record("sample", "x", data={"v": object()})


def test_keys_and_seeds():
    base = ("sample", "a", {"k": 1}, "p", 0)
    keys = {Record(*base).key}
    for at, other in enumerate(("search", "b", {"k": 2}, "q", 1)):
        keys.add(Record(*base[:at], other, *base[at + 1 :]).key)
    assert len(keys) == 6
    assert (
        Record("sample", "a", {"x": 1, "y": 2}).key == Record("sample", "a", {"y": 2, "x": 1}).key
    )
    seeds = {derived_seed(0, f"p{i}", s) for i in range(100) for s in range(10)}
    assert len(seeds) == 1000 and all(0 <= s < 2**63 for s in seeds)
    assert derived_seed(0, "p1", "prefill") == 5853556518823346631  # on every machine


@pytest.mark.slow
def test_a_large_run_resumes_quickly(tmp_path):
    """100,000 records are there again in under 5 s, and cost under 0.3 ms each to keep."""
    record = records_of(0)[0]
    with Run(tmp_path, ABOUT) as run:
        begun = time.monotonic()
        fill(
            run.records,
            [
                Unit(
                    f"u{u}",
                    lambda u=u: [
                        Record("sample", "a", item=f"{u}-{i}", text=record.text) for i in range(8)
                    ],
                )
                for u in range(12_500)
            ],
        )
        spent = time.monotonic() - begun
    begun = time.monotonic()
    with Run(tmp_path, ABOUT) as run:
        assert len(run.records.units) == 12_500
    assert time.monotonic() - begun < 5 and spent < 30


def test_a_full_disk_loses_the_unit_alone(tmp_path, monkeypatch):
    with Run(tmp_path, ABOUT) as run:
        run.records.commit("a", records_of(0))
        write = os.write

        def full(file, data):
            write(file, data[:10])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(storing.os, "write", full)
        with pytest.raises(OSError, match="No space"):
            run.records.commit("b", records_of(1))
        monkeypatch.undo()
    Journal(tmp_path / "records.jsonl").close()
    assert list(read_records(tmp_path)) == records_of(0)
