"""What one row of logits means on the device: shared by every kernel of this folder.

Tile: a 3-D block [REPEATS, LANES, VEC] of columns. Column ((r * LANES) + l) * VEC + v belongs to
lane l, and a lane is one thread: reductions over axes 0 and 2 stay in its registers. So the online
softmax runs per lane (every thread carries its own maximum and sums), the loop over tiles has no
shuffle and no barrier, and the lanes meet once, after the last tile. Carried values are vectors
[LANES].

-inf: a lane that has only seen -inf shifts by 0 (`shift`), which gives exp(-inf) = 0 instead of
NaN. Columns past the end of the row are -inf after all transforms, also with a softcap.

Rounding: scores are rounded once from exact products (`times`), by fused operations that no
compiler may regroup; equal logits go through equal instructions, so their differences are exactly
0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepalign_kernels.triton_kernels import _launch

NEG_INF = tl.constexpr(float("-inf"))
INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))
TINY = tl.constexpr(1.1754943508222875e-38)  # smallest normal fp32
LAST_USE = tl.constexpr("evict_first")  # of a cache line: do not keep it
SCALED = tl.constexpr(_launch.SCALED)
CAPPED = tl.constexpr(_launch.CAPPED)


# Scores


@triton.jit
def times(x, hi, lo):
    """x * (hi + lo), rounded once where fma is fused. hi, lo > 0, so infinities stay what they
    are."""
    return tl.fma(x, hi, x * lo)


@triton.jit
def tanh_parts(u):
    """(tanh u, 1 - tanh(u)^2), both to a few fp32 ulps: a minimax polynomial near 0, exp
    elsewhere."""
    e = tl.exp(-2.0 * tl.abs(u))
    r = 1.0 / (1.0 + e)
    far = (1.0 - e) * r
    s = u * u
    poly = tl.fma(s, 0.0023764489526493056, -0.008415210103084506)
    poly = tl.fma(s, poly, 0.021789952183412183)
    poly = tl.fma(s, poly, -0.05396176379334125)
    poly = tl.fma(s, poly, 0.1333331384384943)
    poly = tl.fma(s, poly, -0.33333333238972873)
    near = tl.fma(u * s, poly, u)
    return tl.where(s < 0.36, near, tl.where(u < 0, -far, far)), 4.0 * e * r * r


@triton.jit
def scores(x, a_hi, a_lo, b_hi, b_lo, MODE: tl.constexpr):
    """z of `reference/_rows.py`: a = softcap / temperature (1 / temperature without a cap), b = 1
    / softcap."""
    if MODE == CAPPED:
        t, _ = tanh_parts(times(x, b_hi, b_lo))
        return times(t, a_hi, a_lo)
    elif MODE == SCALED:
        return times(x, a_hi, a_lo)
    else:
        return x


@triton.jit
def slopes(x, b_hi, b_lo, slope, MODE: tl.constexpr):
    """dz/dx; `slope` is 1 / temperature."""
    if MODE == CAPPED:
        _, d = tanh_parts(times(x, b_hi, b_lo))
        return d * slope
    else:
        return slope


# Rows and tiles


@triton.jit
def row_offset(row, T, batch_stride, row_stride, VEC: tl.constexpr):
    """Offset in elements of row `row` (int64: B * T * V passes 2**31) of a tensor [B, T, V]."""
    return ((row // T) * batch_stride + (row % T) * row_stride) * VEC


@triton.jit
def tile_groups(tile, REPEATS: tl.constexpr, LANES: tl.constexpr):
    """Group numbers (columns / VEC) of tile `tile`: [REPEATS, LANES, 1]."""
    group = tl.arange(0, REPEATS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    return (tile * (REPEATS * LANES) + group)[:, :, None]


@triton.jit
def columns(group, VEC: tl.constexpr):
    """Column numbers [REPEATS, LANES, VEC]: VEC neighbours per lane, which the compiler loads at
    once."""
    return group * VEC + tl.arange(0, VEC)[None, None, :]


@triton.jit
def load_scores(
    row_ptr, group, groups, a_hi, a_lo, b_hi, b_lo,
    MODE: tl.constexpr, VEC: tl.constexpr, EVICT: tl.constexpr = "",  # pyright: ignore[reportArgumentType]
):  # fmt: skip
    """Scores of one tile in fp32; -inf past the end of the row. EVICT: "evict_first" on the last
    use of a row."""
    inside = group < groups
    at = row_ptr + columns(group, VEC)
    x = tl.load(at, mask=inside, other=NEG_INF, eviction_policy=EVICT).to(tl.float32)
    z = scores(x, a_hi, a_lo, b_hi, b_lo, MODE)
    if MODE == CAPPED:
        z = tl.where(inside, z, NEG_INF)
    return z


@triton.jit
def load_score(row_ptr, column, inside, a_hi, a_lo, b_hi, b_lo, MODE: tl.constexpr):
    """Score of one column as a scalar, by the arithmetic of `load_scores`; nothing is read if not
    inside."""
    x = tl.load(row_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return scores(x, a_hi, a_lo, b_hi, b_lo, MODE)


@triton.jit
def spread(lane):
    """[LANES] against a tile."""
    return lane[None, :, None]


@triton.jit
def lane_max(x):
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def lane_sum(x):
    return tl.sum(tl.sum(x, 2), 0)


# Online softmax per lane. Carried: m = maximum so far, d = sum of exp(z - shift(m)).


@triton.jit
def shift(m):
    return tl.where(m == NEG_INF, 0.0, m)


@triton.jit
def softmax_step(z, m, d):
    """Take one tile into (m, d)."""
    top = tl.maximum(m, lane_max(z))
    c = shift(top)
    return top, tl.fma(d, tl.exp(m - c), lane_sum(tl.exp(z - spread(c))))


@triton.jit
def softmax_end(m, d):
    """(m, d) of all lanes -> (c, D) of the row: c = max z, 0 if all -inf; D = sum exp(z - c)."""
    c = shift(tl.max(m, 0))
    return c, tl.sum(d * tl.exp(m - c), 0)


@triton.jit
def log_prob(z, c, s):
    """(z - c) - s for a scalar z of the row; never above 0, whatever a compiler fuses."""
    return tl.minimum(z - c, 0.0) - s


@triton.jit
def rescale(a, d, scale, delta):
    """A divergence sum a = sum e^(x - cx) ((x - cx) - (y - cy)) after its shifts moved.

    scale = e^(old cx - new cx) and delta = (old cx - new cx) - (old cy - new cy). An infinite sum
    stays so.
    """
    return tl.where(a == INF, INF, scale * tl.fma(delta, d, a))


@triton.jit
def kl_terms(dx, dy, ex):
    """e^dx (dx - dy) with ex = e^dx: 0 where dx = -inf; +inf where only dy is, even if ex
    underflowed."""
    return tl.where(dx == NEG_INF, 0.0, tl.maximum(ex, TINY) * (dx - dy))


# expm1 and log1p to fp32 accuracy from exp and log, for every target and the interpreter


@triton.jit
def expm1_neg(a, ea):
    """e^-a - 1 for a >= 0, given ea = e^-a."""
    poly = tl.fma(a, -0.00016487341507225194, 0.0013706976068857389)
    poly = tl.fma(a, poly, -0.008328705746499016)
    poly = tl.fma(a, poly, 0.041666130830212)
    poly = tl.fma(a, poly, -0.1666666438848371)
    poly = tl.fma(a, poly, 0.49999999984160165)
    return tl.where(a < 0.5, tl.fma(a * a, poly, -a), ea - 1.0)


@triton.jit
def log1p(y, least):
    """log(1 + y) for y in (-1, 1]; `least` > 0 is a lower bound of 1 + y that the caller knows
    exactly.

    u = 1 + y rounds; log(u) * y / (u - 1) takes the rounding back, because log(u) / (u - 1) is
    smooth.
    """
    u = tl.maximum(1.0 + y, least)
    return tl.where(u == 1.0, y, tl.log(u) * (y / (u - 1.0)))


@triton.jit
def js_terms(lq, lp, js_beta, rest):
    """(q, p, log(m/q), log(m/p)) from log-probabilities; rest = 1 - js_beta, m = js_beta p + rest
    q.

    With d = lp - lq the larger of the two ratios is log1p(w expm1(-|d|)), w being the weight of
    the smaller probability; the other differs by |d|. Both are exactly 0 for p = q and nothing
    overflows.
    """
    d = lp - lq
    a = tl.abs(d)
    ea = tl.exp(-a)
    below = d <= 0.0  # p <= q
    big = tl.exp(tl.where(below, lq, lp))
    small = big * ea
    w = tl.where(below, js_beta, rest)
    near = log1p(w * expm1_neg(a, ea), tl.where(below, rest, js_beta))
    q, p = tl.where(below, big, small), tl.where(below, small, big)
    return q, p, tl.where(below, near, near + d), tl.where(below, near - d, near)
