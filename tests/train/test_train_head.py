"""The loss of a batch by hand; inside the model's own head and from whole logits: the same run."""

from dataclasses import replace

import pytest
import torch
from tiny_chat import RECORDS, build_model, build_tokenizer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_runs import Bigram, record_gradients, relative, train

import deepalign_kernels as dak
import deepalign_kernels.hf as hf
from deepalign_kernels.data import RecoveryAugmentation
from deepalign_kernels.data.columns import Batch
from deepalign_kernels.train import TrainConfig, TrainingRun
from deepalign_kernels.train.objective import BatchObjective

VOCAB = build_model().config.vocab_size


def mix():
    """Two parts with weights, anchors and recoveries."""
    recovery = [{"prompt": "how?", "answer": "like this and that", "refusal": "no, sorry"}] * 2
    return RecoveryAugmentation(recovery, build_tokenizer(), anchors=RECORDS, alpha=0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tied,data", ((False, "mix"), (True, RECORDS)), ids=("untied mix", "tied plain")
)
@pytest.mark.parametrize(
    "options",
    (
        {"objective": "sft"},
        {"reference": "precomputed"},
        {"reference": "frozen"},
    ),
    ids=str,
)
def test_both_heads_are_one_run(tmp_path, options, tied, data):
    """Gradients and log of one step; then the weights after four, in fp64, where the optimizer does
    not blow rounding up."""
    seen = {}
    for head in ("fused", "logits"):
        model = build_model(0, tie_word_embeddings=tied)
        ref = build_model(1) if "reference" in options else None
        chats = mix() if data == "mix" else data
        grads = record_gradients(model)
        run = {"head": head, "ref_model": ref, "data": chats, "batch_size": 3, **options}
        run["gradient_accumulation_steps"] = 3
        _, result = train(model, tmp_path / head, **run)

        wide = build_model(0, tie_word_embeddings=tied).double()
        run["ref_model"] = ref and ref.double()
        train(wide, tmp_path / f"{head}64", max_steps=4, learning_rate=1e-3, **run)
        weights = {n: p.detach() for n, p in wide.named_parameters()}
        seen[head] = grads, result.metrics, weights
    fused, logits = seen["fused"], seen["logits"]
    assert relative(fused[0], logits[0]) < 1e-5
    assert fused[1].keys() == logits[1].keys()
    for key in fused[1].keys() - {"event", "tokens_per_s"}:
        assert fused[1][key] == pytest.approx(logits[1][key], rel=1e-5, abs=1e-6), key
    assert relative(fused[2], logits[2]) < 1e-6


