// Scores and the functions of one column. The polynomials are those of triton_kernels/_rows.py.
#pragma once

#include "cuda/vec.cuh"

namespace dak::gpu {

inline constexpr float log2e = 1.44269504f, ln2 = 0.693147181f;
inline constexpr float tiny = 1.17549435e-38f;  // smallest normal fp32

// 2^t within 2 ulp in one instruction; 0 at -inf, NaN at NaN; denormal results are 0.
__device__ inline float exp2_fast(float t) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(t));
  return y;
#else
  return exp2f(t);
#endif
}

__device__ inline float exp_fast(float x) { return exp2_fast(x * log2e); }

// A row or lane that has only seen -inf shifts by 0: exp(-inf) = 0 instead of NaN.
__device__ inline float shift(float top) { return top == -inf ? 0.0f : top; }

// x * (hi + lo), rounded once.
__device__ inline float times(float x, float hi, float lo) { return fmaf(x, hi, x * lo); }

// tanh u and 1 - tanh(u)^2 to a few ulps: a polynomial near 0, exp elsewhere.
__device__ inline float tanh_parts(float u, float& slope) {
  float e = exp_fast(-2.0f * fabsf(u)), r = __frcp_rn(1.0f + e), s = u * u;
  slope = 4.0f * e * r * r;
  float p = fmaf(s, 0.0023764489526493056f, -0.008415210103084506f);
  p = fmaf(s, p, 0.021789952183412183f);
  p = fmaf(s, p, -0.05396176379334125f);
  p = fmaf(s, p, 0.1333331384384943f);
  p = fmaf(s, p, -0.33333333238972873f);
  return s < 0.36f ? fmaf(u * s, p, u) : copysignf((1.0f - e) * r, u);
}

template <bool Cap>
__device__ inline float score_of(const Score& c, float x) {
  if constexpr (Cap) {
    float slope;
    return c.cap * tanh_parts(times(x, c.per_cap_hi, c.per_cap_lo), slope);
  }
  return x;
}

// d score / d x beside the score.
template <bool Cap>
__device__ inline float score_of(const Score& c, float x, float& slope) {
  if constexpr (Cap) return c.cap * tanh_parts(times(x, c.per_cap_hi, c.per_cap_lo), slope);
  slope = 1.0f;
  return x;
}

// e^-a - 1 for a >= 0, given ea = e^-a.
__device__ inline float expm1_neg(float a, float ea) {
  float p = fmaf(a, -0.00016487341507225194f, 0.0013706976068857389f);
  p = fmaf(a, p, -0.008328705746499016f);
  p = fmaf(a, p, 0.041666130830212f);
  p = fmaf(a, p, -0.1666666438848371f);
  p = fmaf(a, p, 0.49999999984160165f);
  return a < 0.5f ? fmaf(a * a, p, -a) : ea - 1.0f;
}

// log(1 + y) for y in (-1, 0], relative to 1e-7 also next to 0, where lg2.approx has only an
// absolute bound; `least` > 0 is a lower bound of 1 + y that the caller knows. As in csrc/cpu.
__device__ inline float log1p_neg(float y, float least) {
  float w = fmaxf(1.0f + y, least), lost = y - (w - 1.0f);
  int bits = __float_as_int(w), e = (bits - 0x3f3504f3) >> 23;
  float inverse = __int_as_float((127 - e) << 23);  // 2^-e; w * inverse in [sqrt(1/2), sqrt(2))
  float f = fmaf(lost, inverse, __int_as_float(bits - (e << 23)) - 1.0f);
  float p = fmaf(0.08738792f, f, -0.14307724f);
  p = fmaf(p, f, 0.14916356f);
  p = fmaf(p, f, -0.16570313f);
  p = fmaf(p, f, 0.1996224f);
  p = fmaf(p, f, -0.25001776f);
  p = fmaf(p, f, 0.33333945f);
  p = fmaf(p, f, -0.4999999f);
  return fmaf(float(e), ln2, fmaf(p * f, f, f));
}

// q, log(m/q) and log(m/p) from log-probabilities, m = b p + rest q. With d = lp - lq the larger of
// the two ratios is log1p(w expm1(-|d|)), w being the weight of the smaller probability; the other
// one differs by |d|. Both are exactly 0 for p = q.
struct JsTerms {
  float q, p, log_mq, log_mp;
  __device__ JsTerms(float lq, float lp, float b, float rest) {
    float d = lp - lq, a = fabsf(d), ea = exp_fast(-a);
    bool below = d <= 0.0f;  // p <= q
    float big = exp_fast(below ? lq : lp), small = big * ea;
    float near = log1p_neg((below ? b : rest) * expm1_neg(a, ea), below ? rest : b);
    q = below ? big : small;
    p = below ? small : big;
    log_mq = below ? near : near + d;
    log_mp = below ? near - d : near;
  }
};

// (m, s) of reference/_rows.py from a row's largest score and its sum of exp(z - m).
struct Norm {
  float m, s;
  __device__ Norm(const Score& c, float top, float sum) {
    float at = shift(top), low = at * c.inverse_lo;
    m = fmaf(at, c.inverse_hi, low);
    s = logf(sum) + (fmaf(at, c.inverse_hi, -m) + low);
  }
};

// Back: the score where z = m, and the log of the sum against it after both are rounded.
struct Anchor {
  float top, log_sum;
  __device__ Anchor(const Score& c, float m, float s) {
    float low = m * c.temperature_lo;
    top = fmaf(m, c.temperature_hi, low);
    float lost = fmaf(m, c.temperature_hi, -top) + low;  // m * temperature - top
    log_sum = fmaf(lost, c.inverse_hi, s);
  }
  __device__ Anchor(const Score& c, const float* norm, int64_t row)
      : Anchor(c, norm[2 * row], norm[2 * row + 1]) {}
  __device__ float log_prob(const Score& c, float score) const {
    return fmaf(score - top, c.inverse_hi, -log_sum);
  }
};

}  // namespace dak::gpu
