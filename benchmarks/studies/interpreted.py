"""Bytes that the Triton kernels load and store, counted in Triton's interpreter through the public
ops.

`TRITON_INTERPRET=1 python -m benchmarks interpreted` prints a JSON list; `count()` runs that in a
process of its own, because the variable must be set before Triton is imported. Elements that are
masked out do not count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from benchmarks.harness.machine import ROOT

T, V = 3, 8192


def count(timeout: float = 300) -> list[dict] | str:
    """One entry per case and phase: {op, phase, read, written} in bytes, for fp32; or why there are
    none.
    """
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks", "interpreted"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return f"the interpreter took over {timeout:.0f} s"
    if done.returncode:
        return (done.stderr.strip() or "it failed").splitlines()[-1]
    return json.loads(done.stdout)


def command(argv: list[str]) -> int:
    import numpy as np
    import torch
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    from benchmarks.cases import logits as cases
    from benchmarks.harness.cells import Caller
    from benchmarks.harness.providers import Provider, forced

    moved = {"read": 0, "written": 0}
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def size(ptrs, mask) -> int:
        kept = np.broadcast_to(mask.data, np.shape(ptrs.data))
        return int(np.count_nonzero(kept)) * ptrs.get_element_ty().primitive_bitwidth // 8

    def counted_load(self, ptrs, mask, *rest, **kwargs):
        moved["read"] += size(ptrs, mask)
        return load(self, ptrs, mask, *rest, **kwargs)

    def counted_store(self, ptrs, value, mask, *rest, **kwargs):
        moved["written"] += size(ptrs, mask)
        return store(self, ptrs, value, mask, *rest, **kwargs)

    Builder.create_masked_load, Builder.create_masked_store = counted_load, counted_store
    inputs = cases.make_inputs(cases.Shape(T, V), torch.float32, "cpu")
    found = []
    for case in cases.LOGITS.values():
        triton = Provider("triton", "ours", case.ours, case.reduction, forced("triton"))
        for phase in case.phases:
            moved.update(read=0, written=0)
            caller = Caller(triton, case, phase, [cases.for_case(case, inputs)])
            with triton.scope():
                caller.call(0)
            found.append({"op": case.name, "phase": phase, **moved})
    print(json.dumps(found))
    return 0
