"""Compile every kernel for every architecture without a GPU, and read the compiler's own report.

    python -m deepalign_kernels.triton_kernels._offline [--arch sm_90] [--quick] [--json FILE]

The variants are not listed here: the public functions of this folder run on `meta` tensors while
`_launch.recording` keeps their launches, so what is compiled is what would be launched.

Columns: registers per thread; spill bytes (CUDA: stack and local memory, which these kernels use
for nothing else) or spilled registers (AMD); bytes of shared memory; widest global load and store
of the tensors in bits (128 is the widest there is); warps resident per multiprocessor or SIMD
group, as far as registers decide; layouts of the tiles (`_layouts`); instructions per column of the
sweeps over a row (`_sass.per_column`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deepalign_kernels.triton_kernels import (
    _launch,
    _sass,
    constrained_loss,
    scale_grad,
    token_entropy,
    token_kl,
    token_logp,
    token_stats,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
VOCAB = {"aligned": 128256, "even": 128258, "unaligned": 128257}
SCORES = {"plain": (1.0, 0.0), "scaled": (0.7, 0.0), "capped": (1.0, 30.0)}
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.bool: "u1",
}


class Variant(NamedTuple):
    arch: str
    dtype: str  # of the logits
    out: str  # of the gradient
    vocab: str  # key of VOCAB
    scores: str  # key of SCORES
    launch: _launch.Launch

    @property
    def modes(self) -> str:
        """Constexprs that are modes of this kernel, not its tiling, and the tensors it goes
        without."""
        tile = ("VEC", "REPEATS", "LANES", "MODE")
        modes = [f"{k}={v}" for k, v in self.launch.constexprs.items() if k not in tile]
        given = zip(self.launch.kernel.arg_names, self.launch.args, strict=False)
        return ",".join(modes + [f"no {name}" for name, value in given if value is None])


class Report(NamedTuple):
    arch: str
    kernel: str
    dtype: str
    out: str
    vocab: str
    scores: str
    modes: str
    warps: int
    registers: int
    spills: int
    shared: int
    load_bits: int
    store_bits: int
    resident_warps: int
    layouts: str  # of blocks: columns per thread x lanes per warp
    instructions: float  # per column, of the loops over a row (CUDA; 0 elsewhere)


def variants(quick: bool = False, archs: list[str] | None = None) -> Iterator[Variant]:
    """Every variant the launch table can launch; `quick`: a representative set for the tests."""
    dtypes = [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16")]
    everything = list(itertools.product(dtypes, VOCAB, SCORES))
    for arch in archs or list(TARGETS):
        chosen = everything
        if quick:
            chosen = [((t, t), "aligned", "plain") for t in ("bf16", "fp32")]
            if arch in ("sm_90", "gfx942"):
                chosen.append((("bf16", "bf16"), "unaligned", "capped"))
                chosen.append((("bf16", "bf16"), "even", "plain"))
        for (dtype, out), vocab, scores in chosen:
            for launch in launches(arch, dtype, out, VOCAB[vocab], *SCORES[scores]):
                variant = Variant(arch, dtype, out, vocab, scores, launch)
                if not quick or _representative(variant):
                    yield variant
        if not quick:
            plain = arch, "bf16", "bf16", "aligned", "plain"
            rare = launches(arch, "bf16", "bf16", 128256, 1.0, 0.0, js_beta=0.01, masks=False)
            kept = {"token_kl_fwd", "token_kl_bwd", "token_js_fwd", "token_js_parts", "token_stats"}
            yield from (Variant(*plain, launch) for launch in rare if launch.name in kept)


def _representative(v: Variant) -> bool:
    """Leaves out what differs from a kept variant by its arguments' names or is a part of it."""
    modes = v.launch.constexprs
    same = modes.get("OWN_IS_REF") is True or modes.get("WITH_JS") is False
    part = v.launch.name == "constrained_loss" and (
        v.launch.args[1] is None or v.launch.args[6] is None
    )
    return not (same or part) and (v.vocab == "aligned" or v.launch.name.startswith("token_kl"))


def launches(
    arch: str,
    dtype: str,
    out_dtype: str,
    V: int,
    temperature: float,
    softcap: float,
    *,
    T: int = 3,
    js_beta: float = 0.5,
    masks: bool = True,
) -> list[_launch.Launch]:
    """Launches of every function of this folder for logits [2, T, V], views into [2, T + 1, V];
    `masks`: with the optional `valid` and `target`."""
    torch_type = {name: t for t, name in _TYPES.items()}
    B = 2
    meta = torch.device("meta")

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=meta)

    x, y = (new(B, T + 1, V, dtype=torch_type[dtype])[:, :T] for _ in range(2))
    out = new(B, T, V, dtype=torch_type[out_dtype])
    row, pair, target = new(B * T), new(B * T, 2), new(B * T, dtype=torch.int64)
    valid = new(B * T, dtype=torch.bool) if masks else None
    scale, tail = new(), (temperature, softcap)
    with _launch.recording(arch) as recorded:
        token_logp.token_logp_fwd(x, target, -100, *tail)
        token_logp.token_logp_bwd(row, x, target, pair, -100, *tail, out)
        for direction in (token_kl.POLICY_REF, token_kl.REF_POLICY, token_kl.JS):
            args = (direction, js_beta, *tail)
            token_kl.token_kl_fwd(x, y, valid, *args)
            token_kl.token_kl_bwd(row, x, y, valid, pair, pair, row, *args, out)
        token_kl.token_js_parts(x, y, valid, pair, pair, js_beta, *tail)
        for ref, given in ((y, None), (None, row)):
            args = (-100, False, 0.0, *tail)
            constrained_loss.constrained_loss_fwd(x, target, row, ref, given, *args)
            constrained_loss.constrained_loss_fused(x, target, row, ref, given, scale, *args, out)
        labels = target if masks else None
        for beta in (0.0, js_beta):
            token_stats.token_stats_fwd(x, y, labels, valid, -100, beta, *tail)
        token_entropy.token_entropy_fwd(x, valid, *tail)
        token_entropy.token_entropy_bwd(row, x, valid, pair, row, *tail, out)
        scale_grad.scale_grad(out, scale)
    return recorded


