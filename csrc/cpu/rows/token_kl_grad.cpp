// Gradient of token_kl with respect to the policy's logits, one row.
#include <math.h>

#include "cpu/rows/kernels.h"
#include "cpu/rows/mixture.h"

namespace dak::DAK_ISA {
namespace {

// d[i] of reference/token_kl.py, times `scale`. One operator per direction.
struct PolicyRef {  // q (log q - log p - KL), KL in two parts
  LogRatio log_ratio;
  F exponent, center, rest, scale;
  DAK_INLINE F operator()(F zq, F zp) const {
    F q = exp2((zq - log_ratio.shift_q) * exponent) * scale;
    F d = ((log_ratio(zq, zp) - center) - rest) * q;
    return pick(eq(zq, set(-inf)), set(0.0f), d);
  }
};

struct RefPolicy {  // q - p; two products and a difference, so that it is 0 where the models agree
  F shift_q, shift_p, exponent, scale_q, scale_p;
  DAK_INLINE F operator()(F zq, F zp) const {
    F q = exp2((zq - shift_q) * exponent), p = exp2((zp - shift_p) * exponent);
    return q * scale_q - p * scale_p;
  }
};

struct Js {  // (1 - b) q (log(q / m) - KL(q || m))
  Mixture mixture;
  LogProb log_q, log_p;
  F center, scale;
  DAK_INLINE F operator()(F zq, F zp) const {
    F q, term_q, term_p;
    mixture.terms(log_q(zq), log_p(zp), q, term_q, term_p);
    return (term_q - q * center) * scale;
  }
};

// The gradient sums to 0, so what `d`, with q a probability, sums to instead is what rounding left of
// KL - center. A KL of 600 is rounded by 3e-5, and so is the log-ratio of the column that has nearly
// all of q; their difference, times q, is the gradient of that column. Only for rows whose KL is above
// `large`, where this costs more than the 5e-7 it saves below; the row is in the cache by then.
inline constexpr float large = 8.0f;

template <class T, bool Cap>
float rest_of(const Scorer<Cap>& score, const T* q, const T* p, int64_t n, const PolicyRef& d) {
  F q0, q1, p0, p1, sum = set(0.0f);
  Sum groups;
  int64_t whole = n / step * step;
  auto add = [&](int64_t i) __attribute__((always_inline)) {
    load_scores(score, q + i, q0, q1);
    load_scores(score, p + i, p0, p1);
    sum = sum + (d(q0, p0) + d(q1, p1));
  };
  auto close = [&]() __attribute__((always_inline)) {
    groups.add(sum);
    sum = set(0.0f);
  };
  in_groups(whole, add, close);
  if (whole < n) {
    load_rest(score, q + whole, n - whole, q0, q1);
    load_rest(score, p + whole, n - whole, p0, p1);
    sum = d(q0, p0) + d(q1, p1);
    close();
  }
  double total = groups.total();
  return total - total == 0.0 ? float(total) : 0.0f;
}

template <class T, class O, bool Cap, class D>
struct Pairwise {
  const Scorer<Cap>& score;
  const D& d;
  DAK_INLINE F one(F x, F y) const {
    if constexpr (Cap) {
      F slope, zq = score.with_slope(x, slope);
      return d(zq, score(y)) * slope;
    }
    return d(x, y);
  }
  template <bool Stream>
  DAK_INLINE void operator()(O* out, const T* policy, const T* ref) const {
    F x0, x1, y0, y1;
    load2(policy, x0, x1);
    load2(ref, y0, y1);
    store2<Stream, T>(out, one(x0, y0), one(x1, y1));
  }
};

template <class T, bool Cap, class D>
void write(const Scorer<Cap>& score, const T* q, const T* p, int64_t n, OutRow to, const D& d) {
  with_out<T>(to, [&](auto* out, auto stream) {
    Pairwise<T, plain<decltype(*out)>, Cap, D> fn{score, d};
    map_row<decltype(stream)::value>(out, n, fn, q, p);
  });
}

void kl_grad(Row policy, Row ref, const KlGrad& g, Score options, OutRow to) {
  with_type(policy, options, [&](auto* q, auto score) {
    auto* p = static_cast<decltype(q)>(ref.data);
    Anchor aq(g.policy, score.inverse), ap(g.ref, score.inverse);
    double scale = double(g.grad) * score.inverse;
    F shift_q = set(aq.shift), shift_p = set(ap.shift), exponent = set(score.exponent);
    if (g.direction == policy_ref) {
      LogRatio log_ratio(aq, ap, score.inverse);
      F center = set(g.center), zero = set(0.0f), one = factor(exp(-aq.log_sum));
      PolicyRef d{log_ratio, exponent, center, zero, one};
      if (fabsf(g.center) > large) d.rest = set(rest_of(score, q, p, policy.columns, d));
      d.scale = factor(scale * exp(-aq.log_sum));
      write(score, q, p, policy.columns, to, d);
    } else if (g.direction == ref_policy) {
      F scale_q = factor(scale * exp(-aq.log_sum)), scale_p = factor(scale * exp(-ap.log_sum));
      RefPolicy d{shift_q, shift_p, exponent, scale_q, scale_p};
      write(score, q, p, policy.columns, to, d);
    } else {
      F inverse = set(float(score.inverse));
      LogProb log_q{inverse, shift_q, set(float(aq.log_sum))};
      LogProb log_p{inverse, shift_p, set(float(ap.log_sum))};
      F weight = factor(scale * (1.0 - g.js_beta));
      Js d{Mixture(g.js_beta), log_q, log_p, set(g.center), weight};
      write(score, q, p, policy.columns, to, d);
    }
  });
}

}  // namespace

void fill_token_kl_grad(Kernels& table) { table.kl_grad = kl_grad; }

}  // namespace dak::DAK_ISA
