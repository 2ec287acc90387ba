// Panels of fp32 numbers and tiles of 2 * F::lanes columns: see gemm/gemm.h.
#include "cpu/gemm/gemm.h"
#include "cpu/panels/transpose.h"
#include "cpu/rows/kernels.h"

namespace dak::DAK_ISA {
namespace {

constexpr int64_t wide = 2 * F::lanes;           // columns of a tile
constexpr int64_t tall = F::lanes == 16 ? 14 : 6;  // rows: 28 accumulators of 32 registers, 12 of 16

// wide neighbours, in their order.
DAK_INLINE void load(const float* p, F& a, F& b) { load2(p, a, b); }
DAK_INLINE void load(const f16* p, F& a, F& b) { load2(p, a, b); }
DAK_INLINE void load(const bf16* p, F& a, F& b) {
  float x[wide];
  load2(p, a, b);
  store2<false, bf16>(x, a, b);
  load2(x, a, b);
}

template <class T>
DAK_INLINE void put_line(T* out, F a, F b, bool add) {
  if (add) {
    F x, y;
    load(out, x, y);
    a = x + a;
    b = y + b;
  }
  store2<false, float>(out, a, b);
}

template <class T>
void multiply(const float* a, const float* b, int64_t words, const Tile& tile) {
  F sum[tall][2];
#pragma GCC unroll 16
  for (int i = 0; i < tall; i++) {
    sum[i][0] = sum[i][1] = set(0.0f);
    if (!tile.first) load2(tile.sums + i * wide, sum[i][0], sum[i][1]);
  }
  for (int64_t k = 0; k < words; k++, a += tall, b += wide) {
    F left, right;
    load2(b, left, right);
#pragma GCC unroll 16
    for (int i = 0; i < tall; i++) {
      F x = set(a[i]);
      sum[i][0] = fma(x, left, sum[i][0]);
      sum[i][1] = fma(x, right, sum[i][1]);
    }
  }
  if (!tile.last) {
#pragma GCC unroll 16
    for (int i = 0; i < tall; i++) {
      store2<false, float>(tile.sums + i * wide, sum[i][0], sum[i][1]);
    }
    return;
  }
  T* out = static_cast<T*>(tile.out);
#pragma GCC unroll 16
  for (int i = 0; i < tall; i++, out += tile.stride) {
    if (i >= tile.rows) break;
    if (tile.columns >= wide) {
      put_line(out, sum[i][0], sum[i][1], tile.add);
    } else {
      T line[wide] = {};
      size_t bytes = size_t(tile.columns) * sizeof(T);
      if (tile.add) memcpy(line, out, bytes);
      put_line(line, sum[i][0], sum[i][1], tile.add);
      memcpy(out, line, bytes);
    }
  }
}

void multiply_any(const void* a, const void* b, int64_t words, const Tile& tile) {
  auto x = static_cast<const float*>(a), y = static_cast<const float*>(b);
  if (tile.type == Type::f32) return multiply<float>(x, y, words, tile);
  if (tile.type == Type::bf16) return multiply<bf16>(x, y, words, tile);
  multiply<f16>(x, y, words, tile);
}

// Lines whose first numbers are neighbours: `width` numbers at a time.
template <int64_t width, class T>
void pack_across(const Lines& x, float* out, int64_t panel) {
  for (int64_t k = 0; k < x.inner; k++) {
    const T* from = static_cast<const T*>(x.data) + k * x.step;
    float* to = out + k * width;
    for (int64_t i = 0; i < x.lines; i += width, to += panel) {
      bool whole = x.lines - i >= width;
      if (whole && same<T, float>) {
        memcpy(to, from + i, width * 4);
        continue;
      }
      F a, b;
      if (whole && width == wide) {
        load(from + i, a, b);
        store2<false, float>(to, a, b);
        continue;
      }
      T line[wide] = {};
      float numbers[wide];
      memcpy(line, from + i, size_t(whole ? width : x.lines - i) * sizeof(T));
      load(line, a, b);
      store2<false, float>(numbers, a, b);
      memcpy(to, numbers, width * 4);
    }
  }
}

// A vector, `kept` lanes of which are wanted; the others may be written too unless `exact`.
template <int64_t kept>
DAK_INLINE void store(float* to, F v, bool exact) {
  if (kept == F::lanes || !exact) {
    store1(to, v);
    return;
  }
  float x[F::lanes];
  store1(x, v);
  memcpy(to, x, kept * 4);
}

// Numbers k to k + count, at most `wide`, of F::lanes lines from `first` on, into `to`, `width`
// apart. Of what a panel has no lines for, `store` may write into what belongs to the next number,
// and comes later; `last`: there is none.
template <int64_t width, int64_t kept, class T>
DAK_INLINE void pack_block(const Lines& x, int64_t first, int64_t k, int64_t count, bool last,
                           float* to) {
  F a[F::lanes], b[F::lanes];
#pragma GCC unroll 16
  for (int64_t i = 0; i < F::lanes; i++) {
    const T* from = static_cast<const T*>(x.data) + (first + i) * x.line + k * x.step;
    if (first + i >= x.lines) {
      a[i] = b[i] = set(0.0f);
    } else if (x.step == 1 && count == wide) {
      load2(from, a[i], b[i]);
    } else {
      T line[wide] = {};
      for (int64_t j = 0; j < count; j++) line[j] = from[j * x.step];
      load2(line, a[i], b[i]);
    }
  }
  transpose(a);
  transpose(b);
#pragma GCC unroll 32
  for (int64_t j = 0; j < wide; j++) {
    if (j >= count) break;
    bool behind = j >= F::lanes;
    F v = same<T, bf16> ? (j % 2 ? b[j / 2] : a[j / 2]) : behind ? b[j - F::lanes] : a[j];
    store<kept>(to + j * width, v, last && j == count - 1);
  }
}

// Lines of which no two first numbers are neighbours. The last lines of a panel come first: see
// pack_block.
template <int64_t width, class T>
void pack_along(const Lines& x, float* out, int64_t panel) {
  constexpr int64_t rest = width % F::lanes;
  for (int64_t i = 0; i < x.lines; i += width, out += panel) {
    for (int64_t k = 0; rest && k < x.inner; k += wide) {
      int64_t count = x.inner - k < wide ? x.inner - k : wide, from = width - rest;
      bool last = k + count == x.inner;
      pack_block<width, rest, T>(x, i + from, k, count, last, out + k * width + from);
    }
    for (int64_t from = 0; from + F::lanes <= width; from += F::lanes) {
      for (int64_t k = 0; k < x.inner; k += wide) {
        int64_t count = x.inner - k < wide ? x.inner - k : wide;
        pack_block<width, F::lanes, T>(x, i + from, k, count, false, out + k * width + from);
      }
    }
  }
}

template <int64_t width>
void pack(Lines x, void* out, int64_t panel) {
  auto to = static_cast<float*>(out);
  auto go = [&](auto number) {
    using T = decltype(number);
    if (x.line == 1) return pack_across<width, T>(x, to, panel);
    pack_along<width, T>(x, to, panel);
  };
  if (x.type == Type::f32) return go(float());
  if (x.type == Type::bf16) return go(bf16());
  go(f16());
}

}  // namespace

void fill_tiles(Kernels& table) {
  // 256 numbers of a panel stay in the L1. Of depths 256, 384, 512, 1024 and groups of 128, 256 KB the
  // smallest were fastest on a Zen 3: 0.98 of the time of MKL, 1024 and 256 KB 1.15.
  static constexpr int64_t group = F::lanes == 16 ? 256 * 1024 : 128 * 1024;
  static constexpr Tiles tiles{tall, wide, 1, 256, group, pack<tall>, pack<wide>, multiply_any};
  table.tiles = &tiles;
}

}  // namespace dak::DAK_ISA
