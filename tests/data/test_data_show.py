"""`deepalign data show`: what is printed is what a run trains."""

import json
import re

import pytest
import torch
from tiny_chat import RECORDS, build_tokenizer, chat

from deepalign_kernels.cli import main as cli
from deepalign_kernels.data.columns import TokenTable
from deepalign_kernels.data.show import token_rows, token_table
from deepalign_kernels.losses import BetaSchedule
from deepalign_kernels.train import tokenize_chat


@pytest.fixture
def files(tmp_path):
    build_tokenizer().save_pretrained(tmp_path / "model")
    records = [{**RECORDS[0], "beta_scale": 2}, {**chat("q", "yes", "r", "no"), "id": 1}]
    records[1]["messages"][3] = {**records[1]["messages"][3], "weight": 0.3}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(tmp_path / "a.jsonl"), str(tmp_path / "model")


def shown(capsys, *arguments):
    status = cli.main(["data", "show", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_rows_are_what_the_table_of_a_run_holds(files, capsys):
    data, model = files
    status, out, _ = shown(capsys, data, "--model", model, "--json")
    conversations = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [c["where"] for c in conversations] == [f"{data}:1", f"{data}:2"]
    examples = tokenize_chat(build_tokenizer(), data)
    table = TokenTable(examples)
    tokens = [token for c in conversations for token in c["tokens"]]
    assert [t["id"] for t in tokens] == table.ids[:-1].tolist()
    # The table's columns speak of the next token.
    pairs = zip(tokens[1:], table.targets.tolist(), table.positions.tolist(), strict=False)
    for token, target, position in pairs:
        assert token["trained"] == (target != -100)
        if token["trained"]:
            beta = 0.5 if position == 1 else 2.0 if 2 <= position <= 5 else 0.1
            beta *= 2 if token in conversations[0]["tokens"] else 1
            assert (token["id"], token["position"]) == (target, position)
            assert token["beta"] == pytest.approx(beta)
    weights = [t["weight"] for t in conversations[1]["tokens"] if t["trained"]]
    assert weights == [1.0] * 5 + [0.3] * 4  # yes, no, and what ends a turn


def test_the_table_shows_every_trained_token_and_hides_long_prompts(files, capsys):
    data, model = files
    status, out, _ = shown(
        capsys, data, "--model", model, "-n", "1", "--context", "3", "--beta.first", "7"
    )
    (example, _) = tokenize_chat(build_tokenizer(), data)
    trained = sum(x != -100 for x in example.labels)
    assert status == 0 and f"{data}:1: {len(example.labels)} tokens, {trained} trained" in out
    lines = out.splitlines()
    assert sum(" yes " in line for line in lines) == trained
    begin = next(i for i, x in enumerate(example.labels) if x != -100)
    hidden = [line for line in lines if "more tokens that are not trained" in line]
    assert hidden == [f"       ... {begin - 6} more tokens that are not trained ..."]
    first = next(line for line in lines if " yes " in line).split()
    assert first == [str(begin), str(example.input_ids[begin]), "'m'", "yes", "1", "14", "1"]
    assert len(lines) == 2 + 3 + 1 + 3 + trained + 1
    _, out, _ = shown(capsys, data, "--model", model, "-n", "1", "--beta.table", "7", "3", "0.25")
    betas = [line.split()[-2] for line in out.splitlines() if " yes " in line]
    assert betas == ["14", "6", *["0.5"] * (trained - 2)]
    rows = token_rows(build_tokenizer(), example, lambda p: [1.0] * len(p))
    assert len(token_table(rows, None).splitlines()) == 1 + len(rows)


def test_other_choices_and_wrong_ones(files, capsys, tmp_path):
    data, model = files
    _, out, _ = shown(capsys, data, "--model", model, "--skip", "1", "--train-on", "last", "--json")
    assert sum(t["trained"] for t in json.loads(out)["tokens"]) == 4
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}")
    _, out, _ = shown(capsys, data, "--model", model, "--chat-template", str(template), "-n", "1")
    assert "'u'" in out and "<|im_start|>" not in out
    for arguments, why in (
        ((data, "--model", str(tmp_path / "none")), "model: no tokenizer in"),
        ((data, "--model", model, "--unknown-keys", "error"), "a.jsonl:2: unknown key 'id'"),
        ((data, "--model", model, "--train-on", "first"), "train_on: expected one of"),
        ((data, "--model", model, "-n", "-1"), "n: expected"),
        ((str(tmp_path / "none.jsonl"), "--model", model), "data: .*none.jsonl: no such file"),
    ):
        status, _, said = shown(capsys, *arguments)
        assert status == 2
        assert re.search(why, said), said


def test_beta_is_the_schedules_own():
    example = tokenize_chat(build_tokenizer(), [RECORDS[0]])[0]
    schedule = BetaSchedule(first=3.0, prefix=1.0, rest=0.25, prefix_length=2)

    def beta_of(positions):
        return [{1: 3.0, 2: 1.0}.get(p, 0.25) for p in positions]

    rows = token_rows(build_tokenizer(), example, lambda p: schedule(torch.tensor(p)).tolist())
    assert rows == token_rows(build_tokenizer(), example, beta_of)
