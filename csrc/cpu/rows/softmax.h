// What is known of one model's row while it is swept, and how it ends up in the results.
#pragma once

#include <math.h>

#include "cpu/rows/rows.h"
#include "cpu/vec/vec.h"

namespace dak::DAK_ISA {

// The sums are taken against `shift`, the largest score before the block at hand, so that a block
// needs no sweep of its own for its maximum. A block that rises more than `lag` powers of two above
// it is summed again: below that, the roundings of (score - shift) * exponent cost 5e-7 at most.
inline constexpr float lag = 6.0f;

struct Model {
  float shift = -inf;  // -inf: nothing but -inf so far
  float top = -inf;    // the exact maximum
  int64_t top_from = 0;  // first column of the block that has its first occurrence
  double sum = 0.0;    // of 2^((score - shift) * exponent)

  float from() const { return shift == -inf ? 0.0f : shift; }
  bool too_low_for(float new_top, float exponent) const {
    return new_top > shift && !((new_top - shift) * exponent <= lag);
  }
  // Moves the shift up; returns by what factor the old terms sink.
  double raise(float new_shift, float exponent) {
    if (!(new_shift > shift)) return 1.0;
    double by = shift == -inf ? 0.0 : double(shift) - double(new_shift);
    double sunk = ::exp2(by * exponent);
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

}  // namespace dak::DAK_ISA
