"""Safety-recovery augmentation: what is drawn, what is trained, how the two means are mixed."""

import json
import re
from collections import Counter

import pytest
import stock_templates
import torch
import torch.nn.functional as F
from stock_templates import STOCK
from tiny_chat import RECORDS, RECOVERIES, TEMPLATES, build_model, build_tokenizer, chat
from train_runs import RUN, record_gradients, relative

from deepalign_kernels.data.recovery import ANCHOR, RECOVERY
from deepalign_kernels.train import (
    RecoveryAugmentation,
    TrainConfig,
    TrainingRun,
)

WEIGHED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 2}]
WEIGHED.append({"role": "user", "content": "c"})


def texts(tokenizer, example):
    begin = next(i for i, x in enumerate(example.labels) if x != -100)
    ids = example.input_ids
    return tokenizer.decode(ids[:begin]), tokenizer.decode(ids[begin:])


@pytest.mark.parametrize("glue", ("ids", "text"))
@pytest.mark.parametrize("name", ("marked", "unmarked", "think", "header"))
def test_the_cut_answer_is_context_and_the_refusal_is_trained(name, glue):
    tokenizer = build_tokenizer(TEMPLATES[name])
    source = RecoveryAugmentation(RECOVERIES, tokenizer, p0=0.3, seed=1, glue=glue)
    plain = {r["prompt"]: r for r in RECOVERIES}
    cuts = Counter()
    for epoch in range(12):
        for index, example in enumerate(source.examples(epoch)):
            k = source.draw_k(epoch, index)
            record = RECOVERIES[index]
            prompt = _prompt(tokenizer, record["prompt"])
            context, reply = texts(tokenizer, example)
            assert context == prompt + record["answer"][:k]
            end = "<|im_end|>\n" if name in ("marked", "think") else "<|im_end|>"
            assert reply == " " * (k > 0 and glue == "text") + record["refusal"] + end
            trained = [i for i, x in enumerate(example.labels) if x != -100]
            assert [example.positions[i] for i in trained] == list(range(1, len(trained) + 1))
            assert trained[-1] == len(example.input_ids) - 1 and sum(example.positions) == sum(
                range(len(trained) + 1)
            )
            assert example.part == RECOVERY
            cuts[k > 0] += 1
    assert plain and cuts[True] and cuts[False]


def _prompt(tokenizer, user):
    """Everything up to the first character of an assistant's content."""
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": "\u00a7"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    return text[: text.index("\u00a7")]


def test_k_is_zero_with_p0_and_else_uniform():
    """20 000 draws: 5 sigma around p0, chi-square of the rest against the uniform law."""
    answer = "x" * 300
    source = RecoveryAugmentation(
        [{"prompt": "a", "answer": answer, "refusal": "b"}], build_tokenizer(), max_k=20, p0=0.5
    )
    draws = Counter(source.draw_k(epoch, 0) for epoch in range(20000))
    assert abs(draws[0] - 10000) < 5 * (20000 * 0.25) ** 0.5
    assert sorted(draws) == list(range(21))
    rest = 20000 - draws[0]
    chi2 = sum((draws[k] - rest / 20) ** 2 / (rest / 20) for k in range(1, 21))
    assert chi2 < 44  # 19 degrees of freedom: one in a thousand


def test_k_never_exceeds_the_answer_and_p0_has_its_ends():
    build = lambda **o: RecoveryAugmentation(RECOVERIES, build_tokenizer(), **o)  # noqa: E731
    never, always = build(p0=0.0), build(p0=1.0)
    short = [never.draw_k(epoch, 1) for epoch in range(50)]
    assert set(short) == {1, 2}  # "ok" has two tokens
    assert {always.draw_k(epoch, 0) for epoch in range(50)} == {0}


