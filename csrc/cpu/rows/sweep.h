// How a row is walked: scores of two vectors at a time, the ragged end, and rows that are written.
#pragma once

#include "cpu/rows/rows.h"
#include "cpu/vec/vec.h"

namespace dak::DAK_ISA {

inline constexpr int64_t step = 2 * F::lanes;  // columns per load2
inline constexpr int64_t block = 128 * step;   // columns that are summed in fp32
inline constexpr int64_t group = 16 * step;    // columns that are summed without compensation
inline constexpr int64_t peek = 1024;          // columns whose maximum is the first shift

// A sum of groups. Where one column has nearly all of a row, the lane that holds it rounds all small
// terms it meets the same way: 128 of them cost up to 7.6e-6 of the sum, and 2.9e-6 were seen in a
// gradient. Within a group it is at most 9.5e-7, between groups nothing is lost. Smaller groups cost
// time: token_logp forward, in the cache, takes 3 % longer with 16 steps and 7 % with 8 (Zen 3).
struct Sum {
  F high = set(0.0f), low = set(0.0f);

  DAK_INLINE void add(F x) {
    F sum = high + x, back = sum - high;
    low = low + ((high - (sum - back)) + (x - back));
    high = sum;
  }
  // NaN, and not infinite, where a term is.
  double total() const { return double(sum_of(high)) + double(sum_of(low)); }
};

// body(i) for every step in columns [0, n), whole steps, and close() behind every group of them.
template <class Body, class Close>
DAK_INLINE void in_groups(int64_t n, const Body& body, const Close& close) {
  for (int64_t i = 0; i < n;) {
    int64_t stop = n - i < group ? n : i + group;
    for (; i < stop; i += step) body(i);
    close();
  }
}

// Scores of one model. They are kept as softcap * tanh(x / softcap), without the temperature, which
// goes into `exponent`: exp(z - m) = 2^((score - shift) * exponent).
template <bool Cap>
struct Scorer {
  static constexpr bool capped = Cap;
  double inverse;   // 1 / temperature
  float exponent;   // log2(e) / temperature
  F cap;

