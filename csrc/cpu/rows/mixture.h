// Terms of the Jensen-Shannon divergence of one column, from both models' log-probabilities.
#pragma once

#include <math.h>

#include "cpu/rows/sweep.h"

namespace dak::DAK_ISA {

struct Mixture {
  F b, one_minus_b, log_b, log_one_minus_b;

  explicit Mixture(double js_beta)
      : b(set(float(js_beta))),
        one_minus_b(set(float(1.0 - js_beta))),
        log_b(set(float(::log(js_beta)))),
        log_one_minus_b(set(float(::log1p(-js_beta)))) {}

  // q, q log(q / m) and p log(p / m) for m = b p + (1 - b) q. With d = log p - log q, the larger of
  // the two has log(m / larger) = log1p(k expm1(-|d|)), k being the smaller one's weight: exactly 0
  // where p = q, and the log of the larger one's weight at least, which 1 - k has lost where k is
  // close to 1. The smaller one is |d| further away, and is the larger one times exp(-|d|).
  DAK_INLINE void terms(F log_q, F log_p, F& q, F& term_q, F& term_p) const {
    F d = log_p - log_q, far = abs(d), minus_1, ratio, zero = set(0.0f);
    expm1_exp(zero - far, minus_1, ratio);
    Mask q_larger = le(d, zero);
    F near = log1p(pick(q_larger, b, one_minus_b) * minus_1);
    near = max(pick(q_larger, log_one_minus_b, log_b), near);
    F large = exp2(max(log_q, log_p) * set(log2e));
    // 0 log 0 = 0: d is NaN where both logits are -inf, infinite where one is
    Mask none = eq(large, zero);
    F small = pick(none, zero, large * ratio);
    F term_large = pick(none, zero, zero - large * near);
    F term_small = pick(eq(small, zero), zero, zero - small * (near + far));
    q = pick(q_larger, large, small);
    term_q = pick(q_larger, term_large, term_small);
    term_p = pick(q_larger, term_small, term_large);
  }
};

// log-probability of a column: (score - shift) / temperature - log_sum, shift near the maximum.
struct LogProb {
  F inverse, shift, log_sum;
  DAK_INLINE F operator()(F score) const {
    return fma(score - shift, inverse, set(0.0f) - log_sum);
  }
};

}  // namespace dak::DAK_ISA
