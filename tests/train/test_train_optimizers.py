"""Optimizers by name: the method's numbers reach them, they resume; what is wrong is refused."""

import pytest
import torch
from tiny_chat import RECORDS, build_model, build_tokenizer
from torch import nn
from train_runs import RUN, log_of, needs_optimizer

from deepalign_kernels.train import TrainConfig, TrainingRun, prepare
from deepalign_kernels.train.optimizers import (
    OPTIMIZERS,
    Released,
    make_optimizer,
    share_rounded_away,
)

ON_DEVICE = [name for name, kind in OPTIMIZERS.items() if not kind.host]  # economy has the others
KEEP_SMALL_STEPS = [name for name in ON_DEVICE if OPTIMIZERS[name].keeps_small_steps]
METHOD = {"learning_rate": 1e-3, "betas": (0.5, 0.999), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def eager():
    """torchao compiles its step for every shape, for seconds each."""
    with torch.compiler.set_stance("force_eager"):
        yield


def run(out, dtype=torch.float32, callbacks=(), **options):
    base = {**RUN, "max_steps": 4, "learning_rate": 1e-3, "warmup_steps": 2, **options}
    model = build_model(0).to(dtype)
    config = TrainConfig(out, objective="sft", **base)
    return TrainingRun(model, build_tokenizer(), config, RECORDS, None, callbacks)


def problem(dtype, size=64):
    """Parameters, and three steps of gradients for them: large enough to be quantised."""
    torch.manual_seed(0)
    params = [nn.Parameter(0.02 * torch.randn(256, size)), nn.Parameter(torch.ones(100))]
    params = [nn.Parameter(p.detach().to(dtype)) for p in params]
    return params, [[torch.randn_like(p) for p in params] for _ in range(3)]


def played(optimizer, params, steps):
    for grads in steps:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return torch.cat([p.detach().float().flatten() for p in params])


@pytest.mark.parametrize("name", ON_DEVICE)
def test_the_methods_numbers_reach_each_optimizer(name):
    """Against torch's own AdamW: near it with the same betas, far from it with the usual 0.9."""
    needs_optimizer(name)
    ends = {}
    for beta in (0.5, 0.9):
        params, steps = problem(torch.float32)
        groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:]}]
        plain = torch.optim.AdamW(
            groups, lr=1e-3, betas=(beta, 0.999), eps=1e-8, weight_decay=0.0, foreach=False
        )
        ends[beta] = played(plain, params, steps)
    params, steps = problem(torch.float32)
    ours = played(make_optimizer(name, params, **METHOD), params, steps)
    near, far = ((ours - ends[beta]).norm() for beta in (0.5, 0.9))
    assert far > (1.4 if name == "adamw_4bit" else 20) * near
    if OPTIMIZERS[name].states[torch.float32] == 8:  # nothing is quantised
        torch.testing.assert_close(ours, ends[0.5], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ON_DEVICE)
def test_warm_up_and_the_schedule_reach_each_optimizer(tmp_path, name):
    """The first update has rate 0 and moves nothing, the others do; the log says the rates."""
    needs_optimizer(name)
    before, moved = build_model(0).state_dict(), []

    def look(run, record):
        now = run.model.state_dict()
        moved.append(not all(torch.equal(now[k], before[k]) for k in before))
        rates = [g["lr"] for g in run.optimizer.param_groups]
        assert [float(rate) for rate in rates] == pytest.approx([record["lr"]] * 2)

    run(tmp_path, optimizer=name, callbacks=[look]).train()
    assert moved == [False, True, True, True]
    rates = [r["lr"] for r in log_of(tmp_path) if r["event"] == "step"]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 5e-4])


def test_a_share_rounded_away_is_what_rounding_does():
    torch.manual_seed(1)
    weights = (0.03 * torch.randn(100_000)).bfloat16()
    for step in (2e-6, 2e-5, 1e-4, 1e-3):
        stays = (weights.float() + step).bfloat16() == weights
        assert share_rounded_away([weights], step, 10**6) == pytest.approx(
            stays.float().mean().item(), abs=0.01
        )
    assert share_rounded_away([weights.float()], 1e-9) == 0


def test_bf16_weights_that_would_not_move_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"'adamw' on bf16 .*, and \d\d% .* Use 'adamw_bf16_sr' or "
    ):
        run(tmp_path, torch.bfloat16, learning_rate=2e-5)

    with pytest.raises(ValueError, match="optimizer: 'adamw_8bit_paged' .* Use 'adamw_8bit'"):
        run(tmp_path, torch.bfloat16, learning_rate=2e-5, optimizer="adamw_8bit_paged")
    run(tmp_path, torch.bfloat16, learning_rate=0.1)  # there it does train


