// token_kl: divergence of one row between two models, and its gradient in the same launch if asked.
#include "cuda/mixture.cuh"
#include "cuda/plan.h"

namespace dak::gpu {
namespace {

struct Results {
  float kl = 0.0f, center = 0.0f, policy_m = 0.0f, policy_s = 0.0f, ref_m = 0.0f, ref_s = 0.0f;

  __device__ void put(const Norm& policy, const Norm& ref) {
    policy_m = policy.m, policy_s = policy.s, ref_m = ref.m, ref_s = ref.s;
  }
  __device__ void write(const KlArgs& a, int64_t row) const {
    a.kl[row] = kl;
    if (!a.center) return;
    a.center[row] = center;
    a.norm_policy[2 * row] = policy_m, a.norm_policy[2 * row + 1] = policy_s;
    a.norm_ref[2 * row] = ref_m, a.norm_ref[2 * row + 1] = ref_s;
  }
};

// Sums of KL(x || y), with cx, cy = shift(x.top), shift(y.top) and ct = base():
//   x, y  sums of e^(x - cx), e^(y - cy);   cross = sum e^(x - cx) ((x - cx) - (y - ct))
// The anchor is y where x has its maximum, so that the likeliest column adds 0 to `cross`. With
// scores in units of the temperature, KL = cross / x.sum + (log(y.sum / x.sum) - (ct - cy)).
// The bracket is the log-ratio of the likeliest column. Equal rows give exactly 0: every term of
// `cross` is 0, the sums are equal and ct is cy.
// While they grow, all three sums are 1 / room of that.
struct KlSum {
  // A score that far below the top is a mask, no anchor: against it the other columns' t would
  // lose their digits, and the likeliest column may have little of the sum.
  static constexpr float deep = 30000.0f;
  ExpSum x, y;
  float anchor = -inf, cross = 0.0f, mean = 0.0f;

