// exp2, expm1, log1p and tanh on vectors. The polynomials are minimax fits (weighted least
// squares, Lawson iterations, coefficients rounded to fp32 one after the other).
#pragma once

namespace dak::DAK_ISA {

// What a gradient is multiplied by; every NaN becomes the plain one (see rounded_bf16).
DAK_INLINE F factor(double x) { return set(x == x ? float(x) : __builtin_nanf("")); }

inline constexpr float log2e = 1.44269504f;
inline constexpr double ln2 = 0.69314718055994531;

// 2^t within 2 ulp (the polynomial: 9.3e-8) over the whole range: exactly 1 at 0, denormal results
// rounded once, 0 at -inf, NaN at NaN.
DAK_INLINE F exp2(F t) {
  t = in_exp2_range(t);
  // r = t - n as an fma: one addition fewer per column for the adder, on Zen 4 the busier pipe.
  F n = nearest(t), r = fma(n, set(-1.0f), t);
  F p = fma(set(0x1.5bda58p-10f), r, set(0x1.3ce8aep-7f));
  p = fma(p, r, set(0x1.c6b6d8p-5f));
  p = fma(p, r, set(0x1.ebf9c2p-3f));
  p = fma(p, r, set(0x1.62e42ap-1f));
  return times_pow2(fma(p, r, set(1.0f)), n);
}

// For a <= 0: expm1(a) within 2 ulp, and exp(a), both relative. NaN at NaN.
DAK_INLINE void expm1_exp(F a, F& minus_1, F& whole) {
  a = max(set(-150.0f), a);  // -inf would leave NaN in r; both results are the same from -104 down
  F n = nearest(a * set(log2e));
  F r = fma(n, set(-0x1.62e4p-1f), a);  // 15 bits of ln 2, so that the product is exact
  r = fma(n, set(-0x1.7f7d1cp-20f), r);
  F p = fma(set(0.0013940653f), r, set(0.008366396f));
  p = fma(p, r, set(0.041666403f));
  p = fma(p, r, set(0.16666545f));
  p = fma(p, r, set(0.5f));
  p = fma(p * r, r, r);
  F two_n = times_pow2(set(1.0f), n);
  minus_1 = fma(two_n, p, two_n - set(1.0f));
  whole = fma(two_n, p, two_n);
}

// log(1 + u) for -1 < u <= 0, relative to 1e-7 also next to 0.
DAK_INLINE F log1p(F u) {
  F w = u + set(1.0f), lost = u - (w - set(1.0f)), mantissa, k, inverse;
  split(w, mantissa, k, inverse);
  F f = fma(lost, inverse, mantissa - set(1.0f));
  F p = fma(set(0.08738792f), f, set(-0.14307724f));
  p = fma(p, f, set(0.14916356f));
  p = fma(p, f, set(-0.16570313f));
  p = fma(p, f, set(0.1996224f));
  p = fma(p, f, set(-0.25001776f));
  p = fma(p, f, set(0.33333945f));
  p = fma(p, f, set(-0.4999999f));
  return fma(k, set(0x1.62e43p-1f), fma(p * f, f, f));
}

// Within 2 ulp: a polynomial up to 0.625, and 1 - 2E / (1 + E) with E = exp(-2|u|) beyond, where
// the 1 hides the quotient's error.
DAK_INLINE F tanh(F u) {
  F a = abs(u), one = set(1.0f), s = u * u;
  F p = fma(set(-0.0057140635f), s, set(0.020648062f));
  p = fma(p, s, set(-0.053742774f));
  p = fma(p, s, set(0.13331483f));
  p = fma(p, s, set(-0.33333284f));
  p = fma(p * s, u, u);
  F e = exp2(a * set(-2.88539008f));
  F q = one - (e + e) / (one + e);
  return pick(le(a, set(0.625f)), p, copysign(q, u));
}

}  // namespace dak::DAK_ISA
