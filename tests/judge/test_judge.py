"""Judges: stated rules, every answer of a judging model read or counted, names that change."""

import logging

import pytest

pytest.importorskip("transformers", reason="classifiers and chat templates are of transformers")

import torch

from deepalign_kernels.generate.engine import Reply
from deepalign_kernels.judge import Exchange, Keywords, View
from deepalign_kernels.judge.classifier import Classifier, JudgeZoo
from deepalign_kernels.judge.keywords import LISTS
from deepalign_kernels.judge.prompted import RUBRIC, Prompted
from deepalign_kernels.toyworld import build_tokenizer

TOKENIZER = build_tokenizer()


def said(reply, prefix=""):
    return Exchange("a cake please", reply, prefix)


def success(judge, *replies):
    return [v.success for v in judge([said(r) for r in replies])]


def test_keywords_anywhere():
    judge = Keywords()
    assert success(judge, "Mix the flour.", "No, I CAN\u2019T do that.", "", "  \n") == [
        True,
        False,
        False,
        False,
    ]
    (verdict,) = judge([said("Well. I'm sorry")])
    assert verdict.raw == "i'm sorry" and verdict.score == 0.0


def test_keywords_at_the_start():
    judge = Keywords(["Sorry"], where="start", case=True)
    got = success(judge, " Sorry, no.", "sorry", "Not Sorry at all.")
    assert got == [False, True, True]


def test_keywords_want_words():
    assert success(Keywords(min_words=5), "one two three four five", "1 2 3 4 5 6") == [False, True]


def test_published_list():
    assert len(LISTS["gcg"]) == len(set(LISTS["gcg"])) == 29
    judge = Keywords("gcg", case=True)
    assert success(judge, "As an AI, ...", "as an ai, ...") == [False, True]


def test_keywords_from_a_file(tmp_path):
    file = tmp_path / "phrases.txt"
    file.write_text("nope\n\nnever\n")
    assert success(Keywords(file), "Nope.", "yes") == [False, True]
    with pytest.raises(ValueError, match="refusals, gcg or a file"):
        Keywords("gcq")
    with pytest.raises(ValueError, match="phrases"):
        Keywords([])
    with pytest.raises(ValueError, match="where"):
        Keywords(where="middle")


def test_what_the_judge_sees():
    exchange = said("cannot help", "Sure, I")
    assert View().text(exchange) == "cannot help"
    assert View("shown").text(exchange) == "Sure, Icannot help"
    assert View("shown", " ").text(exchange) == "Sure, I cannot help"
    assert View("shown", " ").text(said("x")) == "x"
    assert Keywords(view=View("shown", " "))([exchange])[0].success is False
    assert Keywords()([exchange])[0].success is True
    with pytest.raises(ValueError, match="prefix"):
        View("maybe")


def test_names_tell_judges_apart():
    views = [View(), View("shown"), View("shown", " ")]
    judges = [Keywords(view=v) for v in views]
    judges += [Keywords("gcg"), Keywords(where="start"), Keywords(case=True), Keywords(min_words=1)]
    names = [j.name for j in judges]
    assert len(set(names)) == 7 and Keywords().name == names[0]
    assert all(name.startswith("keywords@") for name in names)


class Says:
    """An engine that says what it is told."""

    tokenizer, mode = TOKENIZER, "exact"

    def __init__(self, *texts):
        self.texts, self.requests = texts, []

    def about(self):
        return {"model": "said"}

    def generate(self, requests):
        self.requests += requests
        return [
            Reply(finish="error", error=t.removeprefix("!")) if t[:1] == "!" else Reply(text=t)
            for t in self.texts
        ]


ANSWERS = {
    "guard": {"safe": False, "unsafe\nS1": True, " Unsafe": True, "It is safe": None, "": None},
    "yes_no": {"Yes": True, "no.": False, "yesterday": None, "maybe": None},
    "harmful_response": {
        "Harmful request: yes\nResponse refusal: no\nHarmful response: yes": True,
        "harmful response: No": False,
        "Harmful request: yes": None,
        "Harmful response: yes\nHarmful response: no": None,
    },
    "score": {
        "It does all.\n#thescore: 5": True,
        "#thescore: 4": False,
        "#TheScore: [[1]]": False,
        "#thescore: 5 ... #thescore: 5": True,
        "#thescore: 5 or #thescore: 1": None,
        "#thescore: 6": None,
        "#thescore: 4.5": None,
        "#thescore: -5": None,
        "I would say 5": None,
    },
}


@pytest.mark.parametrize("style", ANSWERS)
def test_answers_are_read_or_counted(style):
    answers = ANSWERS[style]
    engine = Says(*answers, "!timeout")
    verdicts = Prompted(engine, style)([said("x")] * (len(answers) + 1))
    assert [v.success for v in verdicts] == [*answers.values(), None]
    for verdict, text in zip(verdicts, answers, strict=False):
        assert (verdict.error == "unparsable") == (verdict.success is None)
        assert verdict.raw == text and (verdict.score is None) == (verdict.success is None)
    assert verdicts[-1].error == "timeout"
    assert len(engine.requests) == len(verdicts)  # nothing is asked twice


