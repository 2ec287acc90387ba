// Sums over two models' rows in one sweep: KL one way for token_kl, or everything token_stats needs.
#pragma once

#include "cpu/rows/softmax.h"

namespace dak::DAK_ISA {

// With ex = exp((x - shift_x) / temperature) and ey alike, x and y being scores:
//   cross_x = sum ex (x - y)   KL(x || y) = cross_x / sum ex / temperature - lse_x + lse_y
//   self_x  = sum ex x         entropy    = lse_x - self_x / sum ex / temperature
// They are large numbers that cancel, in double. The fp32 sums of a block are small ones: of
// (x - shift_x) - (y - shift_y) - bias_x, where the bias makes it 0 in x's likeliest column, which may
// have nearly all of the sum. (Without it KL = 12.8 came out 7e-6 off, and so did the gradient.)
// Equal logits go through equal roundings: every cross is exactly 0, the logs cancel.
enum class Want { kl, stats };

template <Want W>
struct PairSums {
  RunningSoftmax x, y;
  double cross_x = 0, cross_y = 0, self_x = 0, self_y = 0;
  double at_x = 0, at_y = 0;              // x - y, and y - x, in the likeliest column of x, and of y
  bool x_alone = false, y_alone = false;  // a column that only one of the two models can produce

  double between() const { return double(x.from()) - double(y.from()); }
  float bias_x() const { return float(at_x - between()); }
  float bias_y() const { return float(at_y + between()); }

  void raise(float top_x, float top_y, float exponent) {
    double fx = x.raise(top_x, exponent), fy = y.raise(top_y, exponent);
    cross_x *= fx, self_x *= fx;
    cross_y *= fy, self_y *= fy;
  }
  double kl_x(double inverse) const { return kl(x, y, cross_x, x_alone, inverse); }
  double kl_y(double inverse) const { return kl(y, x, cross_y, y_alone, inverse); }
  double entropy_x(double inverse) const { return x.lse(inverse) - self_x / x.sum * inverse; }
  double entropy_y(double inverse) const { return y.lse(inverse) - self_y / y.sum * inverse; }

 private:
  static double kl(const RunningSoftmax& own, const RunningSoftmax& other, double cross, bool alone,
                   double inverse) {
    // A row of only -inf, or with NaN, has no finite positive sum: NaN.
    if (alone) return own.sum > 0 && other.sum > 0 ? double(inf) : double(inf) - double(inf);
    return cross / own.sum * inverse - own.lse(inverse) + other.lse(inverse);
  }
};

// One block's share of the sums.
struct PairBlock {
  double sum_x, sum_y, cross_x, cross_y, self_x, self_y;
  float top_x, top_y;
  bool x_alone, y_alone;

  bool spoiled() const {  // inf or NaN in a cross sum
    double c = (cross_x - cross_x) + (cross_y - cross_y);
    return !(c == 0.0);
  }
  template <Want W>
  void add_to(PairSums<W>& s, int64_t from) const {
    s.cross_x += cross_x + (s.between() + double(s.bias_x())) * sum_x;
    s.cross_y += cross_y + (double(s.bias_y()) - s.between()) * sum_y;
    s.self_x += self_x + double(s.x.from()) * sum_x;
    s.self_y += self_y + double(s.y.from()) * sum_y;
    s.x.add(sum_x, top_x, from);
    s.y.add(sum_y, top_y, from);
    s.x_alone |= x_alone;
    s.y_alone |= y_alone;
  }
};

template <Want W>
struct PairLanes {
  static constexpr bool all = W == Want::stats;
  F shift_x, shift_y, exponent, bias_x, bias_y;
  // Of one group: one of the two for every other vector.
  F sum_x[2], sum_y[2], cross_x[2], cross_y[2], self_x[2], self_y[2], top_x[2], top_y[2];
  Sum sums_x, sums_y, crosses_x, crosses_y, selves_x, selves_y;
  bool x_alone = false, y_alone = false;

  DAK_INLINE PairLanes(const PairSums<W>& s, float c)
      : shift_x(set(s.x.from())),
        shift_y(set(s.y.from())),
        exponent(set(c)),
        bias_x(set(s.bias_x())),
        bias_y(set(s.bias_y())) {
    for (int k = 0; k < 2; k++) top_x[k] = top_y[k] = set(-inf);
    start();
  }
  DAK_INLINE void start() {
    for (int k = 0; k < 2; k++) {
      sum_x[k] = sum_y[k] = cross_x[k] = cross_y[k] = self_x[k] = self_y[k] = set(0.0f);
    }
  }

