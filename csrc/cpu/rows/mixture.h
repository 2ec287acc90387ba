// Jensen-Shannon, of token_kl and token_stats: the terms of a column from both models'
// log-probabilities, and the sweep that sums them, last column first, out of the cache.
#pragma once

#include <math.h>

#include "cpu/rows/softmax.h"

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

struct JsSums {
  double q = 0, p = 0;  // KL(q || m), KL(p || m); q is the policy
};

inline LogProb log_prob_of(const RunningSoftmax& softmax, double inverse) {
  return {set(float(inverse)), set(softmax.from()), set(float(softmax.log_sum()))};
}

template <class T, bool Cap>
inline JsSums js_block(const Scorer<Cap>& score, const T* pq, const T* pp, int64_t n,
                       const Mixture& mixture, const LogProb& log_q, const LogProb& log_p) {
  F q0, q1, p0, p1, unused, term_q, term_p, zero = set(0.0f), sum_q = zero, sum_p = zero;
  Sum total_q, total_p;
  auto add = [&](F q, F p) __attribute__((always_inline)) {
    mixture.terms(log_q(q), log_p(p), unused, term_q, term_p);
    sum_q = sum_q + term_q;
    sum_p = sum_p + term_p;
  };
  if (n < step) {
    load_rest(score, pq, n, q0, q1);
    load_rest(score, pp, n, p0, p1);
    add(q0, p0);
    add(q1, p1);
  }
  auto both = [&](int64_t i) __attribute__((always_inline)) {
    load_scores(score, pq + i, q0, q1);
    load_scores(score, pp + i, p0, p1);
    add(q0, p0);
    add(q1, p1);
  };
  auto close = [&]() __attribute__((always_inline)) {
    total_q.add(sum_q);
    total_p.add(sum_p);
    sum_q = sum_p = zero;
  };
  in_groups(n / step * step, both, close);
  close();  // of fewer columns than a step
  return {total_q.total(), total_p.total()};
}

template <class T, bool Cap>
inline JsSums js_row(const Scorer<Cap>& score, const T* pq, const T* pp, int64_t n, double js_beta,
                     const LogProb& log_q, const LogProb& log_p) {
  Mixture mixture(js_beta);
  int64_t whole = n / step * step;
  JsSums sums;
  auto add = [&](int64_t begin, int64_t end) {
    JsSums s = js_block(score, pq + begin, pp + begin, end - begin, mixture, log_q, log_p);
    sums.q += s.q;
    sums.p += s.p;
  };
  if (whole < n) add(whole, n);
  for (int64_t stop = whole; stop > 0; stop -= block) add(stop > block ? stop - block : 0, stop);
  return sums;
}

}  // namespace dak::DAK_ISA
