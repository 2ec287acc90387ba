// token_stats of one row: everything but Jensen-Shannon in one sweep, that in a second one over the
// same tiles.
#include "cuda/mixture.cuh"
#include "cuda/plan.h"

namespace dak::gpu {
namespace {

// With ex = e^(x - cx) and ey alike: cross = sum ex ((x - cx) - (y - cy)), back = sum ey (...) the
// other way round, self = sum ex (x - cx) for the entropy. While they grow, all sums are 1 / room
// of that; in the end the last four are means.
struct StatSum {
  ExpSum x, y;
  float cross = 0.0f, back = 0.0f, self_x = 0.0f, self_y = 0.0f;

  __device__ void raise(const Score& c, float top_x, float top_y) {
    float old_x = x.sum, old_y = y.sum;
    float moved_x = shift(x.top) - shift(top_x), moved_y = shift(y.top) - shift(top_y);
    float sunk_x = x.raise(c, top_x), sunk_y = y.raise(c, top_y);
    cross = rescale(cross, old_x, sunk_x, moved_x - moved_y);
    back = rescale(back, old_y, sunk_y, moved_y - moved_x);
    self_x = rescale(self_x, old_x, sunk_x, moved_x);
    self_y = rescale(self_y, old_y, sunk_y, moved_y);
  }
  template <class T, bool Cap>
  __device__ void add(const Score& c, const Part<T>& part, const uint4* own, const uint4* other,
                      int first, int count, const Top (&tops)[2]) {
    raise(c, fmaxf(x.top, score_of<Cap>(c, tops[0].value)),
          fmaxf(y.top, score_of<Cap>(c, tops[1].value)));
    float cx = shift(x.top), cy = shift(y.top);
#pragma unroll 1
    for (int i = int(threadIdx.x); i < count; i += threads) {
      float zx[vec<T>], zy[vec<T>], more[6] = {};
      scores_of<T, Cap>(c, part, first + i, own[i], zx);
      scores_of<T, Cap>(c, part, first + i, other[i], zy);
#pragma unroll
      for (int k = 0; k < vec<T>; k++) {
        float dx = zx[k] - cx, dy = zy[k] - cy;
        float ex = exp2_fast(fmaf(dx, c.exponent, -headroom));
        float ey = exp2_fast(fmaf(dy, c.exponent, -headroom)), t = dx - dy;
        more[0] += ex, more[1] += ey;
        more[2] = fmaf(ex, no_less(t), more[2]), more[3] = fmaf(ey, no_less(-t), more[3]);
        more[4] = fmaf(ex, no_less(dx), more[4]), more[5] = fmaf(ey, no_less(dy), more[5]);
      }
      x.sum += more[0], y.sum += more[1], cross += more[2], back += more[3];
      self_x += more[4], self_y += more[5];
    }
  }
  __device__ void merge_lanes(const Score& c) {
    raise(c, warp_max(x.top), warp_max(y.top));
    x.sum = warp_sum(x.sum), y.sum = warp_sum(y.sum);
    cross = divergence(warp_sum(cross), x.sum, y.sum);
    back = divergence(warp_sum(back), y.sum, x.sum);
    self_x = warp_sum(self_x) / x.sum, self_y = warp_sum(self_y) / y.sum;
    x.sum *= room, y.sum *= room;
  }
};

// First column with the row's largest logit; column 0 for a row of only -inf. Logits may be masked,
// so the scores' maximum is that of the logits, unless a softcap rounds two of them together.
template <class T>
__device__ inline int first_column(const Part<T>& part, const T* row, Top top) {
  if (top.value == -inf) return 0;
  int from = part.column(top.chunk);
  for (int k = 0; k < vec<T>; k++) {
    bool there = unsigned(from + k) < unsigned(part.columns);
    if (there && to_float(row[from + k]) == top.value) return from + k;
  }
  return 0;
}

template <class T, bool Cap>
__global__ void __launch_bounds__(threads, 2) stats_rows(const __grid_constant__ StatsArgs a) {
  const Score& c = a.r.score;
  Part<T> part(a.r, a.policy);
  int64_t row = part.row, n = a.r.rows, y = a.target ? a.target[row] : 0;
  if ((a.valid && !a.valid[row]) || (a.target && y == a.ignore_index)) {
    if (part.writes()) {
      for (int i = 0; i < 8; i++) a.stats[i * n + row] = 0.0f;
    }
    return;
  }
  const T *policy = part.at(a.policy), *ref = part.at(a.ref);
  Tiles<T> tiles{a.r.plan, part, {policy, ref}, 2};
  StatSum s;
  Top best[2];
  int turn = 0;
  tiles.sweep([&](int first, int count) {
    const uint4 *own = buffer(a.r.plan, 0), *other = buffer(a.r.plan, 1);
    Top tops[2] = {top_of<T>(own, first, count), top_of<T>(other, first, count)};
    block_tops(tops, turn);
    for (int m = 0; m < 2; m++) best[m].take(tops[m].value, tops[m].chunk);
    s.add<T, Cap>(c, part, own, other, first, count, tops);
  });
  float sums[6] = {s.x.sum, s.y.sum, s.cross, s.back, s.self_x, s.self_y};
  block_sums(sums);
  float all[12] = {s.x.top, s.y.top, sums[0], sums[1], sums[2], sums[3], sums[4], sums[5],
                   best[0].value, __int_as_float(best[0].chunk), best[1].value,
                   __int_as_float(best[1].chunk)};
  float none = __int_as_float(no_chunk);
  exchange(a.r.plan, all, {-inf, -inf, 0, 0, 0, 0, 0, 0, -inf, none, -inf, none});
  s.x.top = all[0], s.y.top = all[1], s.x.sum = all[2], s.y.sum = all[3];
  s.cross = all[4], s.back = all[5], s.self_x = all[6], s.self_y = all[7];
  s.merge_lanes(c);
  for (int m = 0; m < 2; m++) {
    best[m].value = all[8 + 2 * m], best[m].chunk = __float_as_int(all[9 + 2 * m]);
    best[m] = warp_top(best[m]);
  }
  float js = 0.0f;
  if (a.with_js) {
    Log2Prob log_q(c, shift(s.x.top), log2f(s.x.sum)), log_p(c, shift(s.y.top), log2f(s.y.sum));
    JsSums mine = js_sums<T, Cap>(a.r, part, tiles, log_q, log_p, a.mix);
    leave_cluster(a.r.plan);
    JsSums all = js_of_cluster(a.r.plan, mine);
    js = a.mix.b * all.p + a.mix.rest * all.q;
  }
  if (part.writes()) {
    float inverse = c.inverse_hi, dx = s.x.sum, dy = s.y.sum;
    float out[8] = {0.0f, 0.0f,
                    s.cross * inverse + logf(dy / dx),
                    s.back * inverse + logf(dx / dy), js,
                    logf(dx) - s.self_x * inverse, logf(dy) - s.self_y * inverse, 0.0f};
    bool agree = first_column(part, policy, best[0]) == first_column(part, ref, best[1]);
    out[7] = agree ? 1.0f : 0.0f;
    if (a.target) {
      bool inside = y >= 0 && y < part.columns;
      out[0] = inside ? s.x.log_prob(c, score_at<T, Cap>(c, policy, y)) : nan_value;
      out[1] = inside ? s.y.log_prob(c, score_at<T, Cap>(c, ref, y)) : nan_value;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) a.stats[i * n + row] = out[i];
  }
  leave_cluster(a.r.plan);
}

}  // namespace

cudaError_t run(StatsArgs args, cudaStream_t stream) {
  Type type = args.policy.type;
  return with_type<float, bf16, f16>(type, args.r.score, [&](auto of, auto cap) {
    auto kernel = stats_rows<decltype(of), decltype(cap)::value>;
    return launch_rows<StatsArgs>(kernel, args, 2, scratch_bytes, type, stream);
  });
}

}  // namespace dak::gpu
