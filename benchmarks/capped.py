"""How many tokens fit: forward + backward of the linear ops, doubling T until capped memory is
full.

The cap is torch's own (`set_per_process_memory_fraction`), so the card's other users and settings
stay alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from benchmarks import cases, machine, providers, report
from benchmarks.cases import Case, Shape
from benchmarks.ceilings import Ceilings
from benchmarks.harness import GIB, Caller, Row
from benchmarks.linear_cases import LINEAR
from benchmarks.measure import laps_of, summarise
from benchmarks.providers import Provider

FIRST, LAST = 512, 65536
TRIED = ("linear_token_logp", "linear_token_kl/policy_ref", "linear_constrained_loss")


def main(cap_gib: float, model: str, file: str | None, say: Callable[[str], None]) -> int:
    """Print, per op and provider, the longest T that fits and the tokens per second there."""
    if not torch.cuda.is_available():
        print("memory: needs a CUDA device, whose allocator can be capped")
        return 0
    H, V = (int(n) for n in model.lower().split("x"))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * GIB / total))
    rows, lines = [], []
    for name in TRIED:
        case = LINEAR[name]
        found, _ = providers.available(case, "cuda", torch.bfloat16, "fwd_bwd")
        for provider in found:
            row, why = _longest(case, provider, H, V)
            say(f"{name} {provider.name}: {row.T if row else 0} tokens")
            if row is None:
                lines.append([name, provider.name, "0", "-", "-", why])
                continue
            rows.append(row)
            rate = row.T / (row.ms or 1.0) * 1e3
            extra = report.mib(row.extra_bytes)
            lines.append([name, provider.name, str(row.T), f"{rate:.0f}", extra, why])
    header = ["op", "provider", "longest T", "tokens/s there", "extra MiB", "stopped by"]
    print(f"[{cap_gib:g} GiB for inputs, gradients and temporaries; H = {H}, V = {V}, bf16]")
    print(report.table(header, lines))
    if file:
        report.save(file, machine.describe("cuda"), Ceilings(), rows, cap_gib=cap_gib)
    return 0


def _longest(case: Case, provider: Provider, H: int, V: int) -> tuple[Row | None, str]:
    """(row of the longest T that ran, what stopped the next one)."""
    best, why, T = None, f"T = {LAST}, the end of the search", FIRST
    while T <= LAST:
        shape = Shape(T, V, H)
        try:
            best = _once(case, provider, shape)
        except torch.cuda.OutOfMemoryError:
            why = f"memory at T = {T}"
            break
        except Exception as error:  # a peer may fail in any way
            why = f"{type(error).__name__} at T = {T}: {(str(error) or '?').splitlines()[0][:80]}"
            break
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        T *= 2
    return best, why


def _once(case: Case, provider: Provider, shape: Shape) -> Row:
    x = cases.for_case(case, cases.make_inputs(shape, torch.bfloat16, "cuda"))
    caller = Caller(provider, case, "fwd_bwd", [x])
    with provider.scope():
        caller.call(0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        laps = laps_of(lambda: caller.call(0), "cuda", 3)
    sizes = (shape.T, shape.V, shape.H)
    row = Row(case.name, "fwd_bwd", *sizes, "bf16", provider.name, provider.group)
    row.ms = summarise(laps).median * 1e3
    row.extra_bytes = torch.cuda.max_memory_allocated() - held
    row.gradient_bytes = sum(x[name].nbytes for name in case.leaves)
    return row
