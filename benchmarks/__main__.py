"""`python -m benchmarks COMMAND ...`, the one entry of all benchmarks. `COMMAND --help` says more.

Without a command: run.
"""

from __future__ import annotations

import functools
import importlib
import sys

COMMANDS = {  # name -> (module, what it does)
    "run": ("harness.main", "logits ops beside eager, torch.compile and peers"),
    "linear": ("harness.main", "the same of the linear ops"),
    "compare": ("harness.compare", "flag regressions from one result file to another"),
    "readme": ("harness.report", "markdown tables from a result file"),
    "page": ("studies.page", "write the benchmark pages of docs/ and the README's figures"),
    "growth": ("studies.growth", "time and memory against T and V"),
    "plan": ("studies.plan", "peak memory of full fine-tuning, predicted and measured"),
    "step": ("studies.step", "a step of full fine-tuning beside trl and a plain loop"),
    "capped": ("studies.capped", "full fine-tuning under a limit on a GPU's memory"),
    "host": ("studies.host", "host time of a call"),
    "pieces": ("studies.pieces", "figures that stand in comments and docs"),
    "profile": ("studies.profile", "an analysis of two models beside scripts with whole logits"),
    "analysis": ("studies.analysis", "memory of an analysis, time of curves during a training"),
    "gcg": ("studies.gcg", "a step of greedy coordinate gradient"),
    "depth": ("studies.depth", "does depth rank models by success under prefilling"),
    "toy": ("studies.toy", "what the contrast of the demo depends on"),
    "robustness": ("studies.robustness", "all attacks on the toy world's models, over seeds"),
    "attack": ("studies.attack", "the attack harness beside nanoGCG and plain generate"),
    "interpreted": (
        "studies.interpreted",
        "bytes that Triton kernels move, counted in its interpreter",
    ),
    "offline": ("offline.compiled", "compile report and predicted times, without a GPU"),
    "instructions": ("offline.instructions", "callgrind counts of the native CPU kernels"),
    "sass": ("offline.sass", "instructions per column of CUDA machine code"),
    "gpu": ("gpu.calls", "fifteen minutes, or more, on one GPU (benchmarks/gpu.sh)"),
    "each_op": ("gpu.each_op", "every internal op once"),
    "sweep": ("gpu.sweep", "launch plans and chunk sizes on the GPU at hand"),
    "harvest": ("gpu.harvest", "what follows from the files of gpu.sh"),
}


def usage() -> str:
    lines = [f"  {name:13} {told}" for name, (_, told) in COMMANDS.items()]
    return "\n".join([(__doc__ or "").rstrip(), "", *lines])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *rest = argv if argv and argv[0] in COMMANDS else ["run", *argv]
    module = importlib.import_module(f"benchmarks.{COMMANDS[name][0]}")
    command = functools.partial(module.main, name) if name in ("run", "linear") else module.command
    return command(rest)


if __name__ == "__main__":
    sys.exit(main())
