"""What makes two runs the same run: a resume compares it, and names what differs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepalign_kernels import rules
from deepalign_kernels.data.columns import TokenTable
from deepalign_kernels.train.config import TrainConfig
from deepalign_kernels.train.lora import about_adapters

# What may differ between a run and its continuation without changing a single weight; the first
# two together with the number of processes (`step_size` stays).
FREE_TO_CHANGE = (
    "batch_size",
    "max_batch_tokens",
    "data_cache",
    "data_workers",
    "on_bad_record",  # the tokens are compared
    "reference_cache",
    "gradient_accumulation_steps",
    "parallel",
    "cpu_offload",
    "offload_activations",
    "output_dir",
    "eval_every",
    "eval_kl",
    "best_by",
    "early_stop",
    "save_every",
    "keep_checkpoints",
    "log_every",
    "progress",
    "report_to",
)
LENGTH = ("epochs", "max_steps")
# Functions are compared by what they compute, since a name says little and an address nothing.
BY_VALUE = ("beta", "objective")


def identity(
    config: TrainConfig,
    table: TokenTable,
    model: nn.Module,
    frozen: str,
    processes: int,
    warmup: int,
) -> dict[str, Any]:
    """Plain values and tensors that two runs share exactly if they train the same.

    `table`: the first epoch's. `frozen`: see `frozen_hash`. `warmup`: steps of it.
    """
    plain = {k: v for k, v in config.as_dict().items() if k not in (*FREE_TO_CHANGE, *BY_VALUE)}
    if config.lr_schedule == "constant":  # no rate depends on the end
        plain = {k: v for k, v in plain.items() if k not in LENGTH} | {"warmup_steps": warmup}
    every = torch.arange(int(table.positions.max()) + 1)
    return {
        "config": plain | {"step_size": config.step_size * processes},
        "betas": config.beta_at(every).float().cpu() if config.needs_reference else None,
        "objective": config.as_dict()["objective"],
        "rule": _values_of(config.rule) if callable(config.rule) else None,
        "data": _data_of(table),
        "frozen": frozen,
        "adapters": about_adapters(model),
    }


LONGER = (
    ". The steps that are done would have had other learning rates, as these fall towards the end;"
    " lr_schedule='constant' can go on for longer. Otherwise begin a new run in another folder,"
    " from the model that this one made"
)


def frozen_hash(model: nn.Module) -> str:
    """Of the parameters that are not trained, which checkpoints leave out; "" if all are."""
    digest, none = hashlib.blake2b(digest_size=16), True
    for name, p in model.named_parameters():
        if not p.requires_grad:
            none = False
            digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
            flat = p.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return "" if none else digest.hexdigest()


def differences(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What a resume must refuse, in words; None if nothing."""
    a, b = then["config"], now["config"]
    changed = [f"{k} was {a.get(k)!r}, is {b[k]!r}" for k in b if a.get(k) != b[k]]
    if then["objective"] != now["objective"]:
        changed.append(f"objective was {then['objective']!r}, is {now['objective']!r}")
    elif not _same(then["rule"], now["rule"]):
        changed.append(f"objective: {now['objective']} computes other values than it did")
    if changed:
        odd = f"another configuration: {', '.join(changed)}"
        longer = any(a.get(k) != b.get(k) for k in LENGTH)
        return odd + (LONGER if longer else "")
    # The data before beta, which is compared as far as its positions go.
    named = [name for name, value in now["data"].items() if then["data"].get(name, "") != value]
    if named:
        return f"other training data than data gives now: its {' and its '.join(named)} changed"
    if not _same(then["betas"], now["betas"]):
        return f"another configuration: {_other_betas(then['betas'], now['betas'])}"
    if odd := _other_adapters(then.get("adapters", {}), now["adapters"]):
        return f"another model: of its adapters {odd}"
    if then["frozen"] != now["frozen"]:
        return "another model: its frozen parameters are not those the run began with"
    return None


def _other_adapters(then: dict[str, Any], now: dict[str, Any]) -> str:
    """Of those that were kept, as checkpoints of earlier versions have none."""
    pairs = ((a, now.get(name, {})) for name, a in then.items())
    return ", ".join(
        f"{key} was {a[key]!r}, is {b.get(key)!r}"
        for a, b in pairs
        for key in a
        if a[key] != b.get(key)
    )


def _other_betas(then: Tensor | None, now: Tensor | None) -> str:
    if then is None or now is None:
        return "beta was not used, or is not"
    at = int((then != now).nonzero()[0, 0])
    return f"beta was {then[at].item():g} at position {at}, is {now[at].item():g}"


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def _values_of(rule: Callable[..., Any]) -> Tensor:
    """A rule of the user's own at 27 points: loss and weight."""
    axis = torch.tensor([-3.0, -1.0, -0.1], dtype=torch.float64)
    logp, ref, beta = (x.flatten() for x in torch.meshgrid(axis, axis, axis.abs(), indexing="ij"))
    with torch.no_grad():
        return torch.stack(rules.run(rules.objective_of(rule).name, 0.0, logp, ref, beta))


def _data_of(table: TokenTable) -> dict[str, str]:
    """What is trained, by the names under which a change is reported."""
    parts = torch.tensor(table.parts, dtype=torch.int32)
    return {
        "tokens": table.tokens_hash(),
        "positions": _digest(table.positions),
        "parts and their weights": _digest(parts)
        + repr((sorted((table.part_weights or {}).items()), table.part_weighting)),
        "scales of beta": hashlib.blake2b(table.beta_scales).hexdigest() * table.scales_beta,
        "weights": "" if table.weights is None else _digest(table.weights),
    }


def _digest(x: Tensor) -> str:
    return hashlib.blake2b(x.contiguous().numpy().tobytes(), digest_size=16).hexdigest()
