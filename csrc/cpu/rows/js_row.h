// The second sweep of the Jensen-Shannon divergence: last column first, out of the cache.
#pragma once

#include "cpu/rows/mixture.h"
#include "cpu/rows/softmax.h"

namespace dak::DAK_ISA {

struct JsSums {
  double q = 0, p = 0;  // KL(q || m), KL(p || m); q is the policy
};

inline LogProb log_prob_of(const Model& model, double inverse) {
  return {set(float(inverse)), set(model.from()), set(float(model.log_sum()))};
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
