"""The divergence from a reference over the whole vocabulary, from wherever the reference comes;
against full softmaxes in fp64."""

import json

import pytest
import torch
from tiny_chat import RECORDS, build_model, build_tokenizer
from train_runs import RUN, log_of, record_gradients, relative, train

from deepalign_kernels.data.examples import tokenize_chat
from deepalign_kernels.train import TrainConfig, TrainingRun

BETAS = {1: 0.5, 2: 2.0, 3: 2.0, 4: 2.0, 5: 2.0}
KL = 0.7


def by_hand(policy, reference, objective, positions, kept):
    """(loss less its constant, gradients by name, mean divergence of first tokens) over RECORDS.

    `reference`: ids -> its last hidden states and its head; `kept`: what is stored of the former.
    """
    total, shown, count, firsts = 0.0, 0.0, 0, []
    for e in tokenize_chat(build_tokenizer(), RECORDS):
        ids = torch.tensor([e.input_ids])
        p = policy(input_ids=ids).logits[0].log_softmax(-1)
        with torch.no_grad():
            hidden, head = reference(ids)
            exact = (hidden @ head.T).log_softmax(-1)
            q = (hidden.to(kept).double() @ head.T).log_softmax(-1)
        for t in range(1, len(e.labels)):
            if e.labels[t] == -100:
                continue
            count, anchored = count + 1, positions is None or 1 <= e.positions[t] <= positions
            a, b = p[t - 1, ids[0, t]], (q if anchored else exact)[t - 1, ids[0, t]]
            if objective == "sft":
                total = total - a
            else:
                beta = BETAS.get(e.positions[t], 0.1)
                total = total + (2 / beta) * torch.nn.functional.softplus(beta * (b - a))
                shown -= 2 * torch.log(torch.tensor(2.0)).item() / beta
            if anchored:
                kl = (p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum()
                total = total + KL * kl
                firsts += [kl.item()] * (e.positions[t] == 1)
    (total / count).backward()
    grads = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    return (total.item() + shown) / count, grads, sum(firsts) / len(firsts)


def hidden_and_head(model):
    def of(ids):
        return model.model(input_ids=ids).last_hidden_state[0], model.lm_head.weight

    return of


@pytest.mark.parametrize(
    "options",
    (
        {"objective": "sft"},
        {"objective": "constrained", "kl_positions": 3},
        {"objective": "sft", "kl_positions": 2, "reference_dtype": "float32"},
        {"objective": "constrained", "reference_dtype": "float32"},
        {"objective": "constrained", "reference": "model", "kl_positions": 3},
        {"objective": "sft", "reference": "frozen", "kl_positions": 3, "head": "logits"},
    ),
    ids=str,
)
def test_a_step_is_the_objective_by_hand(tmp_path, options):
    policy, other = build_model(0).double(), build_model(1).double()
    exact = options.get("reference") or options.get("reference_dtype") == "float32"
    gold, gold_grads, first = by_hand(
        policy, hidden_and_head(other), options["objective"], options.get("kl_positions"),
        torch.float64 if exact else torch.bfloat16,
    )  # fmt: skip
    model = build_model(0)
    grads = record_gradients(model)
    _, result = train(
        model, tmp_path, ref_model=build_model(1), batch_size=2, gradient_accumulation_steps=4,
        kl_coef=KL, **options,
    )  # fmt: skip
    assert result.metrics["objective"] == pytest.approx(gold, rel=1e-5, abs=1e-5)
    assert relative(grads, gold_grads) < 1e-5
    assert result.metrics["kl_first"] == pytest.approx(first, rel=1e-4)
    positions = options.get("kl_positions")
    assert (result.metrics["kl_rest"] is None) == (positions is not None)


def adapted(*, head=False, **options):
    """A LoRA model whose adapters do something; `head`: a trained copy of the head as well."""
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
        modules_to_save=["lm_head"] if head else None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = peft.get_peft_model(build_model(0, **options), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or ("modules_to_save" in name and p.requires_grad):
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    "options",
    (
        {"objective": "sft"},
        {"objective": "constrained", "kl_positions": 3},
        {"objective": "constrained", "adapted head": True},
        {"objective": "constrained", "head": "logits"},
    ),
    ids=str,
)
def test_a_model_without_its_adapters(tmp_path, options):
    options = dict(options)
    head = options.pop("adapted head", False)
    policy, base = adapted(head=head).double(), build_model(0).double()
    gold, gold_grads, first = by_hand(
        policy, hidden_and_head(base), options["objective"], options.get("kl_positions"),
        torch.float64,
    )  # fmt: skip
    # One adapter's matrix is not to be trained: PEFT, switching adapters on, would have it so.
    frozen = next(n for n in gold_grads if "lora_A" in n)
    model = adapted(head=head)
    model.get_parameter(frozen).requires_grad_(False)
    grads = record_gradients_of(model)
    _, result = train(
        model, tmp_path, batch_size=2, gradient_accumulation_steps=4, kl_coef=KL,
        reference="adapter_off", **options,
    )  # fmt: skip
    del gold_grads[frozen]
    assert result.metrics["objective"] == pytest.approx(gold, rel=1e-5, abs=1e-5)
    assert relative(grads, gold_grads) < 1e-5
    assert result.metrics["kl_first"] == pytest.approx(first, rel=1e-4)
    assert not model.get_parameter(frozen).requires_grad
    assert not list(tmp_path.glob("reference-*"))


def record_gradients_of(model):
    """As `record_gradients`, of what is trained."""
    seen = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(
                lambda p, name=name: seen.__setitem__(name, p.grad.clone())
            )
    return seen


def test_without_adapters_a_run_resumes_and_evaluates(tmp_path):
    def stop(run, record):
        if record["step"] == 2:
            raise KeyboardInterrupt

    def run(out, callbacks=(), **more):
        base = {**RUN, "objective": "sft", "kl_coef": KL, "reference": "adapter_off"}
        base |= {"max_steps": 3, "learning_rate": 1e-2, **more}
        parts = (adapted(), build_tokenizer(), TrainConfig(out, **base), RECORDS, None, callbacks)
        return TrainingRun(*parts, eval_data=RECORDS[:3])

    whole = run(tmp_path / "whole", eval_every=1)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", [stop]).train()
    again = run(tmp_path / "parts")
    again.train(resume=True)
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    first, *_, last = [r for r in log_of(tmp_path / "whole") if r["event"] == "eval"]
    assert first["kl_at"][0] > last["kl_at"][0] > 0  # the adapters come back to the base


def test_what_adapter_off_cannot_be(tmp_path):
    def refused(why, model, **options):
        ref_model = options.pop("ref_model", None)
        config = TrainConfig(tmp_path, **{**RUN, "reference": "adapter_off", **options})
        with pytest.raises(ValueError, match=why):
            TrainingRun(model, build_tokenizer(), config, RECORDS, ref_model)

    refused("'adapter_off' needs a PEFT model, got a LlamaForCausalLM", build_model(0))
    refused("ref_model: reference='adapter_off' is the model itself", adapted(),
            ref_model=build_model(0))  # fmt: skip
    moving = adapted()
    moving.get_base_model().model.norm.weight.requires_grad_(True)
    refused("'adapter_off' would move with .*model.norm.weight, which is trained", moving)
    refused("reference: 'model' needs a ref_model", build_model(0), reference="model")


def weighted():
    """RECORDS, the reply of one of which counts for little."""
    first, *rest = RECORDS
    said = [{**m, "weight": 0.3} if m["role"] == "assistant" else m for m in first["messages"]]
    return [{"messages": said}, *rest]


@pytest.mark.parametrize("positions", (None, 3))
def test_batches_of_all_kinds_are_one_objective(tmp_path, positions):
    """Accumulated, packed, cut by tokens, with weights of tokens: the same gradients."""
    gold, base = None, {"objective": "constrained", "kl_coef": KL, "kl_positions": positions}
    data = weighted() if positions else RECORDS
    for number, options in enumerate(
        (
            {"batch_size": 7},
            {"batch_size": 2, "gradient_accumulation_steps": 4},
            {"batch_size": 4, "gradient_accumulation_steps": 2, "packing": True},
            {"batch_size": 7, "packing": True, "max_batch_tokens": 130},
            {"batch_size": 7, "max_batch_tokens": 220},
            {"batch_size": 7, "gradient_checkpointing": True},
            {"batch_size": 7, "reference": "frozen"},
        )
    ):
        model = build_model(0)
        grads = record_gradients(model)
        more = {"reference_dtype": "float32", **base, **options}
        train(model, tmp_path / str(number), data, ref_model=build_model(1), **more)
        gold = gold or grads
        assert relative(grads, gold) < 1e-5, options


def test_held_out_data_have_the_divergence_where_it_is_kept(tmp_path):
    other = build_model(1)
    base = {**RUN, "objective": "sft", "kl_coef": KL, "learning_rate": 0.0 + 1e-9}
    rows = {}
    for name, options in (
        ("kept", {"reference_dtype": "float32"}),
        ("first", {"reference_dtype": "float32", "kl_positions": 2}),
        ("live", {"reference": "model"}),
    ):
        config = TrainConfig(tmp_path / name, **base, **options)
        parts = (build_model(0), build_tokenizer(), config, RECORDS, other)
        TrainingRun(*parts, eval_data=RECORDS[:3]).train()
        rows[name] = next(r for r in log_of(tmp_path / name) if r["event"] == "eval")
    assert rows["kept"]["kl_at"] == pytest.approx(rows["live"]["kl_at"], rel=1e-4)
    for name in ("nll_at", "log_ratio_at"):
        assert rows["first"][name] == pytest.approx(rows["live"][name], rel=1e-4)
    assert rows["first"]["kl_at"][:2] == pytest.approx(rows["live"]["kl_at"][:2], rel=1e-4)
    assert rows["first"]["kl_at"][2:] == [None] * 14
    assert rows["kept"]["objective"] == pytest.approx(rows["live"]["objective"], rel=1e-4)


def test_the_head_of_a_frozen_one_is_not_kept_twice(tmp_path):
    """In memory: LoRA's head is the reference's, a trained head needs a copy from before."""
    heads = {}
    for name, model in (("LoRA", adapted()), ("full", build_model(0))):
        own = model.get_output_embeddings().weight

        def look(run, record, name=name, own=own):
            weight = run.source.table(0).anchors.take([0], torch.device("cpu")).weight
            heads[name] = weight.data_ptr() == own.data_ptr()

        train(model, tmp_path / name, objective="sft", kl_coef=KL, callbacks=[look])
    assert heads == {"LoRA": True, "full": False}


def test_data_of_several_epochs_have_one_head(tmp_path):
    """So do those of an evaluation."""
    rows = tokenize_chat(build_tokenizer(), RECORDS)

    class Changing:
        def examples(self, epoch):
            return rows[epoch : epoch + 6]

    options = {**RUN, "objective": "sft", "kl_coef": KL, "max_steps": None, "epochs": 2}
    parts = build_model(0), build_tokenizer(), TrainConfig(tmp_path, **options), Changing()
    run = TrainingRun(*parts, eval_data=RECORDS[:2])
    run.train()
    tables = run.source.table(0), run.source.table(1), run.eval_source.table(0)
    heads = [table.anchors.take([0], torch.device("cpu")).weight for table in tables]
    assert tables[0] is not tables[1] and len({head.data_ptr() for head in heads}) == 1


def test_all_of_it_is_reached_from_the_command_line(tmp_path):
    from deepalign_kernels.train.__main__ import parser

    line = "--model m --data d --output o --objective sft --kl-coef 0.5 --kl-positions 5"
    given = parser().parse_args(
        [*line.split(), "--reference", "adapter_off", "--reference-cache", "c"]
    )
    assert (given.kl_positions, given.reference, given.reference_cache) == (5, "adapter_off", "c")
    config = TrainConfig(tmp_path, kl_coef=0.5, reference_cache=tmp_path)
    assert json.loads(json.dumps(config.as_dict()))["reference_cache"] == str(tmp_path)
