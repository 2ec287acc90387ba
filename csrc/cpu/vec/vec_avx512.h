// F for AVX-512 (F, BW, DQ, VL): 16 floats.
#pragma once

// GCC 12 takes its own _mm512_undefined_ps() for a mistake (bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace dak::DAK_ISA {

struct F {
  static constexpr int lanes = 16;
  __m512 v;
};
using Mask = __mmask16;

DAK_INLINE F set(float x) { return {_mm512_set1_ps(x)}; }
DAK_INLINE F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
DAK_INLINE F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
DAK_INLINE F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
DAK_INLINE F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
DAK_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
// Gives b where a is NaN, and NaN where b is.
DAK_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
DAK_INLINE F abs(F a) { return {_mm512_abs_ps(a.v)}; }
DAK_INLINE F copysign(F magnitude, F sign) {  // magnitude >= 0
  return {_mm512_or_ps(magnitude.v, _mm512_and_ps(sign.v, _mm512_set1_ps(-0.0f)))};
}
DAK_INLINE Mask eq(F a, F b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
DAK_INLINE Mask le(F a, F b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
DAK_INLINE Mask both(Mask a, Mask b) { return a & b; }
DAK_INLINE Mask but_not(Mask a, Mask b) { return a & ~b; }
DAK_INLINE bool any(Mask m) { return m != 0; }
DAK_INLINE F pick(Mask m, F yes, F no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }

// The nearest integer.
DAK_INLINE F nearest(F t) { return {_mm512_roundscale_ps(t.v, 8)}; }
// a * 2^n. scalef defines NaN * 2^-inf as 0 and NaN * 2^inf as inf, so exp2(+-inf) needs no care:
// there the polynomial gives NaN.
DAK_INLINE F in_exp2_range(F t) { return t; }
DAK_INLINE F times_pow2(F a, F n) { return {_mm512_scalef_ps(a.v, n.v)}; }

// w > 0 and normal: w = mantissa * 2^k, mantissa in [sqrt(1/2), sqrt(2)); also 2^-k.
DAK_INLINE void split(F w, F& mantissa, F& k, F& inverse) {
  __m512i bits = _mm512_castps_si512(w.v);
  __m512i e = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3)), 23);
  __m512i shifted = _mm512_slli_epi32(e, 23);
  mantissa.v = _mm512_castsi512_ps(_mm512_sub_epi32(bits, shifted));
  k.v = _mm512_cvtepi32_ps(e);
  inverse.v = _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_set1_epi32(127 << 23), shifted));
}

DAK_INLINE float sum_of(F a) { return _mm512_reduce_add_ps(a.v); }
DAK_INLINE float max_of(F a) { return _mm512_reduce_max_ps(a.v); }
DAK_INLINE float first_of(F a) { return _mm512_cvtss_f32(a.v); }

DAK_INLINE void store1(float* p, F a) { _mm512_storeu_ps(p, a.v); }

DAK_INLINE void load2(const float* p, F& a, F& b) {
  a.v = _mm512_loadu_ps(p);
  b.v = _mm512_loadu_ps(p + 16);
}
DAK_INLINE void load2(const bf16* p, F& a, F& b) {
  __m512i w = _mm512_loadu_si512(p);
  a.v = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
  b.v = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(int(0xffff0000u))));
}
DAK_INLINE void load2(const f16* p, F& a, F& b) {
  a.v = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  b.v = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + 16)));
}

// fp32 bits whose upper half is x rounded to bf16 (to nearest, ties to even). The addition turns
// a NaN with all mantissa bits set into 0. Only fp32 inputs can hold one: a bf16 NaN leaves the
// lower half 0, arithmetic makes 0x7fc00000, and `factor` lets nothing else in. So In = bf16 goes
// without the two instructions that look for one.
template <class In>
DAK_INLINE __m512i rounded_bf16(__m512 x) {
  __m512i u = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  if constexpr (same<In, bf16>) return r;
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc00000));
}

template <bool Stream>
DAK_INLINE void put(void* p, __m512i x) {
  if constexpr (Stream) {
    _mm512_stream_si512((__m512i*)p, x);
  } else {
    _mm512_storeu_si512(p, x);
  }
}

// `In` is the type that load2 read, which decides the order of the columns. Stream: p % 64 == 0.
template <bool Stream, class In>
DAK_INLINE void store2(float* p, F a, F b) {
  if constexpr (same<In, bf16>) {
    __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    __m512 even = a.v, odd = b.v;
    a.v = _mm512_permutex2var_ps(even, first, odd);
    b.v = _mm512_permutex2var_ps(even, second, odd);
  }
  put<Stream>(p, _mm512_castps_si512(a.v));
  put<Stream>(p + 16, _mm512_castps_si512(b.v));
}
template <bool Stream, class In>
DAK_INLINE void store2(bf16* p, F a, F b) {
  __m512i ra = rounded_bf16<In>(a.v), rb = rounded_bf16<In>(b.v);
  if constexpr (same<In, bf16>) {
    constexpr int pick_by_mask = 0xca;  // mask ? second : third
    __m512i upper = _mm512_set1_epi32(int(0xffff0000u));
    put<Stream>(p, _mm512_ternarylogic_epi32(upper, rb, _mm512_srli_epi32(ra, 16), pick_by_mask));
  } else {
    __m256i lo = _mm512_cvtepi32_epi16(_mm512_srli_epi32(ra, 16));
    __m256i hi = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rb, 16));
    put<Stream>(p, _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1));
  }
}
template <bool Stream, class In>
DAK_INLINE void store2(f16* p, F a, F b) {
  static_assert(!same<In, bf16>);
  __m256i lo = _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256i hi = _mm512_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  put<Stream>(p, _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1));
}
DAK_INLINE void stores_done() { _mm_sfence(); }  // streaming stores visible to other threads

}  // namespace dak::DAK_ISA