  explicit Scorer(const Score& s)
      : inverse(1.0 / s.temperature),
        exponent(float(1.4426950408889634 / s.temperature)),
        cap(set(s.softcap)) {}
  DAK_INLINE F operator()(F x) const {
    if constexpr (Cap) return cap * tanh(x / cap);
    return x;
  }
  // The score, and d score / d x.
  DAK_INLINE F with_slope(F x, F& slope) const {
    F t = tanh(x / cap);
    slope = set(1.0f) - t * t;
    return cap * t;
  }
};

template <class T, bool Cap>
DAK_INLINE void load_scores(const Scorer<Cap>& score, const T* p, F& a, F& b) {
  load2(p, a, b);
  a = score(a);
  b = score(b);
}

template <class T>
inline T one_of_type() {
  if constexpr (same<T, float>) return 1.0f;
  if constexpr (same<T, bf16>) return {0x3f80};
  if constexpr (same<T, f16>) return {0x3c00};
}

// The last `n` < step columns. What is beyond the row scores -inf, with a softcap too.
template <class T, bool Cap>
inline void load_rest(const Scorer<Cap>& score, const T* p, int64_t n, F& a, F& b) {
  T x[step] = {}, there[step] = {};
  memcpy(x, p, size_t(n) * sizeof(T));
  for (int64_t i = 0; i < n; i++) there[i] = one_of_type<T>();
  F in_a, in_b, zero = set(0.0f);
  load2(there, in_a, in_b);
  load_scores(score, x, a, b);
  a = pick(eq(in_a, zero), set(-inf), a);
  b = pick(eq(in_b, zero), set(-inf), b);
}

// The score of one column, through the same arithmetic as everywhere else.
template <class T, bool Cap>
inline float score_at(const Scorer<Cap>& score, const T* p, int64_t y) {
  T x[step] = {};
  x[0] = p[y];
  F a, b;
  load_scores(score, x, a, b);
  return first_of(a);
}

// The largest score of columns [0, n), NaN left out; -inf where there is none.
template <class T, bool Cap>
inline float largest(const Scorer<Cap>& score, const T* p, int64_t n) {
  F a, b, top = set(-inf);
  int64_t i = 0;
  for (; i + step <= n; i += step) {
    load2(p + i, a, b);
    top = max(a, max(b, top));
  }
  top = score(top);
  if (i < n) {
    load_rest(score, p + i, n - i, a, b);
    top = max(a, max(b, top));
  }
  return max_of(top);
}

// out[i] = fn(in[i]...) for columns [0, n), from the first to the last: from the last to the first, in
// blocks of 8 KiB, took 1.5 to 2 times as long for rows that come from memory, as in a backward of its
// own, and no less for rows that the sweep before left in the cache (V = 32000 and 128256, Zen 5).
// `in` may be `out`. fn takes and gives vectors.
template <bool Stream, class O, class T, class Fn, class... P>
DAK_INLINE void map_steps(O* out, int64_t begin, int64_t end, const Fn& fn, const T* x, P... rest) {
  for (int64_t i = begin; i < end; i += step) {
    fn.template operator()<Stream>(out + i, x + i, (rest + i)...);
  }
}

template <class T>
DAK_INLINE const T* padded(T* buffer, const T* p, int64_t n) {
  memcpy(buffer, p, size_t(n) * sizeof(T));
  return buffer;
}

// Fewer than `step` columns, through buffers.
template <class O, class T, class Fn>
inline void map_few(O* out, int64_t n, const Fn& fn, const T* x) {
  T bx[step] = {};
  O result[step];
  fn.template operator()<false>(result, padded(bx, x, n));
  memcpy(out, result, size_t(n) * sizeof(O));
}
template <class O, class T, class Fn>
inline void map_few(O* out, int64_t n, const Fn& fn, const T* x, const T* y) {
  T bx[step] = {}, by[step] = {};
  O result[step];
  fn.template operator()<false>(result, padded(bx, x, n), padded(by, y, n));
  memcpy(out, result, size_t(n) * sizeof(O));
}

template <bool Stream, class O, class Fn, class... P>
inline void map_row(O* out, int64_t n, const Fn& fn, P... in) {
  int64_t head = 0;
  if constexpr (Stream) {  // streaming stores are whole cache lines
    head = int64_t((64 - (uintptr_t(out) & 63)) & 63) / int64_t(sizeof(O));
    if (head > n) head = n;
    if (uintptr_t(out) % sizeof(O)) return map_row<false>(out, n, fn, in...);
  }
  int64_t end = head + (n - head) / step * step;
  if (end < n) map_few(out + end, n - end, fn, (in + end)...);
  map_steps<Stream>(out, head, end, fn, in...);
  for (int64_t i = 0; i < head; i += step) {
    map_few(out + i, head - i < step ? head - i : step, fn, (in + i)...);
  }
  if constexpr (Stream) stores_done();
}

// fn(const T* of the row's type, Scorer<with or without softcap>)
template <class Fn>
DAK_INLINE auto with_type(const Row& x, const Score& score, const Fn& fn) {
  auto typed = [&](auto* p) {
    return score.softcap > 0 ? fn(p, Scorer<true>(score)) : fn(p, Scorer<false>(score));
  };
  switch (x.type) {
    case Type::bf16:
      return typed(static_cast<const bf16*>(x.data));
    case Type::f16:
      return typed(static_cast<const f16*>(x.data));
    default:
      return typed(static_cast<const float*>(x.data));
  }
}

// fn(O* of the output's type, stream as a type) where O is T or fp32, or anything for fp32 logits.
template <bool V>
struct Flag {
  static constexpr bool value = V;
};
template <class T, class Fn>
DAK_INLINE void with_out(const OutRow& out, const Fn& fn) {
  auto typed = [&](auto* p) { out.stream ? fn(p, Flag<true>{}) : fn(p, Flag<false>{}); };
  if constexpr (same<T, float>) {
    if (out.type == Type::bf16) return typed(static_cast<bf16*>(out.data));
    if (out.type == Type::f16) return typed(static_cast<f16*>(out.data));
  } else if (out.type == Type::f32) {
    return typed(static_cast<float*>(out.data));
  }
  typed(static_cast<T*>(out.data));
}

}  // namespace dak::DAK_ISA
