"""What `deepalign attack` finds out before it begins: its modes, its server, targets, old runs."""

import json

import pytest

pytest.importorskip("transformers", reason="models are loaded with it")
pytest.importorskip("scipy", reason='needs the extra "eval"')
pytest.importorskip("tyro", reason="reads the options")

from attack_world import TOKENIZER, made, words
from bad_server import planned

from deepalign_kernels.attack import GCG, Decoding, Direct
from deepalign_kernels.attack.config import local_engine
from deepalign_kernels.attack.self_check import self_check
from deepalign_kernels.attack.summary import summary
from deepalign_kernels.cli.main import main
from deepalign_kernels.data.prompts import Prompt
from deepalign_kernels.generate.engine import Reply
from deepalign_kernels.generate.local import LocalEngine
from deepalign_kernels.report import build
from deepalign_kernels.runs import Record, Run, Unit, fill, read_manifest, read_records
from deepalign_kernels.runs.stats import wilson

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.clean_memory]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return made(tmp_path_factory.mktemp("world"))


class Modes:
    """An engine whose mode "fast" gets some requests wrong, by what is in them alone."""

    tokenizer, mode, self_check = TOKENIZER, "fast", LocalEngine.self_check

    def __init__(self):
        self.asked = []

    @staticmethod
    def wrong(request):
        return (sum(request.prompt) + request.sampling.top_k) % 3 == 0

    def generate(self, requests):
        self.asked.append((self.mode, list(requests)))
        return [Reply(ids=(r.seed, self.mode == "fast" and self.wrong(r))) for r in requests]


def test_rows_that_differ_are_counted():
    prompts = [Prompt(f"p{n}", "mix " * (n + 1)) for n in range(6)]
    attacks = {
        "direct": Direct(max_new_tokens=1),
        "grid": Decoding(temperatures=(), top_ks=(1, 2, 3), top_ps=(), max_new_tokens=1),
        "gcg": GCG(steps=1, max_new_tokens=1),  # left out
    }
    engine = Modes()
    for name in ("direct", "grid"):
        list(attacks[name](engine, prompts))
    every = [r for _, requests in engine.asked for r in requests]
    different = sum(map(Modes.wrong, every))
    assert len(every) == 24 and 4 < different < 20
    engine = Modes()
    found = self_check(engine, attacks, prompts, 100, chunk=4)
    assert found == {"asked": 100, "rows": 24, "different": different} and engine.mode == "fast"
    engine = Modes()
    found = self_check(engine, attacks, prompts, 5, chunk=4)
    fast, exact = (
        [r for m, rs in engine.asked if m == mode for r in rs] for mode in ("fast", "exact")
    )
    assert found["rows"] == 5 == len(exact) < len(fast)  # whole units share batches
    assert found["different"] == sum(map(Modes.wrong, exact)) and all(r in fast for r in exact)
    assert self_check(Modes(), attacks, prompts, 5, chunk=4) == found
    with pytest.raises(ValueError, match="gcg: searches and trainings alone"):
        self_check(engine, {"gcg": attacks["gcg"]}, prompts, 5)


def test_the_self_check_of_a_run(world, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    args = words(world, out, "--self-check", "7", suite="decoding")
    plain = LocalEngine._generate

    def planted(self, requests):  # mode fast gets every second row of a batch wrong
        replies = plain(self, requests)
        for row in range(1, len(replies), 2):
            replies[row] = Reply(ids=(9,), text="mix")
        return replies

    monkeypatch.setattr(LocalEngine, "_generate", planted)
    assert main([*args, "--limit", "2"]) == 0
    told = read_manifest(out)["measured"]["self_check"]
    assert told["asked"] == told["rows"] == 7 and 0 < told["different"] < 7
    share = wilson(told["different"], 7)
    line = (
        f"self-check: {told['different']} of 7 replies differ between modes exact and fast:"
        f" {100 * share.value:.1f} % ({100 * share.low:.1f} to {100 * share.high:.1f})"
    )
    printed, progress = capsys.readouterr()
    assert line in printed.splitlines() and line in progress.splitlines()
    assert line in (out / "summary.txt").read_text()
    assert line in build([out], tmp_path / "page.html").read_text()
    before = [(out / name).read_bytes() for name in ("manifest.json", "records.jsonl")]
    monkeypatch.setattr(LocalEngine, "generate", None)  # nothing is asked again
    assert main([*args, "--limit", "2"]) == 0
    assert [(out / name).read_bytes() for name in ("manifest.json", "records.jsonl")] == before
    capsys.readouterr()
    assert main(words(world, tmp_path / "s", "--self-check", "7", "--server", "http://x")) == 2
    assert "self_check: a server has no mode exact" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_targets_of_searches(world, tmp_path, capsys):
    (tmp_path / "suite.yaml").write_text(
        "gcg: {steps: 1, width: 4, topk: 4, init: mix mix}\n"
        "rs: {attack: random_search, steps: 5, plateau: 1, plateau_from: 1.0e-12,"
        " plateau_gain: 0.5, init: mix mix}\n"
    )
    (tmp_path / "targets.json").write_text(json.dumps({"1": "flour flour", "9": "none"}))
    suite = str(tmp_path / "suite.yaml")
    args = words(world, tmp_path / "run", "--limit", "2", suite="direct")
    args[args.index("direct")] = suite
    assert main([*args, "--targets", str(tmp_path / "targets.json")]) == 0
    assert "1 of 2 prompts have no target in" in capsys.readouterr().err
    searches = [r for r in read_records(tmp_path / "run", "search") if r.name == "gcg"]
    found = {r.item: r.data["loss"] for r in searches}
    config = GCG(steps=1, width=4, topk=4, init="mix mix", max_new_tokens=4)
    lines = (tmp_path / "run" / "summary.txt").read_text().splitlines()
    assert any(line.startswith("rs 0: loss") and "1 steps (plateau)," in line for line in lines)
    rows = [json.loads(line) for line in (world / "data.jsonl").read_text().splitlines()]
    engine = local_engine(str(world / "model0"))
    for row, target in zip(rows, (None, "flour flour"), strict=False):
        prompt = Prompt(row["id"], row["prompt"], answer=row["answer"], target=target)
        (record,), _, _ = config.prepare(engine, [prompt])
        assert record.data["loss"] == pytest.approx(found[row["id"]], abs=1e-6)
    assert main([*args, "--targets", str(tmp_path / "none.json")]) == 2
    assert "targets:" in capsys.readouterr().err


def chat_server(closed):
    """One that counts prompt tokens, and goes on behind the last turn unless it closes it."""

    def plan(n, path, body):
        turns = body["messages"]
        given = turns[-1]["role"] == "assistant"
        ids = TOKENIZER.apply_chat_template(
            turns, add_generation_prompt=closed or not given,
            continue_final_message=given and not closed, return_dict=True,
        )["input_ids"]  # fmt: skip
        choice = {"message": {"content": "mix it"}, "finish_reason": "stop"}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}

    return planned(plan)