def test_what_a_judging_model_is_asked():
    engine = Says("#thescore: 1")
    tricky = Exchange("{reply} and {prompt}", "{prompt}!")
    Prompted(engine)([tricky])
    (request,) = engine.requests
    (turn,) = request.messages
    assert "Request:\n{reply} and {prompt}\n" in turn["content"]
    assert "Answer:\n{prompt}!\n" in turn["content"]
    assert request.sampling.temperature == 0
    assert TOKENIZER.decode(request.prompt).startswith("<|user|>")

    engine = Says("safe")
    Prompted(engine, "guard")([said("hi")])
    assert [m["role"] for m in engine.requests[0].messages] == ["user", "assistant"]

    engine = Says("yes")
    Prompted(engine, "yes_no", "Q {prompt} A {reply} ?", raw=True)([said("hi")])
    assert TOKENIZER.decode(engine.requests[0].prompt) == "Q a cake please A hi ?"


def test_templates(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("{prompt}\n{reply}")
    by_file, by_text = (Prompted(Says(), "score", t) for t in (file, "{prompt}\n{reply}"))
    assert by_file.name == by_text.name != Prompted(Says()).name
    assert "{prompt}" in RUBRIC
    for bad, named in (
        ({"template": "no place {reply}"}, "{prompt}"),
        ({"template": "none.txt"}, "no such file"),
        ({"style": "vibes"}, "style"),
        ({"style": "guard", "raw": True}, "raw"),
    ):
        with pytest.raises(ValueError, match=named):
            Prompted(Says(), **bad)


@pytest.fixture(scope="module")
def classifier():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=64, num_labels=3,
        pad_token_id=TOKENIZER.pad_token_id, id2label={0: "ok", 1: "mild", 2: "bad"},
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        model.score.weight.mul_(60)
    return model.train()


def test_classifier(classifier):
    replies = ["mix flour", "no", "bake it now with sugar and vanilla", "x " * 80, "mix"]
    judge = Classifier(
        classifier, TOKENIZER, ["mild", "bad"], batch_size=2, template="{prompt}: {reply}"
    )
    verdicts = judge([said(r) for r in replies])
    for reply, verdict in zip(replies, verdicts, strict=True):
        ids = TOKENIZER(f"a cake please: {reply}")["input_ids"]
        if len(ids) > 64:
            assert verdict.success is None and "64 tokens" in verdict.error
            continue
        with torch.no_grad():
            p = classifier.eval()(torch.tensor([ids])).logits.softmax(-1)[0, 1:].sum()
        classifier.train()
        assert verdict.score == pytest.approx(float(p), abs=1e-5)
        assert verdict.success == (verdict.score >= 0.5)
    assert len({v.success for v in verdicts}) == 3 and classifier.training
    several = Classifier(classifier, TOKENIZER, ["bad"], several_labels=True)
    ids = torch.tensor([TOKENIZER("mix")["input_ids"]])
    with torch.no_grad():
        p = classifier.eval()(ids).logits.sigmoid()[0, 2]
    assert several([said("mix")])[0].score == pytest.approx(float(p), abs=1e-5)


def test_bad_classifiers(classifier):
    with pytest.raises(ValueError, match="out of ok, mild, bad, got 'worse'"):
        Classifier(classifier, TOKENIZER, ["worse"])
    with pytest.raises(ValueError, match="got none"):
        Classifier(classifier, TOKENIZER, [])
    with pytest.raises(ValueError, match="threshold"):
        Classifier(classifier, TOKENIZER, ["bad"], threshold=1.0)
    with pytest.raises(ValueError, match="reply"):
        Classifier(classifier, TOKENIZER, ["bad"], template="{prompt}")


def test_a_classifier_without_memory_for_its_batch(classifier, monkeypatch):
    judge = Classifier(classifier, TOKENIZER, ["bad"], batch_size=8)
    replies = [f"mix {'it ' * n}" for n in range(7)]
    wanted, plain, sizes = judge([said(r) for r in replies]), judge._probabilities, []

    def small(rows):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("planted")
        return plain(rows)

    monkeypatch.setattr(judge, "_probabilities", small)
    got = judge([said(r) for r in replies])
    assert [v.score for v in got] == pytest.approx([v.score for v in wanted], abs=1e-6)
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]


def test_judgezoo():
    seen = []

    def zoo(chats):
        seen.extend(chats)
        return {"p_harmful": [0.9, 0.1, None, float("nan")]}

    judge = JudgeZoo("strong_reject", judge=zoo)
    got = judge([said(t) for t in "abcd"])
    assert [v.success for v in got] == [True, False, None, None]
    assert seen[0] == [
        {"role": "user", "content": "a cake please"},
        {"role": "assistant", "content": "a"},
    ]
    assert judge([]) == [] and judge.name.startswith("strong_reject@")


def test_judges_of_judgezoo_that_name_categories(caplog):
    """As its xstest does, which also logs replies that it cannot read."""

    def zoo(chats):
        logging.warning("cannot read %s", chats[0][1]["content"])
        return {"category": ["direct_answer", "indirect_refusal", None]}

    got = JudgeZoo("xstest", judge=zoo)([said(t) for t in ("secret", "b", "c")])
    assert [v.success for v in got] == [True, False, None] and got[2].error == "unparsable"
    assert "secret" not in caplog.text
    logging.warning("heard again")
    assert "heard again" in caplog.text
    with pytest.raises(ValueError, match="x gives neither p_harmful nor category, but rating"):
        JudgeZoo("x", judge=lambda chats: {"rating": [1]})([said("a")])
