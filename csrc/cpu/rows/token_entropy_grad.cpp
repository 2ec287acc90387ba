// Gradient of token_entropy with respect to the logits, one row: one sweep.
#include <math.h>

#include "cpu/rows/kernels.h"
#include "cpu/rows/softmax.h"

namespace dak::DAK_ISA {
namespace {

// out = by * 2^t * (t * ln 2 + center) * slope, t = (score - shift) * exponent
template <class T, class O, bool Cap>
struct Surprise {
  const Scorer<Cap>& score;
  F shift, exponent, center, by;

  DAK_INLINE F at(F z) const {
    F t = (z - shift) * exponent;
    return by * exp2(t) * fma(finite_power(t), set(float(ln2)), center);
  }
  DAK_INLINE F one(F x) const {
    if constexpr (Cap) {
      F slope, z = score.with_slope(x, slope);
      return at(z) * slope;
    }
    return at(x);
  }
  template <bool Stream>
  DAK_INLINE void operator()(O* out, const T* p) const {
    F a, b;
    load2(p, a, b);
    store2<Stream, T>(out, one(a), one(b));
  }
};

// log p + entropy = t * ln 2 + (entropy - log_sum); the difference in double, because both parts are
// small and nearly alike where one column has nearly all of the row.
void entropy_grad(Row x, Score options, Norm norm, float entropy, double grad, OutRow to) {
  with_type(x, options, [&](auto* p, auto score) {
    using T = plain<decltype(*p)>;
    constexpr bool cap = decltype(score)::capped;
    Anchor at(norm, score.inverse);
    F center = set(float(double(entropy) - at.log_sum));
    F by = factor(-grad * score.inverse * exp(-at.log_sum));
    with_out<T>(to, [&](auto* out, auto stream) {
      using O = plain<decltype(*out)>;
      Surprise<T, O, cap> fn{score, set(at.shift), set(score.exponent), center, by};
      map_row<decltype(stream)::value>(out, x.columns, fn, p);
    });
  });
}

}  // namespace

void fill_token_entropy_grad(Kernels& table) { table.entropy_grad = entropy_grad; }

}  // namespace dak::DAK_ISA
