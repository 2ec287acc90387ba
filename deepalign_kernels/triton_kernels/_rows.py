"""What one row of logits means on the device: shared by every kernel of this folder.

Tile: a tuple of REPEATS blocks [LANES, VEC] of columns. Column ((tile * REPEATS + r) * LANES + l) *
VEC + v is entry (l, v) of block r. The compiler has one way to spread such a block: a row of it on
each thread, so that a lane is one thread and VEC neighbouring columns are one load
(tests/triton/test_triton_offline.py reads the layout). Reductions over axis 1 then stay in a
thread's registers: the online softmax runs per lane (every thread carries its own maximum and
sums), the loop over tiles has no shuffle and no barrier, and the lanes meet once, after the last
tile. Carried values are vectors [LANES]. All loads of a tile stand before the arithmetic on it.

-inf: a lane that has only seen -inf shifts by 0 (`shift`), which gives exp(-inf) = 0 instead of
NaN. Columns past the end of the row are -inf after all transforms, also with a softcap.

Rounding: scores are rounded once from exact products (`times`), by fused operations that no
compiler may regroup; equal logits go through equal instructions, so their differences are exactly
0. Results below the smallest normal fp32 may become 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepalign_kernels.triton_kernels import _launch

# A kernel may not use a global that is NaN: the launcher compares globals with their values at
# compile time, and NaN is not equal to itself. `float("nan")` stands in the kernels instead.
NEG_INF = tl.constexpr(float("-inf"))
INF = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
ANY_USE = tl.constexpr("")
LAST_USE = tl.constexpr("evict_first")  # of a cache line: do not keep it
SCALED = tl.constexpr(_launch.SCALED)
CAPPED = tl.constexpr(_launch.CAPPED)


@triton.jit
def exp(x):
    """e^x in two instructions; `tl.exp` takes five, to keep results below the smallest normal
    fp32."""
    return tl.exp2(x * LOG2E)


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
    e = exp(-2.0 * tl.abs(u))
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
def times_slope(d, x, g, b_hi, b_lo, MODE: tl.constexpr):
    """d * dz/dx * g, g being the row's factor times 1 / temperature."""
    if MODE == CAPPED:
        _, slope = tanh_parts(times(x, b_hi, b_lo))
        d = d * slope
    return d * g


# Rows and tiles


