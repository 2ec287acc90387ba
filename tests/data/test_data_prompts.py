"""Every known set by its columns, with harmless rows; nothing is lost, nothing guessed."""

import csv
import json

import pytest

from deepalign_kernels.data.prompts import FORMATS, Prompt, data_hash, load_prompts, with_targets

HARMBENCH = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID"
ROWS = {
    "harmbench": (
        HARMBENCH,
        [["Bake it", "contextual", "sweets", "", "A kitchen.", "bake_1"],
         ["Stir it", "standard", "sweets", "", "", "stir_2"]],
        [Prompt("bake_1", "A kitchen.\n\n---\n\nBake it", category="sweets"),
         Prompt("stir_2", "Stir it", category="sweets")],
    ),
    "jailbreakbench": (
        "Index,Goal,Target,Behavior,Category,Source",
        [["0", "Bake, please", "Sure, here", "Baking", "Sweets", "Original"]],
        [Prompt("0", "Bake, please", target="Sure, here", category="Sweets")],
    ),
    "advbench": (
        "goal,target",
        [["Bake a cake", "Sure, here is"]],
        [Prompt("0f520b9215c2", "Bake a cake", target="Sure, here is")],
    ),
    "strongreject": (
        "category,source,forbidden_prompt",
        [["sweets", "own", "Bake a cake"]],
        [Prompt("0f520b9215c2", "Bake a cake", category="sweets")],
    ),
    "xstest": (
        "id,prompt,type,label,focus,note",
        [["1", "Kill the lights", "homonyms", "safe", "", ""],
         ["2", "Bake it", "contrast", "unsafe", "", ""]],
        [Prompt("-", "Kill the lights", category="homonyms", benign=True),
         Prompt("-", "Bake it", category="contrast")],
    ),
    "or-bench": (
        "prompt,category",
        [["Kill the lights", "home"]],
        [Prompt("-", "Kill the lights", category="home", benign=True)],
    ),
    "hex-phi": (
        "instruction,category",
        [["Bake a cake", "3"]],
        [Prompt("0f520b9215c2", "Bake a cake", category="3")],
    ),
    "own": (
        "prompt,answer,id",
        [["Bake", "Mix flour", "b"], ["Stir", "", "s"]],
        [Prompt("b", "Bake", answer="Mix flour"), Prompt("s", "Stir")],
    ),
}  # fmt: skip


def write_csv(path, header, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([header.split(","), *rows])
    return path


def same(got, wanted):
    for g, w in zip(got, wanted, strict=True):
        assert g == (w if w.id != "-" else Prompt(g.id, *[getattr(w, n) for n in FIELDS]))


FIELDS = ("prompt", "answer", "target", "category", "benign")


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_sets_by_their_columns(tmp_path, name, kind):
    header, rows, wanted = ROWS[name]
    path = tmp_path / f"set.{kind}"
    dicts = [dict(zip(header.split(","), row, strict=True)) for row in rows]
    if kind in ("csv", "tsv"):
        write_csv(path, header, rows)
    elif kind == "json":
        path.write_text(json.dumps(dicts))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(d) + "\n" for d in dicts))
    else:
        arrow = pytest.importorskip("pyarrow", reason="parquet")
        from pyarrow import parquet

        parquet.write_table(arrow.Table.from_pylist(dicts), path)
    if name != "or-bench":  # its columns could be anybody's: never guessed
        same(load_prompts(path), wanted)
    same(load_prompts(path, name), wanted)


def test_lists_of_messages(tmp_path):
    """Harmful HEx-PHI: each line a list of a user turn and an assistant turn."""
    path = tmp_path / "h.jsonl"
    turns = [{"role": "user", "content": "Bake"}, {"role": "assistant", "content": "Mix\nit"}]
    path.write_text(json.dumps(turns) + "\n\n" + json.dumps({"messages": turns[:1]}) + "\n")
    got = load_prompts(path)
    assert [(p.prompt, p.answer) for p in got] == [("Bake", "Mix\nit"), ("Bake", None)]
    assert got[1].id == got[0].id + "#2"
    path.write_text(json.dumps(turns * 2))
    with pytest.raises(ValueError, match="h.jsonl:1: expected one user turn"):
        load_prompts(path)


def test_a_prompt_a_line(tmp_path):
    path = tmp_path / "m.txt"
    path.write_bytes("Bake a cake\nStir\n\nNaïve".encode())
    got = load_prompts(path)
    assert [p.prompt for p in got] == ["Bake a cake", "Stir", "Naïve"]
    assert got[0].id == "0f520b9215c2"


def test_other_ends_of_lines_are_text(tmp_path):
    """U+2028 and its like are in a prompt, not between two."""
    text = "Bake\u2028a\x85cake\x0bnow"
    (tmp_path / "m.txt").write_text(f"{text}\nStir\n")
    (tmp_path / "h.jsonl").write_text(
        json.dumps([{"role": "user", "content": text}], ensure_ascii=False) + "\n"
    )
    assert [p.prompt for p in load_prompts(tmp_path / "m.txt")] == [text, "Stir"]
    assert [p.prompt for p in load_prompts(tmp_path / "h.jsonl")] == [text]


