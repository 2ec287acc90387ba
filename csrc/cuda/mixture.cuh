// Jensen-Shannon, of token_kl and token_stats: the terms of one column, and their sums over a row
// whose normalisers are known.
//
// With m = b p + (1 - b) q and d = log2 p - log2 q, the larger probability's log2(m / larger) is
// log2(k 2^-|d| + (1 - k)), k being the smaller one's weight b or 1 - b; log2(m / smaller) is |d|
// more. lg2.approx is 2^-22 off there, absolute, while q times it is summed to numbers below 1: well
// within the contract. Near d = 0, where models that are nearly equal get their whole divergence, it
// is the polynomial log2(m / q) = b d + b (1 - b) / 2 d^2 ln 2 + ..., relative to 1e-5 and exactly 0
// where p = q. Between KL(q || m) and KL(p || m) only d differs, so its errors cancel there.
#pragma once

#include "cuda/row.cuh"

namespace dak::gpu {

inline constexpr float near = 0.18f;  // |d| below which the polynomial is the better one
// Probabilities below 2^-120 count as that: no inf - inf where a model masks a column, and what they
// add is below 1e-34. NaN becomes that too, so callers look at the normalisers.
inline constexpr float faintest = -120.0f;

struct JsTerms {
  float q, p, log_mq, log_mp;  // the logs are log2
  __device__ JsTerms(float lq, float lp, const Mixture& mix) {
    lq = fmaxf(lq, faintest), lp = fmaxf(lp, faintest);
    float d = lp - lq, ratio = exp2_fast(-fabsf(d)), larger = exp2_fast(fmaxf(lq, lp));
    bool below = d <= 0.0f;  // p <= q
    float mixed = fmaf(below ? mix.b : mix.rest, ratio, below ? mix.rest : mix.b);
    float poly = fmaf(d, mix.near[3], mix.near[2]);
    poly = fmaf(d, poly, mix.near[1]);
    poly = d * fmaf(d, poly, mix.near[0]);
    log_mq = fabsf(d) < near ? poly : log2_fast(mixed) + fmaxf(d, 0.0f);
    log_mp = log_mq - d;
    float smaller = larger * ratio;
    q = below ? larger : smaller;
    p = below ? smaller : larger;
  }
};

// d JS / d score of the policy's column, but for the upstream gradient: (1 - b) q (log(q / m) -
// KL(q || m)). `factor` holds 1 - b. Exactly 0 where the policy masks the column.
__device__ inline float js_slope(float lq, float lp, const Mixture& mix, float center,
                                 float factor) {
  return exp2_fast(lq) * (fmaf(JsTerms(lq, lp, mix).log_mq, -ln2, -center) * factor);
}

struct JsSums {
  float q, p;  // KL(q || m), KL(p || m)
};

// This block's share of the sums, the same in every thread; the row is read backwards, see Tiles.
template <class T, bool Cap>
__device__ inline JsSums js_sums(const Rows& r, const Part<T>& part, Tiles<T>& tiles,
                                 const Log2Prob& log_q, const Log2Prob& log_p,
                                 const Mixture& mix) {
  const uint4 *own = buffer(r.plan, 0), *other = buffer(r.plan, 1);
  float sums[2] = {};
  tiles.sweep_back([&](int first, int count) {
#pragma unroll 1
    for (int i = int(threadIdx.x); i < count; i += threads) {
      float zq[vec<T>], zp[vec<T>], more_q = 0.0f, more_p = 0.0f;
      scores_of<T, Cap>(r.score, part, first + i, own[i], zq);
      scores_of<T, Cap>(r.score, part, first + i, other[i], zp);
#pragma unroll
      for (int k = 0; k < vec<T>; k++) {
        JsTerms t(log_q(zq[k]), log_p(zp[k]), mix);
        more_q = fmaf(t.q, t.log_mq, more_q);
        more_p = fmaf(t.p, t.log_mp, more_p);
      }
      sums[0] += more_q, sums[1] += more_p;
    }
  });
  block_sums(sums);
  float scale = log_q.finite() && log_p.finite() ? -ln2 : nan_value;
  return {sums[0] * scale, sums[1] * scale};
}

// The same of the whole row. leave_cluster goes before it and after it.
__device__ inline JsSums js_of_cluster(const LaunchPlan& plan, JsSums mine) {
  float sums[2] = {mine.q, mine.p};
  exchange(plan, sums, {0.0f, 0.0f});
  return {warp_sum(sums[0]), warp_sum(sums[1])};
}

}  // namespace dak::gpu