@triton.jit
def row_offset(row, T, batch_stride, row_stride, VEC: tl.constexpr):
    """Offset in elements of row `row` (int64: B * T * V passes 2**31) of a tensor [B, T, V]."""
    return ((row // T) * batch_stride + (row % T) * row_stride) * VEC


@triton.jit
def block_groups(tile, r, REPEATS: tl.constexpr, LANES: tl.constexpr):
    """Group numbers (columns / VEC) of block r of a tile: [LANES, 1]."""
    return (tile * REPEATS + r) * LANES + tl.arange(0, LANES)[:, None]


@triton.jit
def columns(group, VEC: tl.constexpr):
    """Column numbers [LANES, VEC]: VEC neighbours per lane, which the compiler loads at once."""
    return group * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def load_tile(
    row_ptr, tile, groups, OTHER: tl.constexpr,
    VEC: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr,
    EVICT: tl.constexpr = ANY_USE,
):  # fmt: skip
    """One tile in fp32; OTHER past the end of the row. EVICT: "evict_first" on the last use of a
    row."""
    xs = ()
    for r in tl.static_range(REPEATS):
        group = block_groups(tile, r, REPEATS, LANES)
        at = row_ptr + columns(group, VEC)
        x = tl.load(at, mask=group < groups, other=OTHER, eviction_policy=EVICT)
        xs = xs + (x.to(tl.float32),)
    return xs


@triton.jit
def load_scores(
    row_ptr, tile, groups, a_hi, a_lo, b_hi, b_lo, MODE: tl.constexpr,
    VEC: tl.constexpr, REPEATS: tl.constexpr, LANES: tl.constexpr,
    EVICT: tl.constexpr = ANY_USE,
):  # fmt: skip
    """Scores of one tile in fp32; -inf past the end of the row. EVICT: see `load_tile`."""
    xs = load_tile(row_ptr, tile, groups, NEG_INF, VEC, REPEATS, LANES, EVICT)
    zs = ()
    for r in tl.static_range(REPEATS):
        z = scores(xs[r], a_hi, a_lo, b_hi, b_lo, MODE)
        if MODE == CAPPED:
            z = tl.where(block_groups(tile, r, REPEATS, LANES) < groups, z, NEG_INF)
        zs = zs + (z,)
    return zs


@triton.jit
def load_score(row_ptr, column, inside, a_hi, a_lo, b_hi, b_lo, MODE: tl.constexpr):
    """Score of one column as a scalar, by the arithmetic of `load_scores`; nothing is read if not
    inside."""
    x = tl.load(row_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return scores(x, a_hi, a_lo, b_hi, b_lo, MODE)


@triton.jit
def lane_max(zs, REPEATS: tl.constexpr):
    """Maximum per lane of a tile."""
    m = zs[0]
    for r in tl.static_range(1, REPEATS):
        m = tl.maximum(m, zs[r])
    return tl.max(m, 1)


# Online softmax per lane. Carried: m = maximum so far, d = sum of exp(z - shift(m)).


@triton.jit
def shift(m):
    return tl.where(m == NEG_INF, 0.0, m)


@triton.jit
def softmax_step(zs, m, d, REPEATS: tl.constexpr):
    """Take one tile into (m, d)."""
    top = tl.maximum(m, lane_max(zs, REPEATS))
    c = shift(top)
    d *= exp(m - c)
    for r in tl.static_range(REPEATS):
        d += tl.sum(exp(zs[r] - c[:, None]), 1)
    return top, d


@triton.jit
def softmax_end(m, d):
    """(m, d) of all lanes -> (c, D) of the row: c = max z, 0 if all -inf; D = sum exp(z - c)."""
    c = shift(tl.max(m, 0))
    return c, tl.sum(d * exp(m - c), 0)


@triton.jit
def log_prob(z, c, s):
    """(z - c) - s for a scalar z of the row; never above 0, whatever a compiler fuses."""
    return tl.minimum(z - c, 0.0) - s


@triton.jit
def prob(dz, s):
    """e^(dz - s) of scores less their maximum."""
    return tl.exp2(tl.fma(dz, LOG2E, -s * LOG2E))


# Divergence sums a = sum e^(x - cx) ((x - cx) - (y - cy)). NaN in one stands for +inf (`sum_end`)
# where the columns themselves were no NaN: in that case the sums of exponentials are NaN as well.


@triton.jit
def log_ratio(dx, dy):
    """dx - dy as a finite factor of e^dx, +inf where only dy is -inf. So e^dx times it is 0 for dx
    = -inf, and NaN where only dy is -inf and e^dx is too small to be told from 0."""
    d = dx - dy
    return tl.where(d > LOWEST, d, LOWEST)


@triton.jit
def anchor_of(t, m):
    """A score to measure the other model's from, that of the column of the maximum m: 0 where it
    alone is -inf or a finite mask, so that no difference overflows."""
    return tl.where((t == NEG_INF) | ((t < -1e31) & (m > -1e31)), 0.0, t)


@triton.jit
def score_at(xs, ys, top, REPEATS: tl.constexpr):
    """Per lane the largest y where x is `top`; -inf where it is nowhere."""
    t = tl.where(xs[0] == top[:, None], ys[0], NEG_INF)
    for r in tl.static_range(1, REPEATS):
        t = tl.maximum(t, tl.where(xs[r] == top[:, None], ys[r], NEG_INF))
    return tl.max(t, 1)


@triton.jit
def rescale(a, d, scale, delta):
    """A divergence sum after its shifts moved.

    scale = e^(old cx - new cx) and delta = (old cx - new cx) - (old cy - new cy). An infinite sum
    stays so, a finite one whose scale is 0 becomes 0 however large delta is (a logit that is the
    lowest fp32).
    """
    gone = (scale == 0.0) & (tl.abs(a) < INF)
    return tl.where(gone, 0.0, scale * tl.fma(delta, d, a))


@triton.jit
def sum_end(a):
    return tl.where(a == a, a, INF)


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
def log1p(y):
    """log(1 + y) for y in [0, 1].

    u = 1 + y rounds; log(u) * y / (u - 1) takes the rounding back, because log(u) / (u - 1) is
    smooth.
    """
    u = 1.0 + y
    return tl.where(u == 1.0, y, tl.log(u) * (y / (u - 1.0)))


# Jensen-Shannon


@triton.jit
def log2_unit(u, LG2: tl.constexpr):
    """log2 u for u in (0, 1]: with LG2 the one instruction that NVIDIA GPUs have for it, off by up
    to 2^-22 (PTX ISA, lg2.approx), where `tl.log2` takes 27."""
    if LG2:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(u)


@triton.jit
def js_series(b, rest):
    """Taylor coefficients 2 to 6 of log(rest + b e^d) in d, b + rest = 1: cumulants of a Bernoulli
    variable over n! (the first is b)."""
    v, s = b * rest, rest - b
    k4 = v * (1.0 - 6.0 * v) * (1.0 / 24.0)
    k5 = v * s * (1.0 - 12.0 * v) * (1.0 / 120.0)
    k6 = v * (1.0 - 30.0 * v + 120.0 * v * v) * (1.0 / 720.0)
    return v * 0.5, v * s * (1.0 / 6.0), k4, k5, k6


@triton.jit
def js_terms(
    dx, dy, sx, sy, js_beta, rest, k2, k3, k4, k5, k6, AT_END: tl.constexpr, LG2: tl.constexpr
):
    """(q, p, log(m/q), log(m/p)), m = js_beta p + rest q, for scores (dx, dy) less their maxima and
    log-normalisers (sx, sy).

    With d = log(p/q) the larger of the two ratios is log(1 - w + w e^-|d|), w being the weight of
    the smaller probability; the other differs by |d|. Both are exactly 0 for d = 0. Beyond |d| = 80
    the smaller probability is below 2e-35 and counts nothing, so d ends there: nothing overflows,
    and the logarithms are finite, hence harmless, where a probability is 0. Below 0.375 the series
    of log(rest + js_beta e^d) is off by 2e-8 at most and keeps the digits of d; above, a logarithm
    off by 2e-7 does. AT_END: js_beta within 1/16 of 0 or 1, where another series keeps those of w.
    """
    q, p = prob(dx, sx), prob(dy, sy)
    d = (dy - dx) + (sx - sy)
    d = tl.where(d < 80.0, d, 80.0)  # also for -inf against -inf
    d = tl.where(d > -80.0, d, -80.0)
    e = exp(-tl.abs(d))
    below = d <= 0.0  # p <= q
    w = tl.where(below, js_beta, rest)
    far = LN2 * log2_unit(tl.fma(w, e, tl.where(below, rest, js_beta)), LG2)
    if AT_END:
        y = w * expm1_neg(tl.abs(d), e)
        series = tl.fma(y, tl.fma(y, tl.fma(y, tl.fma(y, 0.2, -0.25), 1.0 / 3.0), -0.5), 1.0) * y
        far = tl.where(y > -0.0625, series, far)
    near = d * tl.fma(d, tl.fma(d, tl.fma(d, tl.fma(d, tl.fma(d, k6, k5), k4), k3), k2), js_beta)
    close = tl.abs(d) < 0.375
    log_mq = tl.where(close, near, far + tl.where(below, 0.0, d))
    log_mp = tl.where(close, near - d, far - tl.where(below, d, 0.0))
    return q, p, log_mq, log_mp
