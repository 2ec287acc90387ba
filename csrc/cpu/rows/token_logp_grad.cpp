// Gradient of token_logp with respect to the logits, one row: one sweep.
#include <math.h>

#include "cpu/rows/kernels.h"
#include "cpu/rows/softmax.h"

namespace dak::DAK_ISA {
namespace {

// out = by * 2^((score - shift) * exponent) * slope
template <class T, class O, bool Cap>
struct ScaledExp {
  const Scorer<Cap>& score;
  F shift, exponent, by;

  DAK_INLINE F one(F x) const {
    if constexpr (Cap) {
      F slope, z = score.with_slope(x, slope);
      return by * exp2((z - shift) * exponent) * slope;
    }
    return by * exp2((x - shift) * exponent);
  }
  template <bool Stream>
  DAK_INLINE void operator()(O* out, const T* p) const {
    F a, b;
    load2(p, a, b);
    store2<Stream, T>(out, one(a), one(b));
  }
};

template <class O>
inline void store_one(O* out, float value) {
  O buffer[step];
  store2<false, float>(buffer, set(value), set(value));
  *out = buffer[0];
}

void logp_grad(Row x, int64_t y, Score options, Norm norm, double grad, OutRow to) {
  with_type(x, options, [&](auto* p, auto score) {
    using T = plain<decltype(*p)>;
    constexpr bool cap = decltype(score)::capped;
    Anchor at(norm, score.inverse);  // p_v = 2^((score_v - shift) * exponent) * exp(-log_sum)
    float target = score_at(score, p, y);  // read before `out`, which may be the logits
    double logp = (double(target) - double(at.shift)) * score.inverse - at.log_sum;
    double slope = 1.0;
    if constexpr (cap) {
      double t = double(target) / options.softcap;
      slope = 1.0 - t * t;
    }
    double at_target = -expm1(logp < 0 ? logp : logp - logp) * slope * score.inverse * grad;
    F by = factor(-grad * score.inverse * exp(-at.log_sum));
    with_out<T>(to, [&](auto* out, auto stream) {
      using O = plain<decltype(*out)>;
      ScaledExp<T, O, cap> fn{score, set(at.shift), set(score.exponent), by};
      map_row<decltype(stream)::value>(out, x.columns, fn, p);
      store_one(out + y, float(at_target));
    });
  });
}

}  // namespace

void fill_token_logp_grad(Kernels& table) { table.logp_grad = logp_grad; }

}  // namespace dak::DAK_ISA
