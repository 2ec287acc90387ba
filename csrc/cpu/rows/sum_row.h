// The normaliser of one row in one sweep.
#pragma once

#include "cpu/rows/softmax.h"
#include "cpu/rows/sweep.h"

namespace dak::DAK_ISA {

// sum of 2^((score - shift) * exponent) and the largest score over whole steps.
template <class T, bool Cap>
inline double exp_sum(const Scorer<Cap>& score, const T* p, int64_t n, float shift, float& top) {
  F a, b, zero = set(0.0f), sum_a = zero, sum_b = zero, top_a = set(-inf), top_b = set(-inf);
  F m = set(shift), c = set(score.exponent);
  Sum sum;
  auto add = [&](int64_t i) __attribute__((always_inline)) {
    load_scores(score, p + i, a, b);
    top_a = max(a, top_a);
    top_b = max(b, top_b);
    sum_a = sum_a + exp2((a - m) * c);
    sum_b = sum_b + exp2((b - m) * c);
  };
  in_groups(n, add, [&]() __attribute__((always_inline)) {
    sum.add(sum_a + sum_b);
    sum_a = sum_b = zero;
  });
  top = max_of(max(top_a, top_b));
  return sum.total();
}

template <class T, bool Cap>
inline double exp_sum_rest(
    const Scorer<Cap>& score, const T* p, int64_t n, float shift, float& top) {
  F a, b, m = set(shift), c = set(score.exponent);
  load_rest(score, p, n, a, b);
  top = max_of(max(a, b));
  return sum_of(exp2((a - m) * c) + exp2((b - m) * c));
}

template <class T, bool Cap>
inline Model sum_row(const Scorer<Cap>& score, const T* p, int64_t n) {
  Model model;
  model.raise(largest(score, p, n < peek ? n : peek), score.exponent);
  for (int64_t i = 0; i < n;) {
    int64_t columns = n - i >= block ? block : n - i >= step ? (n - i) / step * step : n - i;
    for (;;) {
      float top;
      double sum;
      if (columns < step) {
        sum = exp_sum_rest(score, p + i, columns, model.from(), top);
      } else {
        sum = exp_sum(score, p + i, columns, model.from(), top);
      }
      if (model.too_low_for(top, score.exponent)) {
        model.raise(top, score.exponent);
        continue;
      }
      model.add(sum, top, i);
      if (model.should_follow(score.exponent)) model.raise(model.top, score.exponent);
      break;
    }
    i += columns;
  }
  return model;
}

// The column of the first maximum, found again in its block. Some column of the row where there is
// none: a row of only NaN under a softcap starts from a shift that no score has.
template <class T, bool Cap>
inline int64_t top_column(const Scorer<Cap>& score, const T* p, int64_t n, const Model& model) {
  F a, b, top = set(model.top);
  int64_t i = model.top_from;
  for (; i + step <= n; i += step) {
    load_scores(score, p + i, a, b);
    if (any(eq(a, top)) || any(eq(b, top))) break;
  }
  while (i < n && !(score_at(score, p, i) == model.top)) i++;
  return i < n ? i : n - 1;
}

}  // namespace dak::DAK_ISA
