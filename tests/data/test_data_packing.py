"""Packed batches: no conversation sees another, positions and weights travel along."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_chat import RECORDS, RECOVERIES, build_model, build_tokenizer, chat
from tiny_models import FAMILIES, build
from train_runs import RUN, Bigram, record_gradients, relative, train

from deepalign_kernels.data.columns import TokenTable
from deepalign_kernels.data.packing import micro_batches
from deepalign_kernels.train import (
    Example,
    RecoveryAugmentation,
    TrainConfig,
    TrainingRun,
    tokenize_chat,
)
from deepalign_kernels.train.forwards import check_isolation

CPU = torch.device("cpu")
LEAKS = ("opt", "opt_proj", "bloom", "mamba", "mpt", "recurrent_gemma", "electra")
if transformers.__version__ < "5":
    LEAKS += ("stablelm",)


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
def test_logits_of_a_packed_document_are_those_alone(attention):
    model = build_model(0, attn_implementation=attention).eval()
    model.config.use_cache = False
    examples = tokenize_chat(build_tokenizer(), RECORDS)
    table, rows = TokenTable(examples), [3, 0, 5, 1]
    batch = table.batch(rows, CPU, table.count(rows), packed=True)
    assert batch.input_ids.shape == (1, sum(table.lengths[r] for r in rows))
    assert batch.attention_mask is None and batch.tokens == batch.input_ids.numel()
    with torch.no_grad():
        logits, at = model(**batch.inputs()).logits[0], 0
        for row in rows:
            example = examples[row]
            alone = model(input_ids=torch.tensor([example.input_ids])).logits[0]
            torch.testing.assert_close(logits[at : at + len(alone)], alone, rtol=1e-5, atol=1e-5)
            # Targets and positions are those of the row by itself, and none leads to the next row.
            want = [*example.labels[1:], -100]
            assert batch.targets[0, at : at + len(alone)].tolist() == want
            assert batch.positions[0, at : at + len(alone)].tolist() == [*example.positions[1:], 0]
            at += len(alone)


@pytest.mark.parametrize("name", FAMILIES)
def test_models_that_leak_are_refused(name):
    """Which do is known from the logits, not from the name: here by hand."""
    model = build(name).eval()
    model.config.use_cache = False
    ids = torch.randint(3, 160, (2, 20), generator=torch.Generator().manual_seed(0))
    ids[1, 12:] = ids[0, 12:]
    positions = torch.tensor([[*range(12), *range(8)]])
    with torch.no_grad():
        first, second = (
            model(input_ids=row[None], position_ids=positions).logits[0, 12:]
            for row in ids
        ) if name not in LEAKS else (torch.zeros(1), torch.ones(1))  # fmt: skip
    if (first - second).abs().max() < 1e-5:
        check_isolation("model", model)
    else:
        assert name in LEAKS
        with pytest.raises(ValueError, match="packing: model .*ForCausalLM (lets|takes no)"):
            check_isolation("model", model)


def test_a_model_without_position_ids_is_refused(tmp_path):
    data = [Example([1, 2, 3], [-100, 2, 3], [0, 1, 2])] * 4
    with pytest.raises(ValueError, match="packing: model Bigram takes no position_ids"):
        train(Bigram(), tmp_path / "out", data, objective="sft", head="logits", packing=True)


def gradients_of(out, data, **options):
    model = build_model(0)
    grads = record_gradients(model)
    _, result = train(model, out, data, **options)
    return grads, result.metrics


MIXED = [
    *RECORDS,
    {
        "messages": [
            *chat("tell me more", "a first answer , not trained", "go on")["messages"],
            {"role": "assistant", "content": "half as much", "weight": 0.5},
        ]
    },
]
MIXED[-1]["messages"][1]["train"] = False


def data_of(kind):
    if kind == "parts":
        tokenizer = build_tokenizer()
        return RecoveryAugmentation(RECOVERIES, tokenizer, anchors=MIXED, p0=0.2, alpha=0.3)
    return MIXED


@pytest.mark.parametrize("kind", ("plain", "parts"))
@pytest.mark.parametrize("objective, head", (("sft", "fused"), ("constrained", "logits")))
def test_a_packed_step_has_the_gradient_of_a_padded_one(tmp_path, kind, objective, head):
    """Also with a limit of tokens, and with several micro-batches; the reference is another model,
    so that beta, by position, matters."""
    options = {"objective": objective, "head": head, "batch_size": 15, "learning_rate": 1e-3}
    if objective == "constrained":
        options["ref_model"] = build_model(1)
    plain, metrics = gradients_of(tmp_path / "a", data_of(kind), **options)
    for n, how in enumerate(
        ({"packing": True}, {"packing": True, "max_batch_tokens": 120}, {"max_batch_tokens": 150})
    ):
        grads, found = gradients_of(tmp_path / str(n), data_of(kind), **options, **how)
        assert found["objective"] == pytest.approx(metrics["objective"], rel=1e-5)
        assert relative(grads, plain) < 1e-5, how


@pytest.mark.parametrize("head", ("fused", "logits"))
def test_weights_of_messages_reach_the_loss(tmp_path, head):
    """The weighted mean over all trained tokens of the step, in plain torch."""
    grads, metrics = gradients_of(
        tmp_path, MIXED, objective="sft", head=head, batch_size=3, gradient_accumulation_steps=3
    )
    gold, total, weight = build_model(0).double(), 0.0, 0.0
    examples = tokenize_chat(build_tokenizer(), MIXED)
    assert sum(e.weights is not None for e in examples) == 1
    for e in examples:
        logp = F.log_softmax(gold(input_ids=torch.tensor([e.input_ids])).logits[0], -1)
        for t in range(1, len(e.labels)):
            if e.labels[t] != -100:
                w = 1.0 if e.weights is None else e.weights[t]
                total, weight = total - w * logp[t - 1, e.labels[t]], weight + w
    (total / weight).backward()
    assert metrics["objective"] == pytest.approx((total / weight).item(), rel=1e-5)
    assert relative(grads, {n: p.grad for n, p in gold.named_parameters()}) < 1e-5


def test_a_run_with_a_cache_groups_and_limits_is_resumed(tmp_path):
    """All at once; a resume may change the limit, which changes no gradient, but not the order."""
    tokenizer = build_tokenizer()
    base = {
        **RUN, "objective": "sft", "max_steps": 4, "batch_size": 2, "save_every": 2,
        "packing": True, "group_by_length": True, "data_cache": tmp_path / "cache",
    }  # fmt: skip
    run = TrainingRun(build_model(), tokenizer, TrainConfig(tmp_path / "a", **base), RECORDS)
    lengths = run.source.table(0).lengths
    steps = [run.source.epoch(0)[1][at : at + 2] for at in range(0, 6, 2)]
    ordered = sorted(range(len(lengths)), key=lambda row: lengths[row])
    assert sorted(map(sorted, steps)) == sorted(sorted(ordered[at : at + 2]) for at in (0, 2, 4))
    assert sum(len(g) for g in micro_batches(steps[0], lengths, 2, 100, True)) == 2
    run.train()
    changed = {**base, "max_batch_tokens": 110}
    TrainingRun(build_model(), tokenizer, TrainConfig(tmp_path / "a", **changed), RECORDS).train(
        resume=True
    )
    other = TrainConfig(tmp_path / "a", **{**base, "group_by_length": False})
    with pytest.raises(ValueError, match="group_by_length was True, is False"):
        TrainingRun(build_model(), tokenizer, other, RECORDS).train(resume=True)


def test_bad_choices_are_refused(tmp_path):
    with pytest.raises(ValueError, match="max_batch_tokens: expected at least .*, got 20; or give"):
        train(build_model(), tmp_path / "out", max_batch_tokens=20)
    assert not (tmp_path / "out").exists()
    for options in ({"max_batch_tokens": 0}, {"train_on": "some"}, {"unknown_keys": "keep"},
                    {"data_workers": -1}):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
            TrainConfig(tmp_path, **options)
