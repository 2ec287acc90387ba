"""Microbenchmarks: this library's backends beside plain torch, torch.compile and other libraries.

`python -m benchmarks --help` lists the commands; `python -m benchmarks pieces` times parts of the
CPU kernels, `python -m benchmarks gcg` the two heads of a step of GCG. A provider is held to fp64
before it gets a number, and the ceilings (memory bandwidth, GEMM rate) are measured in the same
process as the kernels.
"""

import os

# torch.profiler (memory.py) writes to stderr without it.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