def test_a_draw_depends_on_seed_epoch_and_index_alone():
    many = RECOVERIES * 10
    build = lambda data, seed=0: RecoveryAugmentation(  # noqa: E731
        data, build_tokenizer(), anchors=RECORDS, seed=seed
    )
    a, b = build(many), build(many)
    b.examples(5)  # whatever was asked before
    torch.manual_seed(1)
    assert a.examples(2) == b.examples(2)
    assert a.examples(2) != a.examples(3)
    assert a.examples(2) != build(many, seed=1).examples(2)
    # An index keeps its draw when the data behind it change: no stream that others consume.
    assert [a.draw_k(2, i) for i in range(6)] == [build(many[:6]).draw_k(2, i) for i in range(6)]


def test_anchors_take_turns():
    source = RecoveryAugmentation(
        RECOVERIES, build_tokenizer(), anchors=RECORDS, anchors_per_recovery=2
    )
    seen = [e.where for epoch in range(7) for e in source.examples(epoch) if e.part == ANCHOR]
    assert len(seen) == 7 * 6 and set(Counter(seen).values()) == {6}  # 42 draws from 7 anchors
    assert seen[:7] != seen[7:14] and sorted(seen[:7]) == sorted(seen[7:14])


def trainer_of(out, model, alpha=0.2, weighting="examples", **options):
    tokenizer = build_tokenizer()
    source = RecoveryAugmentation(
        RECOVERIES,
        tokenizer,
        anchors=RECORDS,
        alpha=alpha,
        weighting=weighting,
        anchors_per_recovery=4,
        p0=0.2,
    )
    base = {"objective": "sft", "batch_size": 15, "max_steps": 1, "warmup_steps": 0}
    base |= {"gradient_accumulation_steps": 1}
    config = TrainConfig(out, progress=False, **{**base, **options})
    return TrainingRun(model, tokenizer, config, source)


def mean_nll(model, examples):
    """(mean over the trained tokens of `examples`, how many), one at a time, plain torch."""
    total, count = 0.0, 0
    for e in examples:
        logp = F.log_softmax(model(input_ids=torch.tensor([e.input_ids])).logits[0], -1)
        for t in range(1, len(e.input_ids)):
            if e.labels[t] != -100:
                total, count = total - logp[t - 1, e.labels[t]], count + 1
    return total / count, count


def test_glue_in_sentencepiece_tokens():
    """As at the start of a turn, where the template has the space; or with one space, not two."""
    tokenizer = stock_templates.sentencepiece(STOCK["llama2"])
    record = {"prompt": "what is tea ?", "answer": "leaves in hot water", "refusal": "no tea"}
    shown = {}
    for glue in ("ids", "text"):
        source = RecoveryAugmentation([record], tokenizer, p0=0.0, glue=glue)
        (example,) = source.examples(3)
        tokens = tokenizer.convert_ids_to_tokens(example.input_ids)
        begin = next(i for i, x in enumerate(example.labels) if x != -100)
        shown[glue] = "".join(tokens[begin:])
    assert shown == {"ids": "no▁tea▁</s>", "text": "▁no▁tea▁</s>"}
    (spaced,) = RecoveryAugmentation(
        [record], tokenizer, p0=0.0, glue="text", separator="\n"
    ).examples(3)
    kept = [x for x in spaced.labels if x != -100]
    assert tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(kept))[0] == "\n"