  // The plain form takes no notice of -inf: such a column leaves inf or NaN in the cross sums, and
  // the block is done again with Careful.
  template <bool Careful>
  DAK_INLINE void add(int k, F x, F y) {
    top_x[k] = max(x, top_x[k]);
    top_y[k] = max(y, top_y[k]);
    F dx = x - shift_x, dy = y - shift_y, apart = dx - dy - bias_x, back = dy - dx - bias_y;
    F ex = exp2(dx * exponent), ey = exp2(dy * exponent);
    if constexpr (Careful) {
      F zero = set(0.0f), off = set(-inf);
      Mask no_x = eq(x, off), no_y = eq(y, off);
      x_alone |= any(but_not(no_y, no_x));
      y_alone |= any(but_not(no_x, no_y));
      dx = pick(no_x, zero, dx);
      dy = pick(no_y, zero, dy);
      apart = pick(no_x, zero, pick(no_y, zero, apart));
      back = pick(no_y, zero, pick(no_x, zero, back));
    }
    sum_x[k] = sum_x[k] + ex;
    sum_y[k] = sum_y[k] + ey;
    cross_x[k] = fma(ex, apart, cross_x[k]);
    if constexpr (all) {
      cross_y[k] = fma(ey, back, cross_y[k]);
      self_x[k] = fma(ex, dx, self_x[k]);
      self_y[k] = fma(ey, dy, self_y[k]);
    }
  }
  DAK_INLINE void close() {
    sums_x.add(sum_x[0] + sum_x[1]);
    sums_y.add(sum_y[0] + sum_y[1]);
    crosses_x.add(cross_x[0] + cross_x[1]);
    if constexpr (all) {
      crosses_y.add(cross_y[0] + cross_y[1]);
      selves_x.add(self_x[0] + self_x[1]);
      selves_y.add(self_y[0] + self_y[1]);
    }
    start();
  }
  DAK_INLINE static float top(const F* lanes) { return max_of(max(lanes[0], lanes[1])); }
  DAK_INLINE PairBlock done() const {
    PairBlock b{};
    b.sum_x = sums_x.total(), b.sum_y = sums_y.total(), b.cross_x = crosses_x.total();
    if constexpr (all) {
      b.cross_y = crosses_y.total(), b.self_x = selves_x.total(), b.self_y = selves_y.total();
    }
    b.top_x = top(top_x), b.top_y = top(top_y);
    b.x_alone = x_alone, b.y_alone = y_alone;
    return b;
  }
};

// `n` is a multiple of `step`, or below it.
template <Want W, bool Careful, class T, bool Cap>
inline PairBlock pair_block(
    const Scorer<Cap>& score, const T* px, const T* py, int64_t n, const PairSums<W>& s) {
  PairLanes<W> lanes(s, score.exponent);
  F x0, x1, y0, y1;
  if (Careful && n < step) {
    load_rest(score, px, n, x0, x1);
    load_rest(score, py, n, y0, y1);
    lanes.template add<Careful>(0, x0, y0);
    lanes.template add<Careful>(1, x1, y1);
    lanes.close();
    return lanes.done();
  }
  auto add = [&](int64_t i) __attribute__((always_inline)) {
    load_scores(score, px + i, x0, x1);
    load_scores(score, py + i, y0, y1);
    lanes.template add<Careful>(0, x0, y0);
    lanes.template add<Careful>(1, x1, y1);
  };
  in_groups(n, add, [&]() __attribute__((always_inline)) { lanes.close(); });
  return lanes.done();
}

// The difference of the scores in the likeliest column of `own`; 0 where it is not finite.
template <class T, bool Cap>
inline double at_top(const Scorer<Cap>& score, const T* own, const T* other, int64_t n,
                     const RunningSoftmax& softmax) {
  int64_t column = top_column(score, own, n, softmax);
  double d = double(score_at(score, own, column)) - double(score_at(score, other, column));
  return d - d == 0.0 ? d : 0.0;
}

// Moves the shifts up to these scores, both found in columns [from, from + n).
template <Want W, class T, bool Cap>
inline void follow(const Scorer<Cap>& score, const T* px, const T* py, int64_t from, int64_t n,
                   float top_x, float top_y, PairSums<W>& s) {
  bool new_x = top_x > s.x.shift, new_y = W == Want::stats && top_y > s.y.shift;
  s.raise(top_x, top_y, score.exponent);
  RunningSoftmax x{.top = top_x, .top_from = from}, y{.top = top_y, .top_from = from};
  if (new_x) s.at_x = at_top(score, px, py, from + n, x);
  if (new_y) s.at_y = at_top(score, py, px, from + n, y);
}

// Adds columns [from, from + n) to the sums.
template <Want W, class T, bool Cap>
inline void add_block(
    const Scorer<Cap>& score, const T* px, const T* py, int64_t from, int64_t n, PairSums<W>& s) {
  bool careful = n < step;
  PairBlock b;
  for (;;) {
    b = careful ? pair_block<W, true>(score, px + from, py + from, n, s)
                : pair_block<W, false>(score, px + from, py + from, n, s);
    bool low_x = s.x.too_low_for(b.top_x, score.exponent);
    bool low_y = s.y.too_low_for(b.top_y, score.exponent);
    if (low_x || low_y) {
      follow(score, px, py, from, n, low_x ? b.top_x : -inf, low_y ? b.top_y : -inf, s);
    } else if (!careful && b.spoiled()) {
      careful = true;
    } else {
      break;
    }
  }
  b.add_to(s, from);
  bool up_x = s.x.should_follow(score.exponent), up_y = s.y.should_follow(score.exponent);
  if (up_x || up_y) {
    follow(score, px, py, from, n, up_x ? b.top_x : -inf, up_y ? b.top_y : -inf, s);
  }
}

// Columns of the next block, which starts `left` columns before the end of the row.
inline int64_t next_columns(int64_t left) {
  return left >= block ? block : left >= step ? left / step * step : left;
}

template <Want W, class T, bool Cap>
inline PairSums<W> sum_pair(const Scorer<Cap>& score, const T* px, const T* py, int64_t n) {
  PairSums<W> s;
  int64_t first = n < peek ? n : peek;
  follow(score, px, py, 0, first, largest(score, px, first), largest(score, py, first), s);
  for (int64_t i = 0, columns; i < n; i += columns) {
    columns = next_columns(n - i);
    add_block<W>(score, px, py, i, columns, s);
  }
  return s;
}

}  // namespace dak::DAK_ISA
