"""Host side of every Triton kernel: launch table, alignment, device guard. No autotuning, no sync.

A kernel works on tiles of REPEATS blocks of LANES x VEC columns: VEC neighbouring columns per
16-byte load, LANES threads side by side, REPEATS loads in flight per thread and tensor. A tile is
LANES * REPEATS * VEC columns, what other kernels call BLOCK: 2048 to 16384 with the table below.

The table gives, per architecture and kernel, warps and the bytes each thread loads per tensor and
tile. More bytes hide more latency and cost registers; `python -m
deepalign_kernels.triton_kernels._offline` prints what they cost. To regenerate an entry: on the
machine in question, run `python -m benchmarks` once per candidate with
DEEPALIGN_TRITON_PLAN="kernel=warps,bytes,registers;..." in the environment, write the winner here,
and let tests/triton/test_triton_offline.py check it for spills. Entries for machines that nobody
has measured yet are reasoned from those reports and carry no measurement.

Strides and V reach the kernels in units of VEC. A product with a constexpr tells the compiler what
it may vectorise, so no integer needs Triton's own specialisation, and a kernel is compiled once per
dtype, VEC and mode: never again for another token count, temperature, beta or aligned vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


class LaunchPlan(NamedTuple):
    """Table entry: warps per program; bytes per thread, tensor and tile; register cap (0: none).

    The cap (CUDA only) is above what the kernel needs. Its use is that ptxas then no longer spills
    a few registers on its own accord to reach the next occupancy step.
    """

    warps: int
    size: int
    registers: int = 0


# One sweep: 8 warps, several programs per multiprocessor. Two sweeps: 16 warps, so that fewer rows
# are in flight and more of each is still in L2 when the second sweep begins.
_DEFAULT = {
    "token_logp_fwd": LaunchPlan(8, 64, 128),
    "token_logp_bwd": LaunchPlan(8, 32),
    "token_kl_fwd": LaunchPlan(8, 32),
    "token_js_fwd": LaunchPlan(16, 32, 128),
    "token_js_parts": LaunchPlan(8, 32, 128),
    "token_kl_bwd": LaunchPlan(8, 32),
    "constrained_loss": LaunchPlan(16, 64, 128),
    "token_stats": LaunchPlan(8, 32, 128),
    "token_entropy_fwd": LaunchPlan(8, 64, 128),
    "token_entropy_bwd": LaunchPlan(8, 32),
    "scale_grad": LaunchPlan(8, 64),
}
TABLE: dict[str, dict[str, LaunchPlan]] = {
    "sm_80": _DEFAULT,
    "sm_90": _DEFAULT,
    "sm_100": _DEFAULT
    | {"token_js_fwd": LaunchPlan(8, 32, 168), "token_stats": LaunchPlan(8, 32, 168)},
    # 64 threads per wavefront: half the warps make the same tile. The narrower ones keep the masks
    # of a tile in scalar registers when a softcap's constants need some too.
    "gfx942": {name: LaunchPlan(p.warps // 2, p.size) for name, p in _DEFAULT.items()}
    | {"constrained_loss": LaunchPlan(8, 16), "token_stats": LaunchPlan(4, 16)},
    # Tiles of 1024 (fp32) and 2048 columns: small tests cross tile borders, and none takes long.
    "interpreter": dict.fromkeys(_DEFAULT, LaunchPlan(2, 64)),
}
WAVEFRONT = {"gfx942": 64}

# Arguments that the compiler may specialise on alignment: tensors with a vocabulary dimension.
# Everything else (vectors, sizes, scalars) must never cause another compilation.
WIDE = frozenset({"logits_ptr", "policy_ptr", "ref_ptr", "own_ptr", "other_ptr", "out_ptr"})


def kernel(fn: Any) -> Any:
    """`triton.jit`, specialised on nothing but constexprs and the alignment of [.., V] tensors."""
    hints = inspect.get_annotations(fn)
    names = inspect.signature(fn).parameters
    return triton.jit(fn, do_not_specialize=[n for n in names if n not in WIDE and n not in hints])


class Tiling(NamedTuple):
    """How one call maps onto programs; `strides` holds (batch, row) per tensor, in units of VEC
    elements."""

    rows: int
    T: int
    groups: int  # V / VEC
    strides: tuple[int, ...]
    vec: int
    repeats: int
    lanes: int
    plan: LaunchPlan
    arch: str  # key of TABLE

    @property
    def tiles(self) -> int:
        return -(-self.groups // (self.repeats * self.lanes))


class Launch(NamedTuple):
    """One recorded launch (see `recording`)."""

    name: str
    kernel: Any
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    options: dict[str, int]  # of the compiler


_recording: tuple[str, list[Launch]] | None = None


@contextlib.contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Collect the launches of the block as they would be on `arch`, and run none of them."""
    global _recording
    old, launches = _recording, []
    _recording = (arch, launches)
    try:
        yield launches
    finally:
        _recording = old