def test_system_prompts_and_earlier_turns_come_along():
    tokenizer = build_tokenizer()
    talk = chat("hi", "hello", "a sweet recipe ?")["messages"]
    own = [{"role": "system", "content": "be kind"}, *talk]
    records = [{**RECOVERIES[0], "prompt": prompt} for prompt in ("a cake ?", talk, own)]
    anchors = [RECORDS[3], {"prompt": "a", "completion": "b"}]  # the first has a system prompt
    source = RecoveryAugmentation(
        records, tokenizer, anchors=anchors, anchors_per_recovery=1, p0=0.0, system="be safe"
    )
    for index, (example, messages) in enumerate(
        zip(source.examples(0), (chat("a cake ?")["messages"], talk, own), strict=False)
    ):
        k = source.draw_k(0, index)
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": "be safe"}, *messages]
        context, reply = texts(tokenizer, example)
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert context == prompt + RECOVERIES[0]["answer"][:k]
        assert reply == "no sweets here<|im_end|>\n"
    said = {texts(tokenizer, e) for e in source.examples(0) if e.part == ANCHOR}
    starts = sorted(context.split("<|im_end|>")[0] for context, _ in said)
    assert starts == [f"<|im_start|>system\nbe {x}" for x in ("brief", "safe")]
    assert {reply for _, reply in said} == {"hello<|im_end|>\n", "b<|im_end|>\n"}


@pytest.mark.parametrize("weighting", ("examples", "tokens"))
@pytest.mark.parametrize("size, accumulate", ((15, 1), (4, 4)))
def test_the_loss_is_equation_2(tmp_path, size, accumulate, weighting):
    """Whatever the token counts and however the step is cut into micro-batches: "examples" is
    alpha * mean over recovery examples of their whole -log p + (1 - alpha) * that of the anchors,
    up to one factor; "tokens" mixes the means over tokens."""
    model, gold = build_model(0), build_model(0).double()
    grads = record_gradients(model)
    trainer = trainer_of(
        tmp_path,
        model,
        alpha=0.3,
        weighting=weighting,
        batch_size=size,
        gradient_accumulation_steps=accumulate,
    )
    examples = trainer.source._data.examples(0)
    parts = [[e for e in examples if e.part == part] for part in (RECOVERY, ANCHOR)]
    assert [len(p) for p in parts] == [3, 12]
    mean, tokens = zip(*(mean_nll(gold, part) for part in parts), strict=True)
    loss = 0.3 * mean[0] + 0.7 * mean[1]
    if weighting == "examples":
        per_example = [m * n / len(part) for m, n, part in zip(mean, tokens, parts, strict=True)]
        factor = 0.3 * tokens[0] / 3 + 0.7 * tokens[1] / 12
        loss = (0.3 * per_example[0] + 0.7 * per_example[1]) / factor
    loss.backward()
    result = trainer.train()
    assert result.metrics["objective"] == pytest.approx(loss.item(), rel=1e-5)
    assert relative(grads, {n: p.grad for n, p in gold.named_parameters()}) < 1e-5


