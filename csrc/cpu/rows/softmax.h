// The softmax of a row: what is known of it while the row is swept once, and what it ends up as.
#pragma once

#include <math.h>

#include "cpu/rows/sweep.h"

namespace dak::DAK_ISA {

// The sums are taken against `shift`, the largest score before the block at hand, so that a block
// needs no sweep of its own for its maximum. A block that rises more than `lag` powers of two above
// it is summed again: below that, the roundings of (score - shift) * exponent cost 5e-7 at most.
inline constexpr float lag = 6.0f;

struct RunningSoftmax {
  float shift = -inf;  // -inf: nothing but -inf so far
  float top = -inf;    // the exact maximum
  int64_t top_from = 0;  // first column of the block that has its first occurrence
  double sum = 0.0;    // of 2^((score - shift) * exponent)
  double self = 0.0;   // where asked for: of that times its power of two, for the entropy

  float from() const { return shift == -inf ? 0.0f : shift; }
  bool too_low_for(float new_top, float exponent) const {
    return new_top > shift && !((new_top - shift) * exponent <= lag);
  }
  // Moves the shift up; returns by what factor the old terms sink.
  double raise(float new_shift, float exponent) {
    if (!(new_shift > shift)) return 1.0;
    double by = shift == -inf ? 0.0 : double(shift) - double(new_shift);
    double sunk = ::exp2(by * exponent);
    self = (self + by * exponent * sum) * sunk;
    sum *= sunk;
    shift = new_shift;
    return sunk;
  }
  void add(double block_sum, float block_top, int64_t from_column) {
    sum += block_sum;
    if (block_top > top) top = block_top, top_from = from_column;
  }
  // More than two powers of two are worth what it takes to follow.
  bool should_follow(float exponent) const { return (top - shift) * exponent > 2.0f; }

  double log_sum() const { return ::log(sum); }  // above shift * inverse
  double lse(double inverse) const { return double(from()) * inverse + log_sum(); }
  // Of numbers that do not depend on the size of the scores, so that nothing large cancels.
  double entropy() const { return log_sum() - self / sum * ln2; }
  // NaN for a row of only -inf: log(0) - log(0).
  double log_prob(float score, double inverse) const {
    double logp = (double(score) - double(from())) * inverse - log_sum();
    return logp > 0.0 ? 0.0 : logp;
  }
  Norm norm(double inverse) const {
    float m = top == -inf ? 0.0f : float(double(top) * inverse);
    return {m, float(double(from()) * inverse - double(m) + log_sum())};
  }
};

// Where a normaliser has z = m, as a score, and what is left of it after rounding to fp32.
struct Anchor {
  float shift;
  double log_sum;  // log-probability = (score - shift) / temperature - log_sum

  Anchor(Norm norm, double inverse) {
    double at = double(norm.m) / inverse;
    move_to(float(at), double(norm.s) + (at - double(float(at))) * inverse);
    // Scores of 1e9 are 64 apart, and m stands for several of them: from one above or below the
    // maximum, exp would overflow. log_sum is the logarithm of a count of columns at most. What s has
    // lost stays lost: at temperature 0.7 gradients are off by 7e-6 at 1e10, 2e-3 at 1e12 and wrong
    // from 1e14; at 0.01, by 2e-4 at 1e10 and 4e-2 at 1e12.
    if (log_sum < -40.0 || log_sum > 40.0) {
      float near = float(double(shift) + log_sum / inverse);
      move_to(near, log_sum - (double(near) - double(shift)) * inverse);
    }
  }
  void move_to(float to, double sum) { shift = to, log_sum = sum; }
};

// log q - log p of a column, as the gradient of POLICY_REF takes it.
struct LogRatio {
  F shift_q, shift_p, inverse, log_sums;

