"""Two gloo processes on this machine against one: the gradients of every parameter, twice in a row.

Each process has data of its own, of unequal token counts; the single process sees all of it,
through plain logits. All cases share one spawn (starting Python and torch costs more than they do);
every test reads its line of the result.
"""

import importlib
import importlib.util
import os

import pytest

pytest.importorskip("transformers", reason="deepalign_kernels.hf needs transformers")

import torch
import torch.distributed as dist
from tiny_models import batch, build, gradients, plain_logp
from two_processes import WORLD, run_cases, spawn, start

import deepalign_kernels.hf as hf

BUDGET = 1e-5
BETA, REF = 0.7, -2.0

# case -> (family, how the model is distributed, PEFT, the tokens that are not trained on each rank)
CASES = {
    "ddp llama": ("llama", "ddp", None, (3, 6)),
    "ddp gemma2 tied, cap": ("gemma2", "ddp", None, (3, 6)),
    "ddp find_unused": ("qwen3", "ddp_unused", None, (3, 6)),
    "ddp static_graph": ("qwen3", "ddp_static", None, (3, 6)),
    "ddp rank without tokens": ("llama", "ddp", None, (3, 12)),
    "ddp LoRA on the head": ("llama", "ddp", "head", (3, 6)),
    "fsdp2 head in the root unit": ("llama", "root", None, (3, 6)),
    "fsdp2 tied head in the root unit": ("gemma2", "root", None, (3, 6)),
    "fsdp2 head in its own unit": ("llama", "own", None, (3, 6)),
    "fsdp2 head grouped with the norm": ("llama", "norm", None, (3, 6)),
    "fsdp2 saved head, wrapper is the unit": ("llama", "own", "saved", (3, 6)),
    "fsdp2 saved head, linear is the unit": ("llama", "inner", "saved", (3, 6)),
    "fsdp2 LoRA on the head": ("llama", "own", "head", (3, 6)),
    "fsdp2 rank without tokens": ("llama", "own", None, (3, 12)),
    "fsdp2 attached after sharding": ("gemma2", "root_late", None, (3, 6)),
    "ddp KL, LoRA": ("llama", "ddp", "kl", (3, 6)),
    "fsdp2 KL, LoRA": ("gemma2", "root", "kl", (3, 6)),
    "fsdp2 KL, LoRA on the head": ("llama", "own", "kl_head", (3, 6)),
}


def data_of(rank, untrained):
    return batch(rows=2, length=12, seed=10 + rank, untrained=untrained[rank])


def prepare(family, tuning, attached):
    """The same model on every rank, adapters away from zero."""
    model = build(family)
    if attached:
        hf.attach(model)
    if tuning is not None:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj"] + ["lm_head"] * (tuning in ("head", "kl_head"))
        saved = ["lm_head"] if tuning == "saved" else None
        config = LoraConfig(r=4, target_modules=targets, modules_to_save=saved, lora_dropout=0.0)
        config.task_type = "CAUSAL_LM"
        model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def expected(family, tuning, untrained):
    """({name: gradient}, token count) over all ranks' data, from the logits of a plain model."""
    model = prepare(family, tuning, attached=False)
    total, count = 0.0, 0
    for rank in range(WORLD):
        data = data_of(rank, untrained)
        mask = data["labels"][:, 1:] != -100
        logits = model(input_ids=data["input_ids"]).logits
        if tuning in ("kl", "kl_head"):
            with model.disable_adapter(), torch.no_grad():
                q = model(input_ids=data["input_ids"]).logits[:, :-1].log_softmax(-1)
            p = logits[:, :-1].log_softmax(-1)
            value = (p.exp() * (p - q)).sum(-1)
        else:
            delta = REF - plain_logp(logits, data["labels"])
            value = torch.nn.functional.softplus(BETA * delta) * 2 / BETA
        total, count = total + (value * mask).sum(), count + int(mask.sum())
    return gradients(model, total / count), count


def distribute(model, how):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if how.startswith("ddp"):
        options = {
            "find_unused_parameters": how == "ddp_unused",
            "static_graph": how == "ddp_static",
        }
        return DistributedDataParallel(model, **options)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    for layer in base.model.layers:
        fully_shard(layer)
    if how == "own":
        fully_shard(head)
    elif how == "inner":
        fully_shard(head.modules_to_save["default"])
    elif how == "norm":
        fully_shard([base.model.norm, head], reshard_after_forward=False)
    return fully_shard(model)