def test_the_papers_weighting_is_the_mean_over_all_tokens(tmp_path):
    """16 to 64 at alpha = 0.2, here 3 to 12: no token weighs more than another, as in the authors'
    trainer."""
    model, gold = build_model(0), build_model(0).double()
    trainer = trainer_of(tmp_path, model)
    both = mean_nll(gold, trainer.source._data.examples(0))[0]
    assert trainer.train().metrics["objective"] == pytest.approx(both.item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:data. .*record:UserWarning")
def test_weights_and_scales_of_both_kinds_of_records(tmp_path):
    """ "tokens" mixes weighted means; bad records of both kinds are left out by name."""
    first, *rest = RECORDS
    said = [{**m, "weight": 0.3} if m["role"] == "assistant" else m for m in first["messages"]]
    recovery = [
        {**RECOVERIES[0], "weight": 0.5, "beta_scale": 2.0},
        {"prompt": "?"},
        *RECOVERIES[1:],
    ]
    anchors = [{"messages": said, "beta_scale": 3.0}, {"messages": []}, *rest]
    options = {"alpha": 0.3, "weighting": "tokens", "p0": 0.0, "on_bad_record": "skip"}
    data = RecoveryAugmentation(recovery, build_tokenizer(), anchors=anchors, **options)
    assert [why.split(":")[0] for why in data.skipped] == ["recovery[1]", "anchors[1]"]
    plain = RecoveryAugmentation(RECOVERIES, build_tokenizer(), anchors=RECORDS, **options)
    examples, whole, gold = data.examples(0), plain.examples(0), build_model(0).double()
    assert [e.labels for e in examples] == [e.labels for e in whole]
    assert [e.beta_scale for e in examples[:3]] == [2.0, 1.0, 1.0]
    assert 3.0 in {e.beta_scale for e in examples[3:]}
    loss = 0.0
    for part, share in ((RECOVERY, 0.3), (ANCHOR, 0.7)):
        total, weight = 0.0, 0.0
        for e in (e for e in examples if e.part == part):
            mean, tokens = mean_nll(gold, [e])
            w = {(RECOVERY, 2.0): 0.5, (ANCHOR, 3.0): 0.3}.get((part, e.beta_scale), 1.0)
            total, weight = total + w * mean * tokens, weight + w * tokens
        loss = loss + share * total / weight
    config = TrainConfig(tmp_path, objective="sft", **{**RUN, "batch_size": 15})
    result = TrainingRun(build_model(0), build_tokenizer(), config, data).train()
    assert result.metrics["objective"] == pytest.approx(loss.item(), rel=1e-5)
    trained = {}
    for turns in ("all", "last"):
        two = {"anchors": [RECORDS[2]], "train_on": turns}  # of two replies
        row = RecoveryAugmentation(RECOVERIES, build_tokenizer(), **two).examples(0)[-1]
        trained[turns] = [x for x in row.labels if x != -100]
    assert 0 < len(trained["last"]) < len(trained["all"])
    assert trained["all"][-len(trained["last"]) :] == trained["last"]
    with pytest.raises(ValueError, match="recovery: none of its records can be trained; the first"):
        RecoveryAugmentation([{"prompt": "?"}], build_tokenizer(), on_bad_record="skip")


def test_every_step_has_its_share_of_both_parts(tmp_path):
    """A step of five holds one recovery example and four anchors, in every epoch."""
    trainer = trainer_of(tmp_path, build_model(), batch_size=5, max_steps=9)
    for step in range(9):
        epoch, at = divmod(step, trainer.steps_per_epoch)
        table, order = trainer.source.epoch(epoch)
        parts = Counter(table.parts[row] for row in order[at * 5 : at * 5 + 5])
        assert parts == {ANCHOR: 4, RECOVERY: 1}
    trainer.train()


def test_the_constrained_objective_and_its_reference_follow_the_epochs(tmp_path):
    """Data that change with the epoch: all their references are there before the first step."""
    model = build_model(0)
    trainer = trainer_of(tmp_path, model, objective="constrained", batch_size=5, max_steps=7)
    result = trainer.train()
    assert result.step0_max_log_ratio < 1e-4
    assert len(list(tmp_path.glob("reference-*"))) == 3
    frozen = build_model(0)
    other = trainer_of(
        tmp_path / "frozen", frozen, objective="constrained", batch_size=5, max_steps=7,
        reference="frozen",
    ).train()  # fmt: skip
    assert result.metrics["objective"] == pytest.approx(other.metrics["objective"], rel=1e-3)
    assert result.metrics["log_ratio_first"] == pytest.approx(
        other.metrics["log_ratio_first"], rel=2e-2, abs=1e-3
    )


def test_what_a_later_epoch_would_be_refused_for_is_refused_at_once(tmp_path):
    """The draw of k makes examples longer or shorter from epoch to epoch."""
    tokenizer = build_tokenizer()
    source = RecoveryAugmentation(RECOVERIES[:1], tokenizer, p0=0.5)
    lengths = [len(source.examples(epoch)[0].input_ids) for epoch in range(20)]
    while lengths[0] == max(lengths):
        source.seed += 1
        lengths = [len(source.examples(epoch)[0].input_ids) for epoch in range(20)]
    first = lengths[0]
    for how, why in (("error", "max_length="), ("drop", "none is left to train on")):
        config = TrainConfig(
            tmp_path / "out", objective="sft", epochs=20, max_length=first, on_too_long=how
        )
        with pytest.raises(ValueError, match=why):
            TrainingRun(build_model(), tokenizer, config, source)
    changing = RecoveryAugmentation(RECOVERIES, tokenizer, p0=0.5)
    changing.examples = lambda epoch, real=changing.examples: real(epoch)[: 3 - (epoch == 7)]
    config = TrainConfig(tmp_path / "out", objective="sft", epochs=20)
    with pytest.raises(ValueError, match="epoch 7 has 2 examples, epoch 0 had 3"):
        TrainingRun(build_model(), tokenizer, config, changing)
    assert not (tmp_path / "out").exists()


def test_wrong_recovery_data_are_refused_with_their_place(tmp_path):
    path = tmp_path / "recovery.jsonl"
    good = json.dumps(RECOVERIES[0])
    tokenizer = build_tokenizer()
    for bad, why in (
        ("{", "broken JSON"),
        ("[]", "one JSON object per line"),
        (json.dumps({"prompt": "a", "answer": "b"}), "expected the keys 'prompt', 'answer', 'ref"),
        (json.dumps({**RECOVERIES[0], "refusals": "no"}), "is it meant to be 'refusal'"),
        (json.dumps({**RECOVERIES[0], "weight": -1}), "number >= 0 under 'weight'"),
        (json.dumps({**RECOVERIES[0], "beta_scale": -1}), "beta_scale: expected"),
        (json.dumps({**RECOVERIES[0], "prompt": WEIGHED}), "'train' and 'weight' of a message"),
        (json.dumps({**RECOVERIES[0], "answer": " "}), "expected text under 'answer'"),
        (json.dumps({**RECOVERIES[0], "refusal": 3}), "expected text under 'refusal'"),
        (json.dumps({**RECOVERIES[0], "prompt": " "}), "expected a prompt that ends with the user"),
        (json.dumps({**RECOVERIES[0], "prompt": []}), "no user turn"),
        (json.dumps({**RECOVERIES[0], "prompt": chat("a", "b")["messages"]}), "a prompt that ends"),
    ):
        path.write_text(f"{good}\n{bad}\n")
        with pytest.raises(ValueError, match=f"recovery.jsonl:2: .*{why}"):
            RecoveryAugmentation(path, tokenizer)
    odd = {**RECOVERIES[0], "id": 1}
    assert RecoveryAugmentation([odd], tokenizer).examples(0)
    for where, data in (("recovery[0]", [odd]), ("anchors[0]", RECOVERIES)):
        with pytest.raises(ValueError, match=f"{re.escape(where)}: unknown key 'id'"):
            anchors = [{**RECORDS[0], "id": 1}] if data is RECOVERIES else None
            RecoveryAugmentation(data, tokenizer, anchors=anchors, unknown_keys="error")
    path.write_text("")
    with pytest.raises(ValueError, match="recovery: no example in"):
        RecoveryAugmentation(path, tokenizer)
    with pytest.raises(ValueError, match=r"recovery\[0\]: expected the keys"):
        RecoveryAugmentation([{}], tokenizer)
    with pytest.raises(ValueError, match=r"anchors\[1\]: no assistant turn"):
        RecoveryAugmentation(RECOVERIES, tokenizer, anchors=[RECORDS[0], {"messages": []}])
    with pytest.raises(ValueError, match=f"^anchors: {tmp_path}/none: no such file"):
        RecoveryAugmentation(RECOVERIES, tokenizer, anchors=tmp_path / "none")
    for options in (
        {"alpha": 1.5},
        {"p0": -0.1},
        {"max_k": 0},
        {"anchors_per_recovery": 1.5},
        {"weighting": "means"},
        {"glue": "word"},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
            RecoveryAugmentation(RECOVERIES, tokenizer, **options)