  LogRatio(const Anchor& q, const Anchor& p, double one_over_temperature)
      : shift_q(set(q.shift)),
        shift_p(set(p.shift)),
        inverse(set(float(one_over_temperature))),
        log_sums(set(float(q.log_sum - p.log_sum))) {}
  DAK_INLINE F operator()(F zq, F zp) const {
    return fma((zq - shift_q) - (zp - shift_p), inverse, set(0.0f) - log_sums);
  }
};

// The power t of a column, where 2^t is 0: a finite one, since 0 times -inf is NaN.
DAK_INLINE F finite_power(F t) { return max(t, set(-200.0f)); }

// What a block adds to a RunningSoftmax.
struct ExpSums {
  double sum, self;
  float top;
};

// Over whole steps.
template <bool Self, class T, bool Cap>
inline ExpSums exp_sums(const Scorer<Cap>& score, const T* p, int64_t n, float shift) {
  F a, b, zero = set(0.0f), sum_a = zero, sum_b = zero, top_a = set(-inf), top_b = set(-inf);
  F m = set(shift), c = set(score.exponent), self_a = zero, self_b = zero;
  Sum sum, self;
  auto add = [&](int64_t i) __attribute__((always_inline)) {
    load_scores(score, p + i, a, b);
    top_a = max(a, top_a);
    top_b = max(b, top_b);
    F power_a = (a - m) * c, power_b = (b - m) * c, exp_a = exp2(power_a), exp_b = exp2(power_b);
    sum_a = sum_a + exp_a;
    sum_b = sum_b + exp_b;
    if constexpr (Self) {
      self_a = fma(exp_a, finite_power(power_a), self_a);
      self_b = fma(exp_b, finite_power(power_b), self_b);
    }
  };
  in_groups(n, add, [&]() __attribute__((always_inline)) {
    sum.add(sum_a + sum_b);
    sum_a = sum_b = zero;
    if constexpr (Self) {
      self.add(self_a + self_b);
      self_a = self_b = zero;
    }
  });
  return {sum.total(), Self ? self.total() : 0.0, max_of(max(top_a, top_b))};
}

template <bool Self, class T, bool Cap>
inline ExpSums exp_sums_rest(const Scorer<Cap>& score, const T* p, int64_t n, float shift) {
  F a, b, m = set(shift), c = set(score.exponent), self = set(0.0f);
  load_rest(score, p, n, a, b);
  F power_a = (a - m) * c, power_b = (b - m) * c, exp_a = exp2(power_a), exp_b = exp2(power_b);
  if constexpr (Self) self = fma(exp_a, finite_power(power_a), exp_b * finite_power(power_b));
  return {sum_of(exp_a + exp_b), Self ? sum_of(self) : 0.0, max_of(max(a, b))};
}

template <bool Self = false, class T, bool Cap>
inline RunningSoftmax sum_row(const Scorer<Cap>& score, const T* p, int64_t n) {
  RunningSoftmax softmax;
  softmax.raise(largest(score, p, n < peek ? n : peek), score.exponent);
  for (int64_t i = 0; i < n;) {
    int64_t columns = n - i >= block ? block : n - i >= step ? (n - i) / step * step : n - i;
    for (;;) {
      ExpSums part = columns < step ? exp_sums_rest<Self>(score, p + i, columns, softmax.from())
                                    : exp_sums<Self>(score, p + i, columns, softmax.from());
      if (softmax.too_low_for(part.top, score.exponent)) {
        softmax.raise(part.top, score.exponent);
        continue;
      }
      softmax.self += part.self;
      softmax.add(part.sum, part.top, i);
      if (softmax.should_follow(score.exponent)) softmax.raise(softmax.top, score.exponent);
      break;
    }
    i += columns;
  }
  return softmax;
}

// The column of the first maximum, found again in its block. Some column of the row where there is
// none: a row of only NaN under a softcap starts from a shift that no score has.
template <class T, bool Cap>
inline int64_t top_column(const Scorer<Cap>& score, const T* p, int64_t n,
                          const RunningSoftmax& softmax) {
  F a, b, top = set(softmax.top);
  int64_t i = softmax.top_from;
  for (; i + step <= n; i += step) {
    load_scores(score, p + i, a, b);
    if (any(eq(a, top)) || any(eq(b, top))) break;
  }
  while (i < n && !(score_at(score, p, i) == softmax.top)) i++;
  return i < n ? i : n - 1;
}

}  // namespace dak::DAK_ISA