def step(model, rank, tuning, untrained, count):
    """Backward of this rank's share; {name: full gradient}."""
    data = data_of(rank, untrained)
    model.zero_grad(set_to_none=True)  # not after the forward: FSDP2 shows other parameters there
    loss = hf.ConstrainedLoss(beta=BETA, ref_logp=torch.full((2, 11), REF))
    if tuning in ("kl", "kl_head"):
        with getattr(model, "module", model).disable_adapter():
            rows = hf.hidden_rows(model, **data)
        loss = hf.TokenKL(rows)
    out = model(**data, dak_loss=loss, num_items_in_batch=torch.tensor(count))
    (out.loss * WORLD).backward()  # DDP and FSDP average over the ranks
    found = {}
    for name, parameter in model.named_parameters():
        if (grad := parameter.grad) is not None:
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            found[name.removeprefix("module.")] = grad.clone()
    return found


def run_case(rank, family, how, tuning, untrained):
    from tiny_models import gradient_error

    theirs, count = expected(family, tuning, untrained)
    late = how.endswith("_late")
    model = distribute(prepare(family, tuning, attached=not late), how.removesuffix("_late"))
    if late:
        hf.attach(model)
    errors = [gradient_error(step(model, rank, tuning, untrained, count), theirs) for _ in range(2)]
    hf.verify(model, data_of(0, untrained)["input_ids"])
    return max(errors)


def work(rank, folder, cases):
    start(rank, folder)
    run_cases(rank, folder, cases, run_case)


@pytest.fixture(scope="module")
def results():
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    present = importlib.util.find_spec("peft") is not None
    return spawn(work, {k: v for k, v in CASES.items() if present or v[2] is None})


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_a_single_process(results, case):
    if CASES[case][2] is not None:
        pytest.importorskip("peft", reason="needs peft")
    errors = results.get(case, [])
    print(f"{case:40s} {errors}")
    assert len(errors) == WORLD, f"a process hung or died: {errors}"
    assert all(isinstance(e, float) for e in errors), errors
    assert max(errors) <= BUDGET


ZERO_CASES = {
    "zero3 llama": ("llama", (3, 6)),
    "zero3 gemma2 tied, cap": ("gemma2", (3, 6)),
    "zero3 rank without tokens": ("llama", (3, 12)),
}


def run_zero3(rank, family, untrained):
    import deepspeed
    from deepspeed.utils import safe_get_full_grad
    from tiny_models import gradient_error

    # Else DeepSpeed compiles C++ for a minute, for faster reductions on a CPU.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None

    theirs, count = expected(family, None, untrained)
    model = prepare(family, None, attached=True)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    with pytest.raises(RuntimeError, match="GatheredParameters"):
        hf.head.gathered("ref_weight", model.get_output_embeddings().weight)
    errors = []
    for _ in range(2):
        data = data_of(rank, untrained)
        loss = hf.ConstrainedLoss(beta=BETA, ref_logp=torch.full((2, 11), REF))
        out = engine(**data, dak_loss=loss, num_items_in_batch=torch.tensor(count))
        engine.backward(out.loss * WORLD)
        found = {n: safe_get_full_grad(p).clone() for n, p in model.named_parameters()}
        engine.step()
        errors.append(gradient_error(found, theirs))
    hf.verify(engine, data_of(0, untrained)["input_ids"])
    return max(errors)


def work_zero3(rank, folder, cases):
    os.environ.update({"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(WORLD)})
    start(rank, folder)
    run_cases(rank, folder, cases, run_zero3)


@pytest.mark.slow
def test_zero3_gradients_equal_a_single_process():
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    results = spawn(work_zero3, ZERO_CASES)
    for case in ZERO_CASES:
        print(f"{case:40s} {results.get(case)}")
    assert results.keys() == ZERO_CASES.keys(), "a process hung or died"
    for case, errors in results.items():
        assert len(errors) == WORLD and all(isinstance(e, float) for e in errors), (case, errors)
        assert max(errors) <= BUDGET, (case, errors)
