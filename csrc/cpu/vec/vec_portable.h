// F for every other machine: 4 floats in the vector extension of GCC and clang, which becomes SSE2,
// NEON or plain scalar code.
#pragma once

namespace dak::DAK_ISA {

typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));

struct F {
  static constexpr int lanes = 4;
  f32x4 v;
};
struct Mask {
  i32x4 v;  // -1 or 0
};

DAK_INLINE F set(float x) { return {f32x4{x, x, x, x}}; }
DAK_INLINE F operator+(F a, F b) { return {a.v + b.v}; }
DAK_INLINE F operator-(F a, F b) { return {a.v - b.v}; }
DAK_INLINE F operator*(F a, F b) { return {a.v * b.v}; }
DAK_INLINE F operator/(F a, F b) { return {a.v / b.v}; }
DAK_INLINE F fma(F a, F b, F c) { return {a.v * b.v + c.v}; }  // rounded twice
DAK_INLINE Mask eq(F a, F b) { return {a.v == b.v}; }
DAK_INLINE Mask le(F a, F b) { return {a.v <= b.v}; }
DAK_INLINE Mask both(Mask a, Mask b) { return {a.v & b.v}; }
DAK_INLINE Mask but_not(Mask a, Mask b) { return {a.v & ~b.v}; }
DAK_INLINE bool any(Mask m) { return (m.v[0] | m.v[1] | m.v[2] | m.v[3]) != 0; }
DAK_INLINE F pick(Mask m, F yes, F no) {
  return {(f32x4)(((i32x4)yes.v & m.v) | ((i32x4)no.v & ~m.v))};
}
// Gives b where a is NaN, and NaN where b is.
DAK_INLINE F max(F a, F b) { return pick({a.v > b.v}, a, b); }
DAK_INLINE F abs(F a) { return {(f32x4)((i32x4)a.v & 0x7fffffff)}; }
DAK_INLINE F copysign(F magnitude, F sign) {  // magnitude >= 0
  return {(f32x4)((u32x4)magnitude.v | ((u32x4)sign.v & 0x80000000u))};
}

// The nearest integer, |t| <= 2^21: adding 1.5 * 2^23 leaves no room for fractions.
DAK_INLINE F nearest(F t) { return (t + set(12582912.0f)) - set(12582912.0f); }
// Beyond these ends 2^t is 0 or inf all the same; NaN stays.
DAK_INLINE F in_exp2_range(F t) {
  t = pick({t.v < -160.0f}, set(-160.0f), t);
  return pick({t.v > 160.0f}, set(160.0f), t);
}
// a * 2^n, |n| <= 250, in two factors so that a denormal result is rounded once.
DAK_INLINE F times_pow2(F a, F n) {
  i32x4 whole = (i32x4)(n.v + 12582912.0f) - 0x4b400000;
  i32x4 half = whole >> 1, rest = whole - half;
  return {a.v * (f32x4)((half + 127) << 23) * (f32x4)((rest + 127) << 23)};
}

// w > 0 and normal: w = mantissa * 2^k, mantissa in [sqrt(1/2), sqrt(2)); also 2^-k.
DAK_INLINE void split(F w, F& mantissa, F& k, F& inverse) {
  i32x4 bits = (i32x4)w.v, e = (bits - 0x3f3504f3) >> 23;
  mantissa.v = (f32x4)(bits - (e << 23));
  k.v = __builtin_convertvector(e, f32x4);
  inverse.v = (f32x4)((127 - e) << 23);
}

DAK_INLINE float first_of(F a) { return a.v[0]; }
DAK_INLINE float sum_of(F a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
DAK_INLINE float max_of(F a) {
  float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1], y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return x > y ? x : y;
}

DAK_INLINE f32x4 from_f16(u32x4 h) {
  f32x4 magnitude = (f32x4)((h & 0x7fff) << 13) * 0x1p112f;
  u32x4 special = (u32x4)((h & 0x7c00) == 0x7c00) & 0x7f800000u;  // inf and NaN
  return (f32x4)((u32x4)magnitude | special | ((h & 0x8000) << 16));
}
DAK_INLINE u32x4 to_f16(f32x4 x) {
  u32x4 u = (u32x4)x, sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  u32x4 normal = (a + 0xfff + ((a >> 13) & 1) - (112u << 23)) >> 13;
  u32x4 small = (u32x4)((f32x4)a + 0.5f) - 0x3f000000u;  // the sum's last place is f16's last
  u32x4 h = (u32x4)(a < (113u << 23));
  h = (small & h) | (normal & ~h);
  u32x4 over = (u32x4)(a >= 0x477ff000u);  // 65520 and up
  h = (over & 0x7c00) | (h & ~over);
  u32x4 nan = (u32x4)(a > 0x7f800000u);
  return ((nan & 0x7e00) | (h & ~nan)) | sign;
}
// fp32 bits whose upper half is x rounded to bf16 (to nearest, ties to even); NaN becomes a quiet
// NaN.
DAK_INLINE u32x4 rounded_bf16(f32x4 x) {
  u32x4 u = (u32x4)x, nan = (u32x4)((u & 0x7fffffff) > 0x7f800000u);
  return (nan & 0x7fc00000u) | ((u + 0x7fff + ((u >> 16) & 1)) & ~nan);
}

template <class T>
DAK_INLINE u32x4 widen(const T* p) {
  return u32x4{p[0].bits, p[1].bits, p[2].bits, p[3].bits};
}
DAK_INLINE void narrow(uint16_t* p, u32x4 x) {
  for (int i = 0; i < 4; i++) p[i] = uint16_t(x[i]);
}

DAK_INLINE void store1(float* p, F a) { memcpy(p, &a.v, 16); }

DAK_INLINE void load2(const float* p, F& a, F& b) {
  memcpy(&a.v, p, 16);
  memcpy(&b.v, p + 4, 16);
}
DAK_INLINE void load2(const bf16* p, F& a, F& b) {
  u32x4 w;
  memcpy(&w, p, 16);
  a.v = (f32x4)(w << 16);
  b.v = (f32x4)(w & 0xffff0000u);
}
DAK_INLINE void load2(const f16* p, F& a, F& b) {
  a.v = from_f16(widen(p));
  b.v = from_f16(widen(p + 4));
}

// `In` is the type that load2 read, which decides the order of the columns.
template <bool Stream, class In>
DAK_INLINE void store2(float* p, F a, F b) {
  if constexpr (same<In, bf16>) {
    f32x4 even = a.v, odd = b.v;
    a.v = f32x4{even[0], odd[0], even[1], odd[1]};
    b.v = f32x4{even[2], odd[2], even[3], odd[3]};
  }
  memcpy(p, &a.v, 16);
  memcpy(p + 4, &b.v, 16);
}
template <bool Stream, class In>
DAK_INLINE void store2(bf16* p, F a, F b) {
  u32x4 ra = rounded_bf16(a.v), rb = rounded_bf16(b.v);
  if constexpr (same<In, bf16>) {
    u32x4 w = (ra >> 16) | (rb & 0xffff0000u);
    memcpy(p, &w, 16);
  } else {
    narrow(&p->bits, ra >> 16);
    narrow(&p->bits + 4, rb >> 16);
  }
}
template <bool Stream, class In>
DAK_INLINE void store2(f16* p, F a, F b) {
  static_assert(!same<In, bf16>);
  narrow(&p->bits, to_f16(a.v));
  narrow(&p->bits + 4, to_f16(b.v));
}
DAK_INLINE void stores_done() {}

}  // namespace dak::DAK_ISA