def tiling(name: str, logits: Tensor, *others: Tensor) -> Tiling:
    """Tiling of kernel `name` for logits [B, T, V] and further tensors of that shape."""
    B, T, V = logits.shape
    strides = [s for x in (logits, *others) for s in _strides(x)]
    # Every tensor must start on 16 bytes and every row on VEC elements; an odd V goes column by
    # column.
    aligned = all(x.data_ptr() % 16 == 0 for x in (logits, *others))
    vec = math.gcd(16 // logits.element_size(), V, *strides) if aligned else 1
    arch = _arch(logits.device)
    plan = _overrides().get(name) or TABLE[arch][name]
    # Column by column every element costs an address of its own: half as many keep it out of
    # spills.
    size = plan.size if vec > 1 else plan.size // 2
    repeats = max(1, size // logits.element_size() // vec)
    lanes = plan.warps * WAVEFRONT.get(arch, 32)
    if arch == "interpreter" and repeats > 2:  # it takes as long for a block of any size
        repeats, lanes = 2, lanes * repeats // 2
    return Tiling(
        rows=B * T,
        T=T,
        groups=V // vec,
        strides=tuple(s // vec for s in strides),
        vec=vec,
        repeats=repeats,
        lanes=lanes,
        plan=plan,
        arch=arch,
    )


def launch(name: str, kernel: Any, t: Tiling, programs: int, *args: Any, **modes: Any) -> None:
    """Run `kernel` in `programs` programs on the device of its first argument, a tensor."""
    if programs == 0:
        return
    modes |= {"VEC": t.vec, "REPEATS": t.repeats, "LANES": t.lanes}
    options = {"num_warps": t.plan.warps}
    if t.plan.registers and not torch.version.hip:
        options["maxnreg"] = t.plan.registers
    if _recording is not None:
        _recording[1].append(Launch(name, kernel, args, modes, options))
        return
    with _guard(args[0]):
        kernel[(programs,)](*args, **modes, **options)


def row_outputs(logits: Tensor, *widths: int) -> tuple[Tensor, ...]:
    """Uninitialised fp32 results of a kernel, one per width: [N] for 1, [N, 2] for 2."""
    n = logits.shape[0] * logits.shape[1]
    shapes = ((n,) if width == 1 else (n, width) for width in widths)
    return tuple(torch.empty(s, dtype=torch.float32, device=logits.device) for s in shapes)


def js_modes(js_beta: float, t: Tiling) -> dict[str, bool]:
    """The constexprs of `_rows.js_terms`: whether js_beta is near 0 or 1, and NVIDIA's log2."""
    return {"AT_END": not 1 / 16 <= js_beta <= 15 / 16, "LG2": t.arch.startswith("sm_")}


PLAIN, SCALED, CAPPED = 0, 1, 2  # constexpr MODE: z = x; x / temperature; with a softcap as well


@functools.lru_cache(maxsize=64)
def score_scalars(temperature: float, softcap: float) -> tuple[int, tuple[float, ...]]:
    """(MODE, the scalars (a_hi, a_lo, b_hi, b_lo, slope) of `_rows.scores`)."""
    mode = CAPPED if softcap > 0 else PLAIN if temperature == 1.0 else SCALED
    cap = softcap if softcap > 0 else 1.0
    return mode, (*_split(cap / temperature), *_split(1.0 / cap), 1.0 / temperature)


def _split(factor: float) -> tuple[float, float]:
    """factor > 0 as hi + lo with hi the fp32 strictly below it, so that both are positive.

    x * hi + x * lo then rounds once like a division, without its cost, and keeps x = -inf an
    infinity.
    """
    mantissa, exponent = math.frexp(factor)
    hi = math.ldexp(math.ceil(mantissa * 2**24) - 1, exponent - 24)
    return hi, factor - hi


def _strides(x: Tensor) -> tuple[int, int]:
    """(batch, row) stride; 0 where the dimension has one entry, whose stride means nothing."""
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0


def _arch(device: torch.device) -> str:
    if _recording is not None:
        return _recording[0]
    return "interpreter" if device.type == "cpu" else _gpu_arch(device.index)


@functools.cache
def _gpu_arch(index: int | None) -> str:
    """Row of TABLE for a GPU: its own, or the nearest older one that stands there."""
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(index)
    return "sm_80" if major < 9 else "sm_90" if major < 10 else "sm_100"


@functools.cache
def _overrides() -> dict[str, LaunchPlan]:
    """DEEPALIGN_TRITON_PLAN="token_kl_fwd=8,64;..." replaces table entries, to measure
    candidates."""
    text = os.environ.get("DEEPALIGN_TRITON_PLAN", "")
    plans = {}
    for entry in filter(None, text.split(";")):
        name, _, numbers = entry.partition("=")
        if name not in _DEFAULT:
            allowed = ", ".join(_DEFAULT)
            raise ValueError(f"DEEPALIGN_TRITON_PLAN: expected one of {allowed}, got {name!r}")
        plans[name] = LaunchPlan(*map(int, numbers.split(",")))
    return plans


def _guard(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the GPU of `x` current: Triton launches on the current one.

    The interpreter computes with numpy, which must keep quiet about log(0) and inf - inf.
    """
    if x.is_cuda:
        return torch.cuda.device_of(x)
    import numpy

    return numpy.errstate(all="ignore")
