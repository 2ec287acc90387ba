"""`deepalign train --dry-run`: what a run would do, told before any weight is read.

The run itself is made, of a model without weights: what it would refuse is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from deepalign_kernels.data.columns import TokenTable
from deepalign_kernels.data.examples import IGNORE, Example
from deepalign_kernels.data.show import token_rows, token_table
from deepalign_kernels.plan import Setting, estimate, shape_of
from deepalign_kernels.train.forwards import forwards
from deepalign_kernels.train.loop import TrainingRun

GIB = 2**30
SHOWN = 20  # records that are left out, by line


def facts(
    run: TrainingRun, dtype: str, adapt: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
    """The numbers of `run`, whose model may have no weights, as plain values.

    Args:
        run: not begun.
        dtype: of the weights, "float32" or "bfloat16".
        adapt: what gave the model its adapters; None: it has none.

    Returns:
        "model", "data", "steps", "memory" (bytes on each device, and on the host of each process,
        at the fullest forward: see `deepalign_kernels.plan`).
    """
    config, table, ranks = run.config, run.source.table(0), run.ranks
    shape = shape_of(run.model.config, adapt)  # type: ignore[arg-type]
    rows, length = _fullest(run)
    several = run.step_size > rows * ranks.count
    memory = estimate(
        shape,
        Setting.of_run(config, dtype, run._way[0]),
        batch=rows,
        length=length,
        gpus=ranks.count,
        accumulate=several and not config.release_gradients,
        trained_share=sum(table.trained) / sum(table.lengths),
        device="cpu" if run.device.type == "cpu" else "cuda",  # a run without weights: a GPU's
    )
    return {
        "model": {
            "kind": type(run.model).__name__,
            "parameters": shape.parameters,
            "adapters": shape.adapters,
            "dtype": dtype,
        },
        "data": {
            "conversations": len(table),
            "tokens": sum(table.lengths),
            "trained_tokens": sum(table.trained),
            "longest": max(table.lengths),
            "too_long": run.source.too_long,
            "skipped": run.source.skipped,
            "eval_conversations": run.eval_source and len(run.eval_source.table(0)),
            "eval_skipped": run.eval_source.skipped if run.eval_source else [],
        },
        "steps": {
            "total": run.total_steps,
            "per_epoch": run.steps_per_epoch,
            "warmup": run.warmup_steps,
            "conversations": run.step_size,
            "processes": ranks.count,
            "largest_forward": [rows, length],
        },
        "memory": memory.as_dict(),
    }


def _fullest(run: TrainingRun) -> tuple[int, int]:
    """[rows, tokens] of the largest forward that a step of the longest conversations has."""
    table, packed = run.source.table(0), run.config.limits.packed
    rows = sorted(range(len(table)), key=lambda row: -table.lengths[row])[: run.step_size]
    shapes = []
    for group, _ in forwards(run.ranks, rows, table.lengths, run.config.limits):
        lengths = [table.lengths[row] for row in group]
        shapes.append((1, sum(lengths)) if packed else (len(group), max(lengths)))
    return max(shapes, key=lambda shape: shape[0] * shape[1])


def as_text(run: TrainingRun, said: dict[str, Any]) -> str:
    """`facts` and the first example, token by token."""
    config, (rows, length) = run.config, said["steps"]["largest_forward"]
    model, data, steps = said["model"], said["data"], said["steps"]
    dropped = f", {data['too_long']} too long ({config.on_too_long})" * bool(data["too_long"])
    held_out = f", {data['eval_conversations']} held out" * bool(data["eval_conversations"])
    beta = config.as_dict()["beta"]
    named = config.as_dict()["objective"]
    asks = run.objective.needs_reference
    trained = ""
    if model["adapters"] is not None:
        trained = f"; trained: adapters of {model['adapters'] / 1e6:.3g} million, fp32"

    def beta_of(positions: Sequence[int]) -> list[float]:
        return config.beta_at(torch.tensor(positions)).tolist()

    lines = [
        f"model     {model['kind']}, {model['parameters'] / 1e9:.3g} billion parameters,"
        f" {model['dtype']}" + trained,
        f"data      {data['conversations']} conversations{held_out}{dropped}; {data['tokens']}"
        f" tokens, {data['trained_tokens']} trained, the longest {data['longest']}",
        *_skipped(data["skipped"], "data"),
        *_skipped(data["eval_skipped"], "eval_data"),
        f"steps     {steps['total']}, {steps['per_epoch']} an epoch, of {steps['conversations']}"
        f" conversations; {steps['processes']} process{'es' * (steps['processes'] > 1)},"
        f" {config.batch_size} a forward; warm-up {steps['warmup']}",
        f"loss      {named}" + f", beta {beta}, reference {config.reference}" * asks,
        f"update    {config.as_dict()['optimizer']}, rate {config.learning_rate:g}"
        f" ({config.lr_schedule}), betas {config.adam_betas}",
        f"memory    {_memory(said['memory'])}; predicted for {rows} x {length} tokens",
        "",
        "the first conversation:",
        token_table(token_rows(run.tokenizer, _first(run.source.table(0)), beta_of)),
        "",
        "nothing was written, no weights were read",
    ]
    return "\n".join(lines)


def _skipped(why: list[str], name: str) -> list[str]:
    """Records that are left out, by line; of very many the first."""
    if not why:
        return []
    rest = [f"... and {len(why) - SHOWN} more, which the log names"] * (len(why) > SHOWN)
    head = f"skipped   {len(why)} of {name}:"
    return [head, *(f"          {one}" for one in (*why[:SHOWN], *rest))]


def _memory(parts: dict[str, int]) -> str:
    shown = ("weights", "gradients", "states", "activations", "head", "gathered", "reference")
    inner = ", ".join(f"{name} {parts[name] / GIB:.3g}" for name in shown if parts[name])
    host = f"; {parts['host'] / GIB:.3g} GiB on the host" * bool(parts["host"])
    return f"peak {parts['peak'] / GIB:.3g} GiB a device ({inner}){host}"


def _first(table: TokenTable) -> Example:
    """Its first row as it was before the table's shift."""
    batch = table.batch([0], torch.device("cpu"), table.count([0]))
    weights = None if table.weights is None else table.weights[table.slots([0])[0]].tolist()
    return Example(
        batch.input_ids[0].tolist(),
        [IGNORE, *batch.targets[0, :-1].tolist()],
        [0, *batch.positions[0, :-1].tolist()],
        weights=None if weights is None else [1.0, *weights[:-1]],
        beta_scale=table.beta_scales[0],
    )
