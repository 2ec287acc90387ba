// F for AVX2 with FMA and F16C: 8 floats.
#pragma once

#include <immintrin.h>

namespace dak::DAK_ISA {

struct F {
  static constexpr int lanes = 8;
  __m256 v;
};
struct Mask {
  __m256 v;
};

DAK_INLINE F set(float x) { return {_mm256_set1_ps(x)}; }
DAK_INLINE F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
DAK_INLINE F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
DAK_INLINE F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
DAK_INLINE F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
DAK_INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
// Gives b where a is NaN, and NaN where b is.
DAK_INLINE F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
DAK_INLINE F abs(F a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
DAK_INLINE F copysign(F magnitude, F sign) {  // magnitude >= 0
  return {_mm256_or_ps(magnitude.v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.0f)))};
}
DAK_INLINE Mask eq(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
DAK_INLINE Mask le(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
DAK_INLINE Mask both(Mask a, Mask b) { return {_mm256_and_ps(a.v, b.v)}; }
DAK_INLINE Mask but_not(Mask a, Mask b) { return {_mm256_andnot_ps(b.v, a.v)}; }
DAK_INLINE bool any(Mask m) { return _mm256_movemask_ps(m.v) != 0; }
DAK_INLINE F pick(Mask m, F yes, F no) { return {_mm256_blendv_ps(no.v, yes.v, m.v)}; }

// The nearest integer.
DAK_INLINE F nearest(F t) { return {_mm256_round_ps(t.v, 8)}; }
// Beyond these ends 2^t is 0 or inf all the same. NaN stays: max and min give their second operand.
DAK_INLINE F in_exp2_range(F t) {
  return {_mm256_min_ps(_mm256_set1_ps(160.0f), _mm256_max_ps(_mm256_set1_ps(-160.0f), t.v))};
}
// a * 2^n, |n| <= 250, in two factors so that a denormal result is rounded once.
DAK_INLINE F times_pow2(F a, F n) {
  __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  __m256i rest = _mm256_sub_epi32(whole, half), bias = _mm256_set1_epi32(127);
  __m256 f = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  __m256 g = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, f), g)};
}

// w > 0 and normal: w = mantissa * 2^k, mantissa in [sqrt(1/2), sqrt(2)); also 2^-k.
DAK_INLINE void split(F w, F& mantissa, F& k, F& inverse) {
  __m256i bits = _mm256_castps_si256(w.v);
  __m256i e = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3)), 23);
  __m256i shifted = _mm256_slli_epi32(e, 23);
  mantissa.v = _mm256_castsi256_ps(_mm256_sub_epi32(bits, shifted));
  k.v = _mm256_cvtepi32_ps(e);
  inverse.v = _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_set1_epi32(127 << 23), shifted));
}

DAK_INLINE float first_of(F a) { return _mm256_cvtss_f32(a.v); }
DAK_INLINE float sum_of(F a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
DAK_INLINE float max_of(F a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

DAK_INLINE void store1(float* p, F a) { _mm256_storeu_ps(p, a.v); }

DAK_INLINE void load2(const float* p, F& a, F& b) {
  a.v = _mm256_loadu_ps(p);
  b.v = _mm256_loadu_ps(p + 8);
}
DAK_INLINE void load2(const bf16* p, F& a, F& b) {
  __m256i w = _mm256_loadu_si256((const __m256i*)p);
  a.v = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
  b.v = _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(int(0xffff0000u))));
}
DAK_INLINE void load2(const f16* p, F& a, F& b) {
  a.v = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  b.v = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)));
}

// As in vec_avx512.h.
template <class In>
DAK_INLINE __m256i rounded_bf16(__m256 x) {
  __m256i u = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  if constexpr (same<In, bf16>) return r;
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc00000), nan);
}

template <bool Stream>
DAK_INLINE void put(void* p, __m256i x) {
  if constexpr (Stream) {
    _mm256_stream_si256((__m256i*)p, x);
  } else {
    _mm256_storeu_si256((__m256i*)p, x);
  }
}

// `In` is the type that load2 read, which decides the order of the columns. Stream: p % 32 == 0.
template <bool Stream, class In>
DAK_INLINE void store2(float* p, F a, F b) {
  if constexpr (same<In, bf16>) {
    __m256 low = _mm256_unpacklo_ps(a.v, b.v), high = _mm256_unpackhi_ps(a.v, b.v);
    a.v = _mm256_permute2f128_ps(low, high, 0x20);
    b.v = _mm256_permute2f128_ps(low, high, 0x31);
  }
  put<Stream>(p, _mm256_castps_si256(a.v));
  put<Stream>(p + 8, _mm256_castps_si256(b.v));
}
template <bool Stream, class In>
DAK_INLINE void store2(bf16* p, F a, F b) {
  __m256i ra = rounded_bf16<In>(a.v), rb = rounded_bf16<In>(b.v);
  if constexpr (same<In, bf16>) {
    put<Stream>(p, _mm256_blend_epi16(_mm256_srli_epi32(ra, 16), rb, 0xaa));
  } else {
    __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(ra, 16), _mm256_srli_epi32(rb, 16));
    put<Stream>(p, _mm256_permute4x64_epi64(packed, 0xd8));
  }
}
template <bool Stream, class In>
DAK_INLINE void store2(f16* p, F a, F b) {
  static_assert(!same<In, bf16>);
  __m128i lo = _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m128i hi = _mm256_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  put<Stream>(p, _mm256_inserti128_si256(_mm256_castsi128_si256(lo), hi, 1));
}
DAK_INLINE void stores_done() { _mm_sfence(); }  // streaming stores visible to other threads

}  // namespace dak::DAK_ISA
