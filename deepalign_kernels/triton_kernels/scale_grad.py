from __future__ import annotations

import triton.language as tl
from torch import Tensor

from deepalign_kernels.triton_kernels._launch import kernel, launch, tiling
from deepalign_kernels.triton_kernels._rows import block_groups, columns, load_tile, row_offset


@kernel
def _scale_grad(
    out_ptr,  # [B, T, V], in and out
    factor_ptr,  # 0-d float
    T, groups, tiles,  # V = groups * VEC
    batch_stride, row_stride,  # in units of VEC elements
    VEC: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    # One program per tile. The factor is read here, so the host never waits for it; where it is 1,
    # the usual case, a program ends after reading 4 bytes.
    # Bytes: none where factor is 1, else reads and writes V * itemsize per row. Deterministic.
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        pid = tl.program_id(0)
        tile = pid % tiles
        out_ptr += row_offset((pid // tiles).to(tl.int64), T, batch_stride, row_stride, VEC)
        xs = load_tile(out_ptr, tile, groups, 0.0, VEC, REPEATS, LANES)
        for r in tl.static_range(REPEATS):
            group = block_groups(tile, r, REPEATS, LANES)
            tl.store(out_ptr + columns(group, VEC), xs[r] * factor, mask=group < groups)


def scale_grad(grad: Tensor, factor: Tensor) -> None:
    t = tiling("scale_grad", grad)
    launch(
        "scale_grad", _scale_grad, t, t.rows * t.tiles,
        grad, factor, t.T, t.groups, t.tiles, *t.strides,
    )  # fmt: skip