@pytest.mark.parametrize("name", (*KEEP_SMALL_STEPS, "adamw"))
def test_how_much_of_small_steps_bf16_weights_keep(name):
    """Of the way that fp32 weights go in 50 steps at 2e-5, the part that bf16 weights go."""
    needs_optimizer(name)
    torch.manual_seed(0)
    start, ways = 0.05 * torch.randn(256, 64), {}
    direction = torch.randn(256, 64)
    for dtype in (torch.float32, torch.bfloat16):
        p = nn.Parameter(start.bfloat16().to(dtype))
        groups = [{"params": [p], "weight_decay": 0.0}]
        make = OPTIMIZERS[name if dtype == torch.bfloat16 else "adamw"].make
        optimizer = make(groups, lr=2e-5, betas=(0.5, 0.999), eps=1e-8)
        for _ in range(50):
            p.grad = (direction + 0.3 * torch.randn(256, 64)).to(dtype)
            optimizer.step()
        ways[dtype] = p.detach().float() - start.bfloat16().float()
    gold, ours = ways.values()
    kept = ((gold * ours).sum() / gold.square().sum()).item()
    print(f"{name}: {kept:.3f}")
    assert kept < 0.35 if name == "adamw" else 0.85 < kept < 1.1


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ON_DEVICE)
def test_the_documented_bytes_are_those_of_the_states(name, dtype):
    needs_optimizer(name)
    params, steps = problem(dtype, size=4096)
    optimizer = OPTIMIZERS[name].make([{"params": params[:1]}], lr=1e-3, betas=(0.5, 0.999))
    played(optimizer, params, steps[:1])
    states = optimizer.state[params[0]].values()
    size = sum(map(_bytes, states)) / params[0].numel()
    assert size == pytest.approx(OPTIMIZERS[name].states[dtype], rel=0.08)


def _bytes(x):
    if not isinstance(x, torch.Tensor):
        return 0
    if hasattr(x, "__tensor_flatten__"):  # quantised: codes, scales, the table of values
        return sum(_bytes(getattr(x, inner)) for inner in x.__tensor_flatten__()[0])
    return x.numel() * x.element_size()


def test_released_gradients_are_the_same_training(tmp_path):
    whole = run(tmp_path / "whole", batch_size=7)
    whole.train()
    parts, most = run(tmp_path / "parts", release_gradients=True), []
    for p in parts.params:
        p.register_post_accumulate_grad_hook(
            lambda _: most.append(sum(p.grad is not None for p in parts.params))
        )
    parts.train()
    for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert max(most) == 1  # never a second gradient beside one
    lines = [[r for r in log_of(tmp_path / x) if r["event"] == "step"] for x in ("whole", "parts")]
    for a, b in zip(*lines, strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
        assert b["objective"] == a["objective"]


def test_half_a_released_update_is_never_saved(tmp_path):
    """The backward is the update; what breaks it off leaves no checkpoint of the middle."""
    broken = run(tmp_path, release_gradients=True, save_every=1)
    real, calls = broken.params[0], []

    def stop(_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    real.register_post_accumulate_grad_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint*")) == [
        "checkpoint-0000001.pt", "checkpoint-0000002.pt",
    ]  # fmt: skip


def test_an_optimizer_of_ones_own(tmp_path):
    seen = {}

    def lion_like(groups, **options):
        seen.update(options, decay=[g["weight_decay"] for g in groups])
        return torch.optim.SGD(groups, lr=options["lr"], momentum=0.9)

    run(tmp_path, optimizer=lion_like, weight_decay=0.2).train()
    assert seen == {"lr": 1e-3, "betas": (0.5, 0.999), "eps": 1e-8, "decay": [0.2, 0.0]}
    assert log_of(tmp_path)[0]["config"]["optimizer"].endswith("lion_like")


@pytest.mark.parametrize(
    "options, why",
    (
        ({"optimizer": "lion"}, "optimizer: expected one of 'adamw', 'adamw_bf16_sr'"),
        ({"optimizer": 3}, "optimizer: expected a name or a function"),
        ({"release_gradients": True}, "release_gradients: .*to add to: give gradient_accum.*4 ti"),
        (
            {"release_gradients": True, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0},
            "release_gradients: .*to clip by: give max_grad_norm=None",
        ),
        (
            {"release_gradients": True, "gradient_accumulation_steps": 1, "parallel": "fsdp"},
            "release_gradients: .*FSDP shards them instead",
        ),
    ),
)
def test_what_would_be_silently_wrong_is_refused(tmp_path, options, why):
    with pytest.raises(ValueError, match=why):
        TrainConfig(tmp_path, **options)


def test_several_processes_refuse_what_only_one_does(tmp_path):
    for options, way, why in (
        ({"release_gradients": True, "gradient_accumulation_steps": 1}, "ddp", "release_gradients"),
        ({"optimizer": "adamw_8bit"}, "fsdp", "optimizer: 'adamw_8bit' is not known to shard"),
    ):
        with pytest.raises(ValueError, match=why):
            prepare.check_several(TrainConfig(tmp_path, **options), way, 2, None, None)
    prepare.check_several(TrainConfig(tmp_path, optimizer="adamw_8bit"), "ddp", 2, None, None)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optimi", None)
    params, _ = problem(torch.float32)
    with pytest.raises(ValueError, match="'adamw_kahan' needs torch-optimi .pip install torch-opt"):
        make_optimizer("adamw_kahan", params, **METHOD)


def test_released_needs_no_backward_to_be_made():
    params, _ = problem(torch.float32)
    with Released(torch.optim.SGD(params, lr=0.1), params).on():
        assert all(p.grad is None for p in params)
