// Tiles of 14 x 32 results of bf16 numbers in fp32, by AVX512-BF16. A word is a pair of neighbours along
// the inner dimension, as vdpbf16ps takes them. oneDNN's own only gives bf16 results:
// `python -m benchmarks pieces --only gemm` times the two in turns.
#include "cpu/gemm/gemm.h"

// GCC 12 takes its own _mm512_undefined_epi32() for a mistake (bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#include <immintrin.h>

#include <algorithm>

#define DAK_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace dak {
namespace {

constexpr int64_t a_width = 14, b_width = 32;  // of a panel: 28 accumulators, of 32 registers

using Multiply = void (*)(const uint32_t*, const uint32_t*, int64_t, float*, int64_t, __mmask16,
                      __mmask16, bool);

// out[rows, 32] (+)= panel of a * panel of b.
template <int rows>
DAK_BF16 void tile(const uint32_t* a, const uint32_t* b, int64_t pairs, float* out, int64_t stride,
                   __mmask16 left, __mmask16 right, bool add) {
  __m512 sum[rows][2];
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) {
    float* at = out + i * stride;
    sum[i][0] = add ? _mm512_maskz_loadu_ps(left, at) : _mm512_setzero_ps();
    sum[i][1] = add ? _mm512_maskz_loadu_ps(right, at + 16) : _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < pairs; k++, a += a_width, b += b_width) {
    __m512bh b0 = (__m512bh)_mm512_load_si512(b), b1 = (__m512bh)_mm512_load_si512(b + 16);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
      __m512bh x = (__m512bh)_mm512_set1_epi32(int(a[i]));
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, b0);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, b1);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) {
    _mm512_mask_storeu_ps(out + i * stride, left, sum[i][0]);
    _mm512_mask_storeu_ps(out + i * stride + 16, right, sum[i][1]);
  }
}

constexpr Multiply multiply_rows[] = {nullptr,  tile<1>, tile<2>,  tile<3>,  tile<4>,
                          tile<5>,  tile<6>, tile<7>,  tile<8>,  tile<9>,
                          tile<10>, tile<11>, tile<12>, tile<13>, tile<14>};

DAK_BF16 inline void transpose(__m512i* r) {  // 16 x 16 numbers of 32 bits
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

template <class Mask>
inline Mask first(int64_t n) {  // of the bits of Mask
  return n >= int64_t(sizeof(Mask) * 8) ? Mask(~Mask(0)) : n <= 0 ? Mask(0) : Mask((Mask(1) << n) - 1);
}

// Packs up to 16 lines of `inner` numbers each, zeros beyond either; pairs of one line lie `width`
// apart. Line i, number k is x[i * line + k * step]; one of the two is 1.
DAK_BF16 void pack_lines(const uint16_t* x, int64_t line, int64_t step, int64_t lines, int64_t inner,
                   uint32_t* out, int64_t width, __mmask16 kept) {
  lines = std::min<int64_t>(lines, 16);
  if (step == 1) {
    for (int64_t k = 0; k < inner; k += 32) {
      __m512i r[16];
      __mmask32 there = first<__mmask32>(inner - k);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        r[i] = i < lines ? _mm512_maskz_loadu_epi16(there, x + i * line + k) : _mm512_setzero_si512();
      }
      transpose(r);
      int64_t pairs = std::min<int64_t>(16, (inner - k + 1) / 2);
      for (int64_t i = 0; i < pairs; i++, out += width) _mm512_mask_storeu_epi32(out, kept, r[i]);
    }
    return;
  }
  __mmask16 there = first<__mmask16>(lines);
  for (int64_t k = 0; k < inner; k += 2, out += width) {
    const uint16_t* at = x + k * step;
    __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, at)), high = low;
    high = k + 1 < inner ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, at + step))
                         : _mm512_setzero_si512();
    _mm512_mask_storeu_epi32(out, kept, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

template <int64_t width>
void pack(Lines x, void* out, int64_t panel) {
  auto data = static_cast<const uint16_t*>(x.data);
  auto to = static_cast<uint32_t*>(out);
  for (int64_t i = 0; i < x.lines; i += width, data += width * x.line, to += panel) {
    for (int64_t from = 0; from < width; from += 16) {
      int64_t lines = std::clamp<int64_t>(x.lines - i - from, 0, std::min<int64_t>(16, width - from));
      const uint16_t* at = lines > 0 ? data + from * x.line : data;
      pack_lines(at, x.line, x.step, lines, x.inner, to + from, width,
                 first<__mmask16>(width - from));
    }
  }
}

void multiply(const void* a, const void* b, int64_t words, const Tile& out) {
  multiply_rows[out.rows](static_cast<const uint32_t*>(a), static_cast<const uint32_t*>(b), words,
                          static_cast<float*>(out.out), out.stride,
                          first<__mmask16>(out.columns), first<__mmask16>(out.columns - 16),
                          out.add);
}

}  // namespace

const Tiles* bf16_tiles() {
  static constexpr Tiles tiles{a_width, b_width,       2,             1024,
                               512 * 1024, pack<a_width>, pack<b_width>, multiply};
  static const bool has = [] {
    __builtin_cpu_init();
    return bool(__builtin_cpu_supports("avx512bf16"));
  }();
  return has && runs_avx512() ? &tiles : nullptr;
}

}  // namespace dak

#else

namespace dak {
const Tiles* bf16_tiles() { return nullptr; }
}  // namespace dak

#endif
