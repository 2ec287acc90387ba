"""`deepalign reference`: the reference's pass over the data by itself, for runs that come after.

The options are those of `deepalign train`, so a recipe serves both. A run finds what is made here
if reference, data, template and what changes a number (`kl_coef`'s positions, temperature, head,
autocast) are the same; learning rate, batches, processes may differ.
"""

from __future__ import annotations

from dataclasses import field, make_dataclass
from typing import Any

import torch

from deepalign_kernels.data.columns import TokenTable
from deepalign_kernels.train import command
from deepalign_kernels.train.cache import anchored_counts
from deepalign_kernels.train.loop import TrainingRun
from deepalign_kernels.train.prepare import check_keeps
from deepalign_kernels.train.reference import Kept

WORDS = {  # where an option means something else here
    "output": "folder of the runs to come; what is computed is kept there, or in reference_cache",
    "resume": "has no use here: an interrupted pass goes on by itself",
    "dry_run": "only tell what would be kept",
}


def _class() -> Any:
    """The options of `deepalign train`; `output` is not needed beside `reference_cache`."""
    doc = "Compute what `deepalign train` with the same options needs of its reference.\n\n"
    every = command.options_of()
    lines = [f"    {o.name}: {WORDS.get(o.name, o.text)}" for o in every]
    output = ("output", str | None, field(default=None))
    return make_dataclass(
        "Options",
        [output],
        bases=(command.Options,),
        kw_only=True,
        namespace={"__doc__": doc + "Attributes:\n" + "\n".join(lines)},
    )


Options: Any = _class()


def run(options: Any) -> int:
    """Compute it; the exit status as of `deepalign train`."""
    return command.ended(
        lambda: _compute(options), lambda: "the same command goes on from what is computed"
    )


def _compute(options: Any) -> str:
    if options.output is None and options.reference_cache is None:
        raise ValueError("reference_cache: expected a folder to keep the reference in, or output")
    options.output = options.output or options.reference_cache
    run = command.build(options, check_keeps)
    if options.dry_run:
        return "\n".join([*_planned(run), "nothing was written, no weights were read"])
    return "\n".join(
        _told(name, kept) for name, every in run.compute_reference().items() for kept in every
    )


def _told(name: str, kept: Kept) -> str:
    how = "was there already"
    if kept.seconds:
        how = f"computed in {kept.seconds:.3g} s"
    return f"{name:<9} {kept.tokens:,} tokens, {kept.bytes:,} bytes, {how}: {kept.path}"


def _planned(run: TrainingRun) -> list[str]:
    config, model = run.config, run._models[-1]
    stored = torch.empty(0, dtype=getattr(torch, config.reference_dtype)).element_size()

    def line(name: str, table: TokenTable, anchors: bool) -> str:
        tokens = sum(table.trained)
        size, anchored = 4 * tokens, ""
        if anchors:
            head: Any = model.get_output_embeddings().weight  # type: ignore[operator]
            count = sum(anchored_counts(table, config.kl_positions))
            size += count * head.shape[1] * stored + head.numel() * head.element_size()
            anchored = f", hidden states of {count} and the output head"
        return f"{name:<9} {tokens:,} tokens{anchored}: about {size:,} bytes"

    epochs = run.source.epochs_with_own_table(run.epochs) if config.needs_reference else ()
    out = [line("data", run.source.table(epoch), config.kl_coef > 0) for epoch in epochs]
    if run.eval_source is not None:
        whole = config.kl_coef > 0 or config.eval_kl
        out.append(line("eval_data", run.eval_source.table(0), whole))
    return out