@pytest.mark.parametrize("parts", (False, True), ids=("one mean", "parts"))
@pytest.mark.parametrize("head", ("fused", "logits"))
def test_a_batch_by_hand_needs_no_loop(head, parts):
    """As a collator of another trainer makes it, with a normalizer on the device; fp64 oracle."""
    ids = torch.tensor([[7, 9, 8, 30, 31, 32], [11, 12, 40, 41, 0, 0]])
    targets = torch.tensor([[-100, -100, 30, 31, 32, -100], [-100, 40, 41, -100, -100, -100]])
    positions = torch.tensor([[0, 0, 1, 2, 3, 0], [0, 1, 2, 0, 0, 0]])
    mask, count = (ids != 0).long(), torch.tensor(11)  # 5 of them are here
    scale = torch.tensor([[0.3], [0.05]]) if parts else None
    batch = Batch(ids, mask, targets, positions, count, scale=scale)
    policy, ref = build_model(0), build_model(1)
    objective = BatchObjective("exact", dak.BetaSchedule(), head=head)
    with objective.on(policy, ref):
        loss, seen = objective.loss(policy, batch, ref)
        stored = replace(batch, ref_logp=objective.logp(ref, batch))
        again, _ = objective.loss(policy, stored)
    loss.backward()

    gold, total = build_model(0).double(), 0.0
    trained = [(0, 2, 30, 0.5), (0, 3, 31, 2.0), (0, 4, 32, 2.0), (1, 1, 40, 0.5), (1, 2, 41, 2.0)]
    logp, ref_logp = (
        m(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        for m in (gold, build_model(1).double())
    )
    for row, t, token, beta in trained:
        ours, theirs = logp[row, t, token], ref_logp[row, t, token].detach()
        share = scale[row, 0].double() if parts else 1 / 11
        total = total + share * -2 / beta * torch.nn.functional.logsigmoid(beta * (ours - theirs))
        for found, value in ((seen.logp, ours), (seen.ref_logp, theirs)):
            assert found[row, t].item() == pytest.approx(value.item(), rel=1e-5)
    total.backward()
    assert loss.item() == again.item() == pytest.approx(total.item(), rel=1e-5)
    grads, gold_grads = ({n: p.grad for n, p in m.named_parameters()} for m in (policy, gold))
    assert relative(grads, gold_grads) < 1e-5


class Wide(TorchDispatchMode):
    """Shapes of all tensors that torch's ops return with the vocabulary as last dimension; not of
    broadcast views, which hold nothing."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if not isinstance(x, torch.Tensor) or x.dim() < 2 or x.shape[-1] != VOCAB:
                continue
            if x.untyped_storage().nbytes() >= x.numel() * x.element_size():
                self.shapes.add(tuple(x.shape))
        return out


@pytest.mark.parametrize("reference", ("precomputed", "frozen"))
@pytest.mark.parametrize("objective", ("constrained", "sft"))
def test_no_logits_outside_the_chunks_of_the_op(tmp_path, objective, reference):
    """Not in a step, nor before it: reference, check at step 0, probe. A chunk lives in the op."""
    shapes = {}
    for head in ("fused", "logits"):
        with Wide() as wide:
            train(
                build_model(0), tmp_path / head, objective=objective, reference=reference, head=head
            )
        shapes[head] = wide.shapes
    assert shapes["fused"] <= {(1, 1, VOCAB)}  # the probe's one token
    assert any(len(s) == 3 and s[0] * s[1] > 100 for s in shapes["logits"])  # seen if there


def attached(model):
    return "forward" in model.__dict__


@pytest.mark.parametrize("reference", ("precomputed", "frozen"))
def test_models_come_back_as_they_were(tmp_path, reference):
    def run(name, *models, **options):
        model, ref = models
        return train(model, tmp_path / name, reference=reference, ref_model=ref, **options)

    seen = []
    callbacks = [lambda trainer, _: seen.append(attached(trainer.model))]
    model, ref = build_model(0), build_model(1)
    names = set(model.__dict__), set(ref.__dict__)
    trainer, _ = run("clean", model, ref, callbacks=callbacks)
    assert seen == [True]
    assert (set(model.__dict__), set(ref.__dict__)) == names
    assert trainer.model is model and type(model).forward is type(build_model()).forward

    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run("failed", model, ref, callbacks=[fail])
    assert not attached(model) and not attached(ref)

    model, ref = hf.attach(build_model(0)), hf.attach(build_model(1))
    before = model.__dict__["forward"], ref.__dict__["forward"]
    run("kept", model, ref)
    with pytest.raises(ZeroDivisionError):
        run("kept and failed", model, ref, callbacks=[fail])
    assert (model.__dict__["forward"], ref.__dict__["forward"]) == before
    assert hf.verify(model, torch.tensor([[5, 6, 7]])) < 1e-4


def test_a_checkpoint_knows_nothing_of_attach(tmp_path):
    model = build_model(0)
    train(model, tmp_path, save_every=1)
    (path,) = tmp_path.glob("checkpoint-*.pt")
    state = torch.load(path, weights_only=True)
    build_model(1).load_state_dict(state["model"])
    assert all(torch.equal(state["model"][n], p) for n, p in model.state_dict().items())


class Doubled(nn.Linear):
    """A head that is no plain nn.Linear."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_an_unknown_head_is_refused_and_trained_from_logits_when_asked(tmp_path):
    def strange():
        model = build_model(0)
        model.lm_head.__class__ = Doubled
        return model

    why = "head='fused' .* LlamaForCausalLM does not allow: .*Doubled, expected.* head='logits'"
    model = strange()
    for name, models in (("model", (model, None)), ("ref_model", (build_model(0), model))):
        config = TrainConfig(tmp_path / "no", max_steps=1)
        with pytest.raises(ValueError, match=f"^{name}: {why}"):
            TrainingRun(models[0], build_tokenizer(), config, RECORDS, models[1])
    with pytest.raises(ValueError, match="^model: head='fused' .* Bigram does not allow"):
        config = TrainConfig(tmp_path / "no", objective="sft")
        TrainingRun(Bigram(), build_tokenizer(), config, RECORDS)
    assert not (tmp_path / "no").exists() and not attached(model)
    _, result = train(strange(), tmp_path / "yes", head="logits", objective="sft")
    assert result.steps == 1