@pytest.mark.parametrize("closed", [False, True])
def test_a_chat_server_is_checked_before_the_run(world, tmp_path, capsys, closed):
    def attack(server, out, suite):
        args = words(world, tmp_path / out, "--server", server.url, "--send", "chat", suite=suite)
        status = main([*args, "--limit", "2"])
        return status, *capsys.readouterr()

    with chat_server(closed) as server:
        status, printed, progress = attack(server, "a", "quick")
        assert status == 0
        names = {r.name for r in read_records(tmp_path / "a")}
        about = read_manifest(tmp_path / "a")
        goes_on = "checked: the server goes on behind a given beginning of a reply"
        told = goes_on if not closed else (
            "NOT RUN: prefill: this server begins anew behind a given beginning of a reply"
        )  # fmt: skip
        assert told in printed and told in progress
        assert told in build([tmp_path / "a"], tmp_path / "page.html").read_text()
        assert names == {"direct", "decoding"} | (set() if closed else {"prefill"})
        assert about["measured"]["continues"] is not closed
        assert about.get("not_continued") == (["prefill"] if closed else None)
        asked = len(server.seen)
        assert attack(server, "a", "quick")[0] == 0 and len(server.seen) == asked
        status, _, err = attack(server, "b", "prefill")
        assert status == (2 if closed else 0)
        if closed:
            assert "prefill places the beginning of a reply, and the server begins a reply" in err
            assert len(server.seen) == asked + 2 and not (tmp_path / "b").exists()
        asked = len(server.seen)
        assert attack(server, "c", "direct")[0] == 0 and len(server.seen) == asked + 2  # prompts


def test_a_run_of_before_there_was_a_chunk(world, tmp_path, capsys):
    """Its manifest does not say it: the same one goes on, another is refused with its number."""
    args = words(world, tmp_path, "--chunk", "2", suite="direct")
    assert main(args) == 0
    path = tmp_path / "manifest.json"
    about = json.loads(path.read_text())
    del about["chunk"]
    path.write_text(json.dumps(about))
    records = (tmp_path / "records.jsonl").read_bytes()
    cut = records[: records.index(b'{"unit":') + 10]  # within the end of the first of three units
    kept = records[: records.index(b"\n", records.index(b'{"unit":')) + 1]
    for had in (kept, records):
        (tmp_path / "records.jsonl").write_bytes(had)
        assert main(words(world, tmp_path, suite="direct")) == 2
        assert "was begun with another; go on with --chunk 2" in capsys.readouterr().err
        assert (tmp_path / "records.jsonl").read_bytes() == had
        assert main(args) == 0
        assert (tmp_path / "records.jsonl").read_bytes() == records
    (tmp_path / "records.jsonl").write_bytes(cut)  # nothing is done yet: any chunk is as good
    assert main(words(world, tmp_path, suite="direct")) == 0


def test_prefixes_that_are_other_tokens_as_text(tmp_path):
    """A chat takes text: where its k tokens are others than were meant, the summary says so."""
    rows = [{"prefilled": 2, "survives_as_text": n > 0} for n in range(3)]
    rows.append({"prefilled": 0, "survives_as_text": True})
    for send, lines in (("chat", ["NOT EXACT: 1 of 3 prefixes are other tokens"]), ("ids", [])):
        with Run(tmp_path / send, {"engine": {"send": send}, "attacks": {}}) as run:
            records = [Record("sample", "prefill", {"k": n}, data=d) for n, d in enumerate(rows)]
            fill(run.records, [Unit("prefill", lambda records=records: records)])
        told = [x for x in summary(tmp_path / send).splitlines() if x.startswith("NOT EXACT")]
        assert [x.partition(" as text")[0] for x in told] == lines
