// F::lanes vectors of F::lanes numbers, turned over their diagonal.
#pragma once

#include "cpu/vec/vec.h"

namespace dak::DAK_ISA {

#if DAK_LEVEL == 2
DAK_INLINE void transpose(F* x) {
  __m512 t[16], r[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    x[i].v = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    x[8 + i].v = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    x[4 + i].v = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    x[12 + i].v = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}
#elif DAK_LEVEL == 1
DAK_INLINE void transpose(F* x) {
  __m256 t[8], r[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    x[i].v = _mm256_permute2f128_ps(r[i], r[4 + i], 0x20);
    x[4 + i].v = _mm256_permute2f128_ps(r[i], r[4 + i], 0x31);
  }
}
#else
DAK_INLINE void transpose(F* x) {
  f32x4 a = x[0].v, b = x[1].v, c = x[2].v, d = x[3].v;
  for (int i = 0; i < 4; i++) x[i].v = f32x4{a[i], b[i], c[i], d[i]};
}
#endif

}  // namespace dak::DAK_ISA
