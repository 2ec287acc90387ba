// The product in three steps, for `depth` columns of a at a time: the operand with fewer rows
// (columns) is packed into memory of the caller that all threads share, groups of the other one into
// memory of the thread that takes them, and tiles of 14 x 32 results stay in registers.
//
// A packed panel holds pairs of neighbours along the inner dimension, as vdpbf16ps takes them: 14
// (of a) or 32 (of b) of them, then the next pair. oneDNN's own only gives bf16 results:
// `python -m benchmarks pieces --only gemm` times the two in turns.
#include "cpu/gemm/bf16_gemm.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cpu/rows/kernels.h"

// GCC 12 takes its own _mm512_undefined_epi32() for a mistake (bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#include <immintrin.h>

#define DAK_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace dak {
namespace {

constexpr int64_t a_width = 14, b_width = 32;  // of a panel: 28 accumulators, of 32 registers
constexpr int64_t a_group = 8, b_group = 4;    // panels per packed group: half a MB, in the L2
constexpr int64_t most_pairs = 1024;

using Tile = void (*)(const uint32_t*, const uint32_t*, int64_t, float*, int64_t, __mmask16,
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

constexpr Tile tiles[] = {nullptr,  tile<1>, tile<2>,  tile<3>,  tile<4>,
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
DAK_BF16 void pack(const uint16_t* x, int64_t line, int64_t step, int64_t lines, int64_t inner,
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

// Where the inner dimension stands, and how a panel of it is packed.
struct Depth {
  int64_t from, length;
  int64_t pairs() const { return (length + 1) / 2; }
};

void pack_a(const Bf16Gemm& g, Depth d, int64_t row, uint32_t* out) {
  const uint16_t* x = g.a.data + row * g.a.row + d.from * g.a.column;
  int64_t lines = std::min(a_width, g.m - row);
  pack(x, g.a.row, g.a.column, lines, d.length, out, a_width, first<__mmask16>(a_width));
}

void pack_b(const Bf16Gemm& g, Depth d, int64_t column, uint32_t* out) {
  const uint16_t* x = g.b.data + column * g.b.column + d.from * g.b.row;
  int64_t lines = std::min(b_width, g.n - column);
  pack(x, g.b.column, g.b.row, lines, d.length, out, b_width, 0xffff);
  const uint16_t* right = lines > 16 ? x + 16 * g.b.column : x;
  pack(right, g.b.column, g.b.row, lines - 16, d.length, out + 16, b_width, 0xffff);
}

void multiply(const Bf16Gemm& g, Depth d, int64_t row, int64_t column, const uint32_t* a,
              const uint32_t* b) {
  int64_t rows = std::min(a_width, g.m - row), columns = g.n - column;
  tiles[rows](a, b, d.pairs(), g.out + row * g.out_row + column, g.out_row,
              first<__mmask16>(columns), first<__mmask16>(columns - 16), g.add || d.from > 0);
}

// body(first item, one beyond the last) for groups of `each` of n items, on all threads.
template <class Body>
void in_groups(int64_t n, int64_t each, const Body& body) {
  std::atomic<int64_t> next{0};
  if (n <= each) return body(0, n);
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(each, std::memory_order_relaxed)) < n;) {
      body(i, std::min(i + each, n));
    }
  });
}

uint32_t* own_memory() {  // of the thread, for one group of panels
  constexpr int64_t numbers = std::max(a_group * a_width, b_group * b_width) * most_pairs;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory(std::aligned_alloc(64, numbers * 4));
  if (!memory) throw std::bad_alloc();
  return static_cast<uint32_t*>(memory.get());
}

int64_t panels(int64_t n, int64_t width) { return (n + width - 1) / width; }

// One side of the product: its panels, and their size.
struct Side {
  int64_t panels, width, group;
  void (*pack)(const Bf16Gemm&, Depth, int64_t, uint32_t*);
};

void step(const Bf16Gemm& g, Depth d, const Side& shared, const Side& own, uint32_t* memory) {
  int64_t shared_size = shared.width * d.pairs(), own_size = own.width * d.pairs();
  in_groups(shared.panels, 1, [&](int64_t i, int64_t) {
    shared.pack(g, d, i * shared.width, memory + i * shared_size);
  });
  in_groups(own.panels, own.group, [&](int64_t begin, int64_t end) {
    uint32_t* mine = own_memory();
    for (int64_t i = begin; i < end; i++) {
      own.pack(g, d, i * own.width, mine + (i - begin) * own_size);
    }
    for (int64_t s = 0; s < shared.panels; s++) {
      for (int64_t i = begin; i < end; i++) {
        const uint32_t *theirs = memory + s * shared_size, *ours = mine + (i - begin) * own_size;
        if (shared.pack == pack_a) {
          multiply(g, d, s * a_width, i * b_width, theirs, ours);
        } else {
          multiply(g, d, i * a_width, s * b_width, ours, theirs);
        }
      }
    }
  });
}

}  // namespace

bool has_bf16_gemm() {
  __builtin_cpu_init();
  return runs_avx512() && __builtin_cpu_supports("avx512bf16");
}

// A pair of each line, in whole panels, and what aligning them may cost.
int64_t bf16_gemm_least(const Bf16Gemm& g) { return 4 * (std::min(g.m, g.n) + b_width) + 64; }

void bf16_gemm(const Bf16Gemm& g, char* shared, int64_t shared_bytes) {
  if (g.m == 0 || g.n == 0) return;
  Side a{panels(g.m, a_width), a_width, a_group, pack_a};
  Side b{panels(g.n, b_width), b_width, b_group, pack_b};
  bool share_a = g.m < g.n;
  const Side &common = share_a ? a : b, &own = share_a ? b : a;
  auto memory = reinterpret_cast<uint32_t*>((uintptr_t(shared) + 63) / 64 * 64);
  int64_t numbers = (shared + shared_bytes - reinterpret_cast<char*>(memory)) / 4;
  int64_t pairs = std::min(most_pairs, numbers / (common.panels * common.width));
  for (int64_t k = 0; k < g.inner; k += 2 * pairs) {
    step(g, {k, std::min(2 * pairs, g.inner - k)}, common, own, memory);
  }
}

}  // namespace dak

#else

namespace dak {
bool has_bf16_gemm() { return false; }
int64_t bf16_gemm_least(const Bf16Gemm&) { return 0; }
void bf16_gemm(const Bf16Gemm&, char*, int64_t) { std::abort(); }
}  // namespace dak

#endif