def source(launch: _launch.Launch) -> ASTSource:
    """What Triton's own launcher would compile for these arguments."""
    arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constexprs
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = _type(value)
        aligned = isinstance(value, Tensor) and value.data_ptr() % 16 == 0
        if aligned and not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def compile_launch(launch: _launch.Launch, arch: str) -> Any:
    """Triton's compiled kernel, made now or taken from its cache."""
    return triton.compile(source(launch), target=TARGETS[arch], options=launch.options)


def compile_variant(v: Variant) -> Report:
    """Compile one variant and read the report."""
    compiled, options = compile_launch(v.launch, v.arch), v.launch.options
    read = _read_amd if v.arch.startswith("gfx") else _read_cuda
    names = v.arch, v.launch.name, v.dtype, v.out, v.vocab, v.scores, v.modes, options["num_warps"]
    measured = read(compiled, options["num_warps"])
    registers, spills, load, store, resident = measured
    modes = v.launch.constexprs
    counted = 0.0 if v.arch.startswith("gfx") else _sass.per_column(compiled.asm["cubin"], modes)
    return Report(
        *names, registers, spills, compiled.metadata.shared, load, store, resident,
        _layouts(compiled.asm["ttgir"]), counted,
    )  # fmt: skip


def _layouts(ttgir: str) -> str:
    """The blocked layouts of a kernel, each once: "8x32" is 8 columns on a thread, 32 lanes on a
    warp."""
    found = re.findall(
        r"blocked<{sizePerThread = \[1, (\d+)\], threadsPerWarp = \[(\d+), 1\]", ttgir
    )
    others = len(re.findall(r"blocked<{", ttgir)) - len(found)
    others += len(re.findall(r"convert_layout", ttgir))
    return " ".join(sorted({f"{c}x{lanes}" for c, lanes in found}) + ["others"] * bool(others))


def _read_cuda(compiled: Any, warps: int) -> tuple[int, int, int, int, int]:
    text = _sass.dump(compiled.asm["cubin"], "-res-usage")
    usage = {k: int(n) for k, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    if usage.keys() != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"cuobjdump: expected REG, STACK and LOCAL, got {text!r}")
    ptx = compiled.asm["ptx"]
    if "ld.local" in ptx or "st.local" in ptx:
        usage["LOCAL"] += 1  # an array that the compiler could not keep in registers
    width = {}
    for verb in ("ld", "st"):
        found = re.findall(rf"\b{verb}\.global[\w:.]*?(?:\.v(\d))?\.b(\d+)\b", ptx)
        width[verb] = max((int(v or 1) * int(b) for v, b in found), default=0)
    # 65536 registers, handed out per warp in steps of 8 per thread; at most 64 warps.
    per_warp = 32 * (-(-usage["REG"] // 8) * 8)
    resident = min(64, 65536 // per_warp) // warps * warps
    return usage["REG"], usage["STACK"] + usage["LOCAL"], width["ld"], width["st"], resident


def _read_amd(compiled: Any, warps: int) -> tuple[int, int, int, int, int]:
    text = compiled.asm["amdgcn"]
    found = {k: int(n) for k, n in re.findall(r"\.(\wgpr_(?:spill_)?count):\s*(\d+)", text)}
    spills = found["vgpr_spill_count"] + found["sgpr_spill_count"]
    words = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128, "ushort": 16, "short": 16}
    width = {}
    for verb in ("load", "store"):
        kinds = re.findall(rf"\b(?:global|buffer)_{verb}_(dwordx?\d?|[a-z]+)", text)
        width[verb] = max((words.get(kind, 8) for kind in kinds), default=0)
    # 512 registers per lane of a SIMD, in steps of 8, at most 8 waves; 4 SIMDs per compute unit.
    resident = 4 * min(8, 512 // max(1, -(-found["vgpr_count"] // 8) * 8)) // warps * warps
    return found["vgpr_count"], spills, width["load"], width["store"], resident


_work: list[Variant] = []


def _compile_at(i: int) -> Report:
    return compile_variant(_work[i])


def compile_all(work: list[Variant], processes: int | None = None) -> list[Report]:
    """Reports of all variants, compiled in parallel. Triton's cache makes a second call quick."""
    global _work
    _work = work
    count = processes or min(8, os.cpu_count() or 1)
    with multiprocessing.get_context("fork").Pool(count) as pool:
        return pool.map(_compile_at, range(len(work)), chunksize=1)


def table(reports: list[Report]) -> str:
    """Reports as aligned text columns."""
    lines = [Report._fields, *(tuple(map(str, r)) for r in reports)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="the set that the tests compile")
    parser.add_argument("--json", metavar="FILE", help="also write the reports there")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: nothing is compiled in the interpreter")
    reports = compile_all(list(variants(options.quick, options.arch)))
    if options.json:
        with open(options.json, "w") as file:
            json.dump([r._asdict() for r in reports], file, indent=1)
    print(table(reports))
    spilling = [r for r in reports if r.spills]
    print(f"{len(reports)} variants, {len(spilling)} with spills")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
