"""Where data come from, what of a record is trained, and that large data stay out of memory."""

import json
import subprocess
import sys
from dataclasses import replace

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from stock_templates import STOCK, byte_level
from tiny_chat import RECORDS, TEMPLATES, build_tokenizer, chat

from deepalign_kernels.data.columns import TokenTable
from deepalign_kernels.data.examples import Encoding, Example
from deepalign_kernels.data.packing import epoch_order, micro_batches
from deepalign_kernels.data.source import Source
from deepalign_kernels.data.tokenizing import CHUNK, examples_of
from deepalign_kernels.train import load_chat_data, tokenize_chat

PLAIN = [r for r in RECORDS if "messages" in r]


def same(a, b):
    """Two lists of examples, but for where they come from."""
    key = lambda e: (list(e.input_ids), list(e.labels), list(e.positions))  # noqa: E731
    return [key(e) for e in a] == [key(e) for e in b]


def test_every_form_of_the_same_data_gives_the_same_tokens(tmp_path):
    tokenizer = build_tokenizer()
    records = [{**r, "id": n} for n, r in enumerate(PLAIN)]
    expected = tokenize_chat(tokenizer, PLAIN)
    table = datasets.Dataset.from_list(records)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "b.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    folder = tmp_path / "folder"
    folder.mkdir()
    for n, part in enumerate((records[:2], records[2:])):
        lines = "".join(json.dumps(r) + "\n" for r in part)
        (folder / f"part-{n}.jsonl").write_text(lines)
    for data in (
        records,
        iter(records),
        table,
        table.to_iterable_dataset(),
        *(tmp_path / name for name in ("a.jsonl", "b.parquet", "saved", "splits", "folder")),
        str(tmp_path / "a.jsonl"),
    ):
        assert same(tokenize_chat(tokenizer, data), expected), data
    assert load_chat_data(tmp_path / "b.parquet")[2].where == f"{tmp_path / 'b.parquet'}:3"
    # A table has every key in every row; None is what a row has not.
    both = {"messages": [PLAIN[0]["messages"], None], "prompt": [None, "hi"]}
    mixed = datasets.Dataset.from_dict({**both, "completion": [None, "ho"]})
    assert len(tokenize_chat(tokenizer, mixed)) == 2


def test_wrong_sources_are_refused(tmp_path):
    tokenizer = build_tokenizer()
    (tmp_path / "x.parquet").write_text("no table")
    datasets.DatasetDict({"test": datasets.Dataset.from_list(PLAIN)}).save_to_disk(tmp_path / "d")
    (tmp_path / "empty").mkdir()
    for data, why in (
        (tmp_path / "x.parquet", "x.parquet: not a readable Parquet file"),
        (tmp_path / "d", "no split 'train' among test"),
        (tmp_path / "empty", "no conversation in this folder"),
        (tmp_path / "none.jsonl", "none.jsonl: no such file"),
        (7, "expected a path, a data set or records, got int"),
    ):
        with pytest.raises(ValueError, match=why):
            tokenize_chat(tokenizer, data)


def test_a_data_set_by_name_that_cannot_be_loaded(monkeypatch):
    def load(name, split):
        if name == "own/set" and split == "validation":
            return datasets.Dataset.from_list(PLAIN)
        raise FileNotFoundError(f"no {name}")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(load_chat_data("own/set:validation")) == len(PLAIN)
    assert load_chat_data("own/set:validation")[0].where == "own/set:validation[0]"
    with pytest.raises(ValueError, match="path: own/other: no such file, and no data set that can"):
        load_chat_data("own/other")


def test_keys_of_others_are_left_out_or_refused():
    record = {**PLAIN[0], "id": 3, "source": "x"}
    said = [{**m, "score": 1} for m in PLAIN[0]["messages"]]
    tokenizer = build_tokenizer()
    assert same(tokenize_chat(tokenizer, [record]), tokenize_chat(tokenizer, PLAIN[:1]))
    assert same(tokenize_chat(tokenizer, [{"messages": said}]), tokenize_chat(tokenizer, PLAIN[:1]))
    for bad, key in ((record, "id"), ({"messages": said}, "score")):
        with pytest.raises(ValueError, match=rf"data\[0\].*unknown key '{key}'; expected some of"):
            tokenize_chat(tokenizer, [bad], unknown_keys="error")
    # Data sets that carry a copy of the first message.
    copied = {"prompt": "how", "prompt_id": "a", **PLAIN[0]}
    assert same(tokenize_chat(tokenizer, [copied]), tokenize_chat(tokenizer, PLAIN[:1]))
    parts = [{"role": "user", "content": [{"type": "text", "text": "how do i bake bread ?"}]}]
    parts += PLAIN[0]["messages"][1:]
    assert same(
        tokenize_chat(tokenizer, [{"messages": parts}]), tokenize_chat(tokenizer, PLAIN[:1])
    )