  __device__ float base() const {
    float cy = shift(y.top);
    return anchor >= cy - deep ? anchor : cy;
  }
  __device__ void raise(const Score& c, float top_x, float top_y, float new_anchor) {
    float moved = shift(x.top) - shift(top_x), old_base = base();
    float old = x.sum, sunk = x.raise(c, top_x);
    y.raise(c, top_y);
    anchor = new_anchor;
    cross = rescale(cross, old, sunk, moved - (old_base - base()));
  }
  template <class T, bool Cap>
  __device__ void add(const Score& c, const Part<T>& part, const uint4* own, const uint4* other,
                      int first, int count, const Top (&tops)[2]) {
    float top_x = score_of<Cap>(c, tops[0].value), top_y = score_of<Cap>(c, tops[1].value);
    float new_anchor = anchor;
    if (tops[0].value > -inf && top_x > x.top) {
      float raw[vec<T>], there[vec<T>];
      unpack<T>(own[tops[0].chunk - first], raw);
      unpack<T>(other[tops[0].chunk - first], there);
#pragma unroll
      for (int k = vec<T> - 1; k >= 0; k--) {
        if (raw[k] == tops[0].value) new_anchor = score_of<Cap>(c, there[k]);
      }
    }
    raise(c, fmaxf(x.top, top_x), fmaxf(y.top, top_y), new_anchor);
    float cx = shift(x.top), cy = shift(y.top), ct = base();
#pragma unroll 1
    for (int i = int(threadIdx.x); i < count; i += threads) {
      float zx[vec<T>], zy[vec<T>];
      scores_of<T, Cap>(c, part, first + i, own[i], zx);
      scores_of<T, Cap>(c, part, first + i, other[i], zy);
      float more_x = 0.0f, more_y = 0.0f, more = 0.0f;
#pragma unroll
      for (int k = 0; k < vec<T>; k++) {
        float dx = zx[k] - cx, ex = exp2_fast(fmaf(dx, c.exponent, -headroom));
        more_x += ex;
        more_y += exp2_fast(fmaf(zy[k] - cy, c.exponent, -headroom));
        more = fmaf(ex, no_less(dx - (zy[k] - ct)), more);
      }
      x.sum += more_x, y.sum += more_y, cross += more;
    }
  }
  // From one in each lane to that of all lanes; the anchor is that of the first with the top.
  __device__ void merge_lanes(const Score& c) {
    float top = warp_max(x.top);
    unsigned who = __ballot_sync(all_lanes, x.top == top);
    raise(c, top, warp_max(y.top), __shfl_sync(all_lanes, anchor, __ffs(int(who)) - 1));
    x.sum = warp_sum(x.sum), y.sum = warp_sum(y.sum);
    mean = divergence(warp_sum(cross), x.sum, y.sum);
    x.sum *= room, y.sum *= room;
  }
  // A large log-ratio is rounded as token_kl_bwd rounds it, so that the two cancel in the gradient
  // of the likeliest column; a small one loses less by dividing the sums.
  __device__ float kl(const Score& c, const Norm& nx, const Norm& ny) const {
    float ct = base(), log_ratio = logf(y.sum / x.sum) - (ct - shift(y.top)) * c.inverse_hi;
    if (fabsf(log_ratio) > 0.5f && log_ratio < inf) {
      Anchor ax(c, nx.m, nx.s), ay(c, ny.m, ny.s);
      log_ratio = ax.log_prob(c, x.top) - ay.log_prob(c, ct);
    }
    return mean * c.inverse_hi + log_ratio;
  }
};

// sweep(f): g = f(policy score, reference score) * slope for every column, written to `out`.
template <class T, bool Cap, class Fn>
__device__ inline void write_gradient(const KlArgs& a, const Part<T>& part, Tiles<T>& tiles,
                                      const Fn& fn) {
  const Score& c = a.r.score;
  OutRow<T> out = part.out(a.out);
  tiles.sweep_back([&](int first, int count) {
#pragma unroll 1
    for (int i = int(threadIdx.x); i < count; i += threads) {
      float g[vec<T>], y[vec<T>];
      unpack<T>(buffer(a.r.plan, 0)[i], g);
      unpack<T>(buffer(a.r.plan, 1)[i], y);
#pragma unroll
      for (int k = 0; k < vec<T>; k++) {
        float slope, x = score_of<Cap>(c, g[k], slope);
        g[k] = fn(x, score_of<Cap>(c, y[k])) * slope;
      }
      out.store(part.column(first + i), g);
    }
  });
}

// The gradient divides by the sums themselves, so what cancels between its log-ratio and the KL is
// left out instead of subtracted.
template <class T, bool Cap>
__device__ inline void kl_gradient(const KlArgs& a, const Part<T>& part, Tiles<T>& tiles,
                                   const KlSum& s, float kl) {
  const Score& c = a.r.score;
  float factor = a.grad.at(part.row) * c.inverse_hi;
  float cx = shift(s.x.top), cy = shift(s.y.top), per_x = 1.0f / s.x.sum, per_y = 1.0f / s.y.sum;
  if (a.direction == policy_ref) {
    float ct = s.base(), scale = per_x * c.inverse_hi;
    if (!(kl < inf)) factor = nan_value;
    write_gradient<T, Cap>(a, part, tiles, [&](float x, float y) {
      float dx = x - cx, t = no_less((dx - (y - ct)) - s.mean);
      return factor * (t * (exp2_fast(dx * c.exponent) * scale));
    });
  } else {  // x is the reference
    write_gradient<T, Cap>(a, part, tiles, [&](float x, float y) {
      float q = __fmul_rn(exp2_fast((x - cy) * c.exponent), per_y);
      float p = __fmul_rn(exp2_fast((y - cx) * c.exponent), per_x);
      return factor * (q - p);
    });
  }
}

template <class T, bool Cap>
__global__ void __launch_bounds__(threads, 3) kl_rows(const __grid_constant__ KlArgs a) {
  const Score& c = a.r.score;
  Part<T> part(a.r, a.policy);
  if (a.valid && !a.valid[part.row]) {  // for all blocks of the cluster alike
    if (part.writes()) Results{}.write(a, part.row);
    if (a.out.data) fill_zero(part, a.out);
    return;
  }
  Tiles<T> tiles{a.r.plan, part, {part.at(a.policy), part.at(a.ref)}, 2};
  int own = a.direction == policy_ref ? 0 : 1, turn = 0;
  KlSum s;
  tiles.sweep([&](int first, int count) {
    const uint4 *x = buffer(a.r.plan, own), *y = buffer(a.r.plan, 1 - own);
    Top tops[2] = {top_of<T>(x, first, count), top_value_of<T>(y, count)};
    block_tops(tops, turn);
    s.add<T, Cap>(c, part, x, y, first, count, tops);
  });
  float sums[3] = {s.x.sum, s.y.sum, s.cross};
  block_sums(sums);
  float all[6] = {s.x.top, sums[0], s.y.top, sums[1], s.anchor, sums[2]};
  exchange(a.r.plan, all, {-inf, 0.0f, -inf, 0.0f, -inf, 0.0f});
  s.x.top = all[0], s.x.sum = all[1], s.y.top = all[2], s.y.sum = all[3];
  s.anchor = all[4], s.cross = all[5];
  s.merge_lanes(c);

  Results results;
  Norm x(c, s.x.top, s.x.sum), y(c, s.y.top, s.y.sum);
  results.kl = s.kl(c, x, y);
  results.center = own ? 0.0f : results.kl;
  results.put(own ? y : x, own ? x : y);
  if (part.writes()) results.write(a, part.row);
  if (a.out.data) kl_gradient<T, Cap>(a, part, tiles, s, results.kl);
  leave_cluster(a.r.plan);
}

// Jensen-Shannon: the mixture needs both normalisers, hence a second sweep over the same tiles.
template <class T, bool Cap>
__global__ void __launch_bounds__(threads, 2) js_rows(const __grid_constant__ KlArgs a) {
  const Score& c = a.r.score;
  Part<T> part(a.r, a.policy);
  if (a.valid && !a.valid[part.row]) {
    if (part.writes()) Results{}.write(a, part.row);
    if (a.out.data) fill_zero(part, a.out);
    return;
  }
  Tiles<T> tiles{a.r.plan, part, {part.at(a.policy), part.at(a.ref)}, 2};
  const uint4 *own = buffer(a.r.plan, 0), *other = buffer(a.r.plan, 1);
  ExpSum x, y;
  int turn = 0;
  tiles.sweep([&](int first, int count) {
    Top tops[2] = {top_value_of<T>(own, count), top_value_of<T>(other, count)};
    block_tops(tops, turn);
    x.add<T, Cap>(c, part, own, first, count, tops[0].value);
    y.add<T, Cap>(c, part, other, first, count, tops[1].value);
  });
  float sums[2] = {x.sum, y.sum};
  block_sums(sums);
  float all[4] = {x.top, sums[0], y.top, sums[1]};
  exchange(a.r.plan, all, {-inf, 0.0f, -inf, 0.0f});
  x.top = all[0], x.sum = all[1], y.top = all[2], y.sum = all[3];
  x.merge_lanes(c);
  y.merge_lanes(c);

  Log2Prob log_q(c, shift(x.top), log2f(x.sum)), log_p(c, shift(y.top), log2f(y.sum));
  JsSums js = js_sums<T, Cap>(a.r, part, tiles, log_q, log_p, a.mix);
  leave_cluster(a.r.plan);
  js = js_of_cluster(a.r.plan, js);
  Results results;
  results.center = js.q;
  results.kl = a.mix.b * js.p + a.mix.rest * js.q;
  results.put(Norm(c, x.top, x.sum), Norm(c, y.top, y.sum));
  if (part.writes()) results.write(a, part.row);
  if (a.out.data) {
    float factor = a.grad.at(part.row) * c.inverse_hi * a.mix.rest;
    write_gradient<T, Cap>(a, part, tiles, [&](float zq, float zp) {
      return js_slope(log_q(zq), log_p(zp), a.mix, js.q, factor);
    });
  }
  leave_cluster(a.r.plan);
}

template <class T, bool Cap>
__global__ void __launch_bounds__(threads, 2) parts_rows(const __grid_constant__ JsPartsArgs a) {
  const Score& c = a.r.score;
  Part<T> part(a.r, a.policy);
  JsSums js{0.0f, 0.0f};
  if (!a.valid || a.valid[part.row]) {
    Tiles<T> tiles{a.r.plan, part, {part.at(a.policy), part.at(a.ref)}, 2};
    Log2Prob log_q(c, Anchor(c, a.norm_policy, part.row)), log_p(c, Anchor(c, a.norm_ref, part.row));
    js = js_of_cluster(a.r.plan, js_sums<T, Cap>(a.r, part, tiles, log_q, log_p, a.mix));
    leave_cluster(a.r.plan);
  }
  if (part.writes()) a.policy_part[part.row] = js.q, a.ref_part[part.row] = js.p;
}

}  // namespace

cudaError_t run(KlArgs args, cudaStream_t stream) {
  Type type = args.policy.type;
  return with_type<float, bf16, f16>(type, args.r.score, [&](auto of, auto cap) {
    constexpr bool capped = decltype(cap)::value;
    auto kernel = args.direction == js ? js_rows<decltype(of), capped>
                                       : kl_rows<decltype(of), capped>;
    return launch_rows<KlArgs>(kernel, args, 2, scratch_bytes, type, stream);
  });
}

cudaError_t run(JsPartsArgs args, cudaStream_t stream) {
  Type type = args.policy.type;
  return with_type<float, bf16, f16>(type, args.r.score, [&](auto of, auto cap) {
    auto kernel = parts_rows<decltype(of), decltype(cap)::value>;
    return launch_rows<JsPartsArgs>(kernel, args, 2, scratch_bytes, type, stream);
  });
}

}  // namespace dak::gpu