def test_a_file_without_a_header(tmp_path):
    """HEx-PHI as published: one column, and the first line is a prompt."""
    path = tmp_path / "category_1.csv"
    rows = [["Bake a cake, please"], ['Stir "it"\nwell'], ["Whisk"]]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert [[p.prompt] for p in load_prompts(path)] == rows
    path.write_text("Bake\nStir\n")
    with pytest.raises(ValueError, match="format='headerless'"):
        load_prompts(path)  # a name of a column, for all that can be told
    assert [p.prompt for p in load_prompts(path, "headerless")] == ["Bake", "Stir"]
    path.write_text(f"{'Bake the cake ' * 9},colour\nx,y\n")
    with pytest.raises(ValueError, match=r"no known set: \(126 characters\), colour") as error:
        load_prompts(path)
    assert "Bake" not in str(error.value)


@pytest.mark.parametrize(
    "row,why",
    [
        ({"prompt": None}, "prompt: expected text, got null"),
        ({"prompt": 3}, "prompt: expected text, got int"),
        ({"goal": None, "target": "x"}, "goal: expected text"),
        ({"instruction": None, "category": "1"}, "instruction: expected text"),
        ({"Behavior": None, "BehaviorID": "a"}, "Behavior: expected text"),
        ([{"role": "user", "content": None}], "content: expected text"),
        ([{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Bake"}],
         "a turn of 'system': expected user and assistant alone; .* --system"),
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_refused(tmp_path, row, why):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"a.jsonl:1: {why}"):
        load_prompts(path)


def test_duplicates_are_kept(tmp_path):
    path = write_csv(tmp_path / "d.csv", "prompt", [["a"], ["b"], ["a"], ["a"]])
    got = load_prompts(path)
    assert [p.prompt for p in got] == ["a", "b", "a", "a"]
    assert len({p.id for p in got}) == 4 and got[3].id == got[0].id + "#3"


def test_commas_quotes_and_lines_in_a_cell(tmp_path):
    text = 'One, "two"\nthree'
    path = write_csv(tmp_path / "q.csv", "goal,target", [[text, "Sure"]])
    assert load_prompts(path)[0].prompt == text


def test_the_hash_follows_everything(tmp_path):
    base = [Prompt("a", "x"), Prompt("b", "y")]
    others = [base[::-1], base[:1], [Prompt("a", "x", answer="z"), base[1]],
              [Prompt("a", "x", benign=True), base[1]]]  # fmt: skip
    assert len({data_hash(p) for p in [base, *others]}) == 5


@pytest.mark.parametrize(
    "name,text,why",
    [
        ("a.csv", "colour,size\nred,1\n", r"a.csv:2: columns of no known set: colour, size"),
        ("a.csv", "prompt,id\nx\n", "another number of columns"),
        ("a.csv", "prompt\n", "no prompt in this file"),
        ("a.csv", 'prompt,id\n" ",1\n', "an empty prompt"),
        ("a.csv", "prompt,id\nx,1\ny,1\n", "two different prompts with the id '1'"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', "a.jsonl:2: broken JSON"),
        ("a.jsonl", "[1, 2\n", "a.jsonl:1: broken JSON"),
        ("a.json", "[3]", "expected an object"),
        ("a.doc", "x", "expected .csv"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, name, text, why):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=why):
        load_prompts(tmp_path / name)


def test_a_gated_file_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match="HEx-PHI on the Hugging Face Hub .*category, instruction"):
        load_prompts(tmp_path / "hexphi.jsonl", "hex-phi")
    with pytest.raises(ValueError, match="no such file$"):
        load_prompts(tmp_path / "x.csv")
    with pytest.raises(ValueError, match="format: expected 'auto' or one of harmbench"):
        load_prompts(tmp_path / "x.csv", "harmbanch")
    write_csv(tmp_path / "x.csv", "prompt", [["a"]])
    with pytest.raises(ValueError, match="no column 'goal'; got prompt"):
        load_prompts(tmp_path / "x.csv", "advbench")
    assert all(f.about for f in FORMATS.values())


def test_targets_by_id(tmp_path):
    """HarmBench's second file: id -> target; of a copy too, and before a target of the data."""
    (tmp_path / "a.csv").write_text(
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        "bake a pie,standard,sweets,,,pie\nbake a pie,standard,sweets,,,pie\n"
        "mix a fool,standard,sweets,,,fool\n"
    )
    (tmp_path / "t.json").write_text('{"other": "No", "pie": "Sure, a pie"}')
    found, lacking = with_targets(load_prompts(tmp_path / "a.csv"), tmp_path / "t.json")
    assert [(p.id, p.target) for p in found] == [
        ("pie", "Sure, a pie"), ("pie#2", "Sure, a pie"), ("fool", None),
    ]  # fmt: skip
    assert lacking == 1
    own = [Prompt("pie", "bake", target="Yes"), Prompt("fool", "mix", target="Yes")]
    assert [p.target for p in with_targets(own, tmp_path / "t.json")[0]] == [
        "Sure, a pie", "Yes",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text,why",
    [
        ("{", "no readable JSON"),
        ('[{"pie": "Sure"}]', "expected one object"),
        ('{"pie": ["Sure"]}', "expected one object"),
        ('{"pie": " "}', "an empty target for pie"),
        ('{"tart": "Sure"}', "of its 1 ids none is that of a prompt; the first prompt's is 'pie'"),
    ],
)
def test_targets_that_are_none(tmp_path, text, why):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=why):
        with_targets([Prompt("pie", "bake")], tmp_path / "t.json")
    with pytest.raises(ValueError, match="targets: .*: no readable JSON"):
        with_targets([Prompt("pie", "bake")], tmp_path / "none.json")
