// Scores and normalisers. The polynomial is that of triton_kernels/_rows.py.
#pragma once

#include "cuda/approx.cuh"
#include "cuda/vec.cuh"

namespace dak::gpu {

inline constexpr float log2e = 1.44269504f, ln2 = 0.693147181f;
inline constexpr float tiny = 1.17549435e-38f, largest = 3.40282347e38f;  // normal fp32

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

// log2 of a column's probability, from (z - top) * exponent and the log2 of the row's sum. The
// product cannot take z apart from top: at z = 1e4 an fma of z itself would be off by 1e-3.
struct Log2Prob {
  float top, exponent, log2_sum;
  __device__ Log2Prob(const Score& c, float top, float log2_sum)
      : top(top), exponent(c.exponent), log2_sum(log2_sum) {}
  __device__ Log2Prob(const Score& c, const Anchor& anchor)
      : Log2Prob(c, anchor.top, anchor.log_sum * log2e) {}
  __device__ float operator()(float score) const {
    return fmaf(score - top, exponent, -log2_sum);
  }
  __device__ bool finite() const { return fabsf(log2_sum) < inf; }
};

}  // namespace dak::gpu