TOOLS = (
    "{% if tools %}<|im_start|>tools {{ tools | map(attribute='name') | join(',') }}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.name }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_tools_and_calls_reach_the_template_and_are_trained():
    tokenizer = byte_level(replace(STOCK["chatml"], template=TOOLS))
    messages = [
        {"role": "user", "content": "weather ?"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
    ]
    tools = [{"name": "look", "parameters": {}}]
    (example,) = tokenize_chat(tokenizer, [{"messages": messages, "tools": tools}])
    text = tokenizer.decode(example.input_ids)
    assert text.startswith("<|im_start|>tools look<|im_end|>")
    runs = "".join(
        tokenizer.decode([i]) if x != -100 else "\x00"
        for i, x in zip(example.input_ids, example.labels, strict=True)
    )
    trained = [run for run in runs.split("\x00") if run]
    assert trained == ["<call>look</call><|im_end|>", "Rain.<|im_end|>"]


def weights_of(tokenizer, record, **options):
    """(text, weight) of each trained run."""
    (e,) = tokenize_chat(tokenizer, [record], **options)
    weights = e.weights or [1.0] * len(e.labels)
    out = []
    for n, (token, label) in enumerate(zip(e.input_ids, e.labels, strict=True)):
        if label != -100:
            if n and e.labels[n - 1] != -100:
                out[-1] = (out[-1][0] + [token], weights[n])
            else:
                out.append(([token], weights[n]))
    return [(tokenizer.decode(ids).split("<")[0], w) for ids, w in out]


@pytest.mark.parametrize("name", ("marked", "unmarked"))
def test_which_turns_are_trained_and_what_they_weigh(name):
    tokenizer = build_tokenizer(TEMPLATES[name])
    talk = chat("q", "one", "r", "two", "s", "three")["messages"]

    def said(**on):
        return [{**m, **on.get(m["content"], {})} for m in talk]

    shown = weights_of(tokenizer, {"messages": talk}, train_on="last")
    assert shown == [("three", 1.0)]
    off = said(two={"train": False}, three={"weight": 0.25})
    assert weights_of(tokenizer, {"messages": off}) == [("one", 1.0), ("three", 0.25)]
    # What a message says comes before train_on, and before being a prompt.
    on = said(one={"train": True}, three={"weight": 0})
    assert weights_of(tokenizer, {"messages": on}, train_on="last") == [("one", 1.0)]
    part = {"prompt": said(one={"weight": 0.5})[:3], "completion": talk[3:]}
    assert weights_of(tokenizer, part) == [("one", 0.5), ("two", 1.0), ("three", 1.0)]
    none = {"messages": said(**{text: {"train": False} for text in ("one", "two", "three")})}
    with pytest.raises(ValueError, match=r"data\[0\]: no token of this is trained"):
        weights_of(tokenizer, none)
    with pytest.raises(ValueError, match="train_on: expected one of 'all', 'last'"):
        weights_of(tokenizer, {"messages": talk}, train_on="first")


def test_processes_give_the_same_examples_in_the_same_order(tmp_path):
    tokenizer = build_tokenizer()
    path = tmp_path / "many.jsonl"
    lines = [json.dumps(chat("q" * (n % 7), f"answer {n}")) for n in range(5 * CHUNK + 3)]
    path.write_text("\n".join(lines))
    here = list(examples_of(tokenizer, path, Encoding(), workers=0))
    there = list(examples_of(tokenizer, path, Encoding(), workers=2))
    assert same(here, there) and [e.where for e in here] == [e.where for e in there]
    assert len(here) == len(lines)
    lines[3 * CHUNK + 1] = json.dumps(chat("q"))
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"many.jsonl:{3 * CHUNK + 2}: no assistant turn"):
        list(examples_of(tokenizer, path, Encoding(), workers=2))


def columns(table):
    return table.ids.tolist(), table.targets.tolist(), table.positions.tolist()


def test_the_cache_follows_the_content_and_is_rebuilt_when_torn(tmp_path, monkeypatch):
    tokenizer, path, cache = build_tokenizer(), tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_text("".join(json.dumps(r) + "\n" for r in PLAIN))

    def build(encoding=None, tokenizer=tokenizer, **options):
        return Source(path, tokenizer, encoding, cache=cache, **options).table(0)

    first = build()
    (folder,) = cache.iterdir()
    monkeypatch.setattr("deepalign_kernels.data.source.examples_of", None)  # nothing is tokenised
    again = build()
    assert columns(again) == columns(first) and again.content_hash() == first.content_hash()
    assert list(again.lengths) == list(first.lengths) and list(again.parts) == list(first.parts)
    monkeypatch.undo()
    for damage in (lambda f: f.write_bytes(f.read_bytes()[:-4]), lambda f: f.write_bytes(
        bytes([f.read_bytes()[0] ^ 1]) + f.read_bytes()[1:]), lambda f: f.unlink()):  # fmt: skip
        damage(folder / "ids.bin")
        with pytest.warns(UserWarning, match="cache: .*; tokenising again"):
            assert columns(build()) == columns(first)
    # Each of these is another content.
    build(Encoding(train_on="last"))
    build(Encoding(position_origin="span"))
    build(tokenizer=build_tokenizer(TEMPLATES["unmarked"]))
    build(max_length=1000)
    path.write_text("".join(json.dumps(r) + "\n" for r in PLAIN[1:]))
    build()
    assert len(list(cache.iterdir())) == 6 and not list(cache.glob(".*"))


def test_the_hash_covers_all_that_changes_a_run():
    base = Example([1, 2, 3, 4], [-100, 2, 3, 4], [0, 1, 2, 3])
    other = Example([5, 6], [-100, 6], [0, 1], part=1)

    def of(*examples, **options):
        return TokenTable(examples, **options).content_hash()

    changed = [
        Example([9, 2, 3, 4], [-100, 2, 3, 4], [0, 1, 2, 3]),
        Example([1, 2, 3, 4], [-100, -100, 3, 4], [0, 0, 2, 3]),
        Example([1, 2, 3, 4], [-100, 2, 9, 4], [0, 1, 2, 3]),  # another target than the token
        Example([1, 2, 3, 4], [-100, 2, 3, 4], [0, 1, 2, 7]),
        Example([1, 2, 3, 4], [-100, 2, 3, 4], [0, 1, 2, 3], weights=[0, 1, 1, 0.5]),
        Example([1, 2, 3, 4], [-100, 2, 3, 4], [0, 1, 2, 3], part=1),
        Example([1, 2, 3, 4], [-100, 2, 3, 4], [0, 1, 2, 3], beta_scale=0.5),
    ]
    hashes = [of(base, other), of(other, base), *(of(e, other) for e in changed)]
    mixed = {0: 0.2, 1: 0.8}
    hashes += [of(base, other, part_weights=mixed)]
    hashes += [of(base, other, part_weights={0: 0.3, 1: 0.7})]
    hashes += [of(base, other, part_weights=mixed, part_weighting="examples")]
    assert len(set(hashes)) == len(hashes)
    # A reference says something about tokens alone.
    tokens = [TokenTable([e, other]).tokens_hash() for e in (base, changed[3], changed[4])]
    assert len(set(tokens)) == 1 and TokenTable([changed[2], other]).tokens_hash() != tokens[0]


def test_a_scale_of_beta_goes_with_its_tokens(tmp_path):
    tokenizer = build_tokenizer()
    records = [{**RECORDS[0], "beta_scale": 0}, RECORDS[1], {**RECORDS[2], "beta_scale": 3}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    for _ in range(2):  # the second time from the cache
        source = Source(str(path), tokenizer, cache=tmp_path / "cache")
        table = source.table(0)
        packed = table.batch([2, 0, 1], torch.device("cpu"), table.count([0, 1, 2]), packed=True)
        expected = [s for s, row in ((3, 2), (0, 0), (1, 1)) for _ in range(table.lengths[row])]
        assert packed.beta_scale.tolist() == [expected]
        padded = table.batch([1, 2], torch.device("cpu"), table.count([1, 2]))
        assert padded.beta_scale.tolist() == [[1], [3]]
    short = Source(records[:1], tokenizer, max_length=60, on_too_long="truncate")
    assert short.too_long == 1 and list(short.table(0).beta_scales) == [0]
    plain = Source(RECORDS, tokenizer).table(0)
    assert plain.batch([0], torch.device("cpu"), plain.count([0])).beta_scale is None
    for bad in (-1, "2", True, float("inf"), 1e39):
        with pytest.raises(ValueError, match=r"data\[0\]: beta_scale: expected a finite number"):
            tokenize_chat(tokenizer, [{**RECORDS[0], "beta_scale": bad}])
    talk = [RECORDS[0]["messages"][0], {**RECORDS[0]["messages"][1], "beta_scale": 2}]
    with pytest.raises(ValueError, match="message 1: 'beta_scale' belongs beside the messages"):
        tokenize_chat(tokenizer, [{"messages": talk}])
    with pytest.raises(ValueError, match="unknown key 'beta_scales'; is it meant"):
        tokenize_chat(tokenizer, [{**RECORDS[0], "beta_scales": 2}])
    with pytest.raises(ValueError, match="example 0: beta_scale: expected"):
        TokenTable([Example([1, 2], [-100, 2], [0, 1], beta_scale=-1.0)])


def test_rare_columns_begin_where_they_are_needed():
    """Labels of one's own and weights, in the third of four rows."""
    rows = [
        Example([1, 2, 3], [-100, 2, 3], [0, 1, 2]),
        Example([4, 5, 6], [-100, -100, 6], [0, 0, 1]),
        Example([7, 8, 9], [-100, 5, 9], [0, 1, 2], weights=[1, 0.5, 2]),
        Example([1, 3], [-100, 3], [0, 1]),
    ]
    table = TokenTable(rows)
    assert table.targets.tolist() == [2, 3, -100, -100, 6, -100, 5, 9, -100, 3, -100, -100]
    batch = table.batch([0, 2], torch.device("cpu"), table.count([0, 2]))
    assert batch.targets.tolist() == [[2, 3, -100], [5, 9, -100]]
    assert batch.scale is not None and batch.normalizer == 4.5
    torch.testing.assert_close(4.5 * batch.scale, torch.tensor([[1, 1, 0], [0.5, 2, 0]]))
    for bad, why in (([1, 2], "2 weights for 3"), ([1, -1, 1], "finite and >= 0"),
                     ([1, float("nan"), 1], "finite and >= 0")):  # fmt: skip
        with pytest.raises(ValueError, match=f"data: example 0: .*{why}"):
            TokenTable([Example([1, 2, 3], [-100, 2, 3], [0, 1, 2], weights=bad)])


MEASURE = """
import sys, resource
from deepalign_kernels.data.examples import Example
from deepalign_kernels.data.source import Source
import torch
torch.set_num_threads(1)

def private():
    text = open("/proc/self/smaps_rollup").read()
    return 1024 * int(text.split("Anonymous:")[1].split()[0])

def rows(n):
    ids = list(range(200))
    for i in range(n):
        yield Example(ids, [-100] * 50 + ids[50:], [0] * 50 + list(range(1, 151)))

Source(rows(50), None)
before = private()
n = int(sys.argv[1])
source = Source(rows(n), None)
table, order = source.epoch(0)
for at in range(0, n, n // 50):
    table.batch(order[at : at + 4], torch.device("cpu"), table.count(order[at : at + 4]))
table.content_hash()
files = sum(column.numel() * column.element_size() for column in table._columns.values())
print((private() - before) / (200 * n), files / (200 * n))
"""


@pytest.mark.slow
def test_a_token_of_data_takes_eight_bytes_on_disk_and_less_than_one_in_memory():
    """It was 299 bytes in memory. Measured in a process of its own, over 6 million tokens."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, "30000"], capture_output=True, text=True, check=True
    )
    memory, files = map(float, run.stdout.split())
    assert files <= 8.001 and memory < 1.0, run.stdout


def test_rows_of_a_step_are_of_like_lengths_and_every_row_comes_once():
    rng = np.random.default_rng(0)
    lengths, parts = rng.integers(5, 500, 4000), [int(n % 5 == 0) for n in range(4000)]
    for like in (None, (lengths, 20)):
        order = epoch_order(parts, 7, 1, like)
        assert sorted(order) == list(range(4000))
        steps = [order[at : at + 20] for at in range(0, 4000, 20)]
        assert {sum(parts[row] for row in step) for step in steps} == {4}
        means = np.array([lengths[step].mean() for step in steps])
        spread = np.mean([lengths[step].std() for step in steps])
        assert spread < 20 if like else spread > 100
        # Long and short steps come in no order.
        assert abs(np.corrcoef(means, range(200))[0, 1]) < 0.2
    assert epoch_order(parts, 7, 1, (lengths, 20)) != epoch_order(parts, 7, 2, (lengths, 20))


def test_micro_batches_keep_to_their_tokens():
    rng = np.random.default_rng(1)
    lengths = rng.integers(5, 120, 64).tolist()
    for packed in (False, True):
        groups = micro_batches(range(64), lengths, 8, 200, packed)
        assert sorted(row for group in groups for row in group) == list(range(64))
        for group in groups:
            own = [lengths[row] for row in group]
            assert (sum(own) if packed else max(own) * len(own)) <= 200
            assert packed or len(group) <= 8
        used = sum(lengths) / sum(200 for _ in groups)
        assert used > (0.9 if packed else 0.7)
    assert micro_batches([0, 1], [300, 10], 8, 200, True) == [[0], [1]]  # longer rows are alone


GOOD = [chat("q" * (n % 5), f"answer {n}") for n in range(CHUNK + 40)]
BAD = {  # line: what stands there, and what is wrong with it
    3: ('{"messages": [', "broken JSON, column"),
    4: ('"text"', "expected one JSON object per line, got a str"),
    7: (json.dumps(chat("q")), "no assistant turn, so nothing to train"),
    8: (json.dumps(chat("q", " ")), "message 1: empty assistant turn"),
    9: (json.dumps({"mesages": []}), "expected the keys 'messages', or 'prompt'"),
    CHUNK + 9: ("\udcff", "not UTF-8"),
    CHUNK + 30: (
        json.dumps({"messages": [{**m, "train": False} for m in chat("q", "a")["messages"]]})
        .replace('"user", "content": "q", "train": false', '"user", "content": "q"'),
        "no token of this is trained",
    ),
}  # fmt: skip


def with_bad_lines(path):
    lines = [json.dumps(record) for record in GOOD]
    for line, (text, _) in BAD.items():
        lines.insert(line - 1, text)
    path.write_text("\n".join(lines), "utf-8", "surrogateescape")
    return path


@pytest.mark.parametrize("workers", (0, 2))
def test_bad_records_are_left_out_by_line_if_that_is_asked(tmp_path, workers):
    path, tokenizer = with_bad_lines(tmp_path / "a.jsonl"), build_tokenizer()
    skipped = []
    kept = list(
        examples_of(
            tokenizer, path, Encoding(on_bad_record="skip"), workers=workers, skipped=skipped
        )
    )
    assert same(kept, tokenize_chat(tokenizer, GOOD))
    assert len(skipped) == len(BAD)
    for said, (line, (_, why)) in zip(skipped, BAD.items(), strict=True):
        assert said.startswith(f"{path}:{line}: ") and why in said
    with pytest.raises(ValueError, match="a.jsonl:3: broken JSON"):
        list(examples_of(tokenizer, path, Encoding(), workers=workers))


def test_what_is_left_out_is_known_to_the_cache_too(tmp_path, monkeypatch):
    tokenizer, path = build_tokenizer(), with_bad_lines(tmp_path / "a.jsonl")
    about = (path, tokenizer, Encoding(on_bad_record="skip"))
    first = Source(*about, cache=tmp_path / "cache")
    monkeypatch.setattr("deepalign_kernels.data.source.examples_of", None)  # nothing is tokenised
    again = Source(*about, cache=tmp_path / "cache")
    assert len(first.skipped) == len(BAD) and again.skipped == first.skipped
    monkeypatch.undo()
    with pytest.raises(ValueError, match="a.jsonl:3: broken JSON"):
        Source(path, tokenizer, cache=tmp_path / "cache")
    # Cut off in front of the answer, nothing is left to train.
    long = [chat("a long question " * 9, "yes"), *PLAIN]
    limits = {"max_length": 60, "on_too_long": "truncate"}
    cut = Source(long, tokenizer, about[2], **limits)
    assert cut.skipped[0] == "data[0]: nothing to train within max_length=60 tokens"
    assert len(cut.table(0)) + len(cut.skipped) == len(long)
    with pytest.raises(ValueError, match=r"data\[0\]: nothing to train within the first"):
        Source(long, tokenizer, **limits)


def test_nothing_left_is_an_error_and_other_data_refuse_to_skip(tmp_path):
    tokenizer, skip = build_tokenizer(), Encoding(on_bad_record="skip")
    with pytest.raises(
        ValueError, match=r"left nothing of 2 records; the first: data\[0\]: no ass"
    ):
        Source([chat("q"), {"x": 1}], tokenizer, skip)

    class Own:
        def examples(self, epoch):
            return tokenize_chat(tokenizer, PLAIN)

    with pytest.raises(ValueError, match="on_bad_record: 'skip' is for records .* Own"):
        Source(Own(), tokenizer, skip)
    with pytest.raises(ValueError, match="on_bad_record: expected one of 'error', 'skip'"):
        Encoding(on_bad_record="drop")
