// token_logp and constrained_loss: log-softmax of one row, or two, and the gradient in one launch.
#include "cuda/constrained_loss.cuh"
#include "cuda/plan.h"
#include "cuda/row.cuh"

namespace dak::gpu {
namespace {

struct Results {
  float loss = 0.0f, logp = 0.0f, ref_logp = 0.0f, weight = 0.0f, m = 0.0f, s = 0.0f;

  __device__ void write(const LogpArgs& a, int64_t row) const {
    a.logp[row] = logp;
    if (a.loss) a.loss[row] = loss, a.ref_logp[row] = ref_logp, a.weight[row] = weight;
    if (a.norm) a.norm[2 * row] = m, a.norm[2 * row + 1] = s;
  }
};

// grad is that of the row's logp.
template <class T, bool Cap>
__device__ inline void write_gradient(const LogpArgs& a, const Part<T>& part, Tiles<T>& tiles,
                                      const ExpSum& x, int64_t y, float logp, float grad) {
  const Score& c = a.r.score;
  OutRow<T> out = part.out(a.out);
  float at = shift(x.top), factor = grad * c.inverse_hi, by = -factor / x.sum;
  float own = -expm1f(logp) * factor;  // 1 - p would lose the digits of a confident token
  int64_t target_chunk = (y + part.lead) / vec<T>;
  tiles.matrices = 1;
  tiles.sweep_back([&](int first, int count) {
    const uint4* chunks = buffer(a.r.plan, 0);
#pragma unroll 2
    for (int i = int(threadIdx.x); i < count; i += threads) {
      float g[vec<T>];
      unpack<T>(chunks[i], g);
      int from = part.column(first + i);
      bool has_target = first + i == target_chunk;
#pragma unroll
      for (int k = 0; k < vec<T>; k++) {
        float slope, z = score_of<Cap>(c, g[k], slope);
        g[k] = by * exp2_fast((z - at) * c.exponent) * slope;
        if (has_target && from + k == y) g[k] = own * slope;
      }
      out.store(from, g);
    }
  });
}

// Reads the row once and writes its gradient once, where the plan keeps rows on the chip. In place:
// every block has read the target's logit before any of the cluster passes `exchange`, after which
// blocks overwrite only chunks that they hold, or have not yet loaded again, themselves.
template <class T, bool Cap>
__global__ void __launch_bounds__(threads, 3) logp_rows(const __grid_constant__ LogpArgs a) {
  const Score& c = a.r.score;
  Part<T> part(a.r, a.policy);
  int64_t row = part.row, y = a.target[row];
  if (y == a.ignore_index) {  // for all blocks of the cluster alike
    if (part.writes()) Results{}.write(a, row);
    if (a.out.data) fill_zero(part, a.out);
    return;
  }
  bool inside = y >= 0 && y < part.columns, two = a.ref.data != nullptr;
  const T* policy = part.at(a.policy);
  const T* ref = two ? part.at(a.ref) : policy;
  float picked = inside ? score_at<T, Cap>(c, policy, y) : 0.0f;
  float ref_picked = inside && two ? score_at<T, Cap>(c, ref, y) : 0.0f;

  Tiles<T> tiles{a.r.plan, part, {policy, ref}, two ? 2 : 1};
  ExpSum x, r;
  int turn = 0;
  tiles.sweep([&](int first, int count) {
    Top tops[2] = {top_value_of<T>(buffer(a.r.plan, 0), count), {}};
    if (two) tops[1] = top_value_of<T>(buffer(a.r.plan, 1), count);
    block_tops(tops, turn);
    x.add<T, Cap>(c, part, buffer(a.r.plan, 0), first, count, tops[0].value);
    if (two) r.add<T, Cap>(c, part, buffer(a.r.plan, 1), first, count, tops[1].value);
  });
  float sums[2] = {x.sum, r.sum};
  block_sums(sums);
  float all[4] = {x.top, sums[0], r.top, sums[1]};
  exchange(a.r.plan, all, {-inf, 0.0f, -inf, 0.0f});
  x.top = all[0], x.sum = all[1], r.top = all[2], r.sum = all[3];
  x.merge_lanes(c);
  if (two) r.merge_lanes(c);

  Results results;
  Norm norm(c, x.top, x.sum);
  results.m = norm.m, results.s = norm.s;
  results.logp = inside ? x.log_prob(c, picked) : nan_value;
  if (a.loss) {
    float ref_logp = two ? r.log_prob(c, ref_picked) : a.given.at(row);
    results.ref_logp = inside || !two ? ref_logp : nan_value;
    float beta = a.beta.at(row);
    TokenLoss token = token_loss(a, results.logp, results.ref_logp, beta);
    results.loss = token.loss, results.weight = token.weight;
  }
  if (part.writes()) results.write(a, row);
  if (a.out.data) {
    float grad = a.loss ? -results.weight * *a.scale : a.grad.at(row);
    if (!inside) grad = nan_value;
    write_gradient<T, Cap>(a, part, tiles, x, y, results.logp, grad);
  }
  leave_cluster(a.r.plan);
}

}  // namespace

cudaError_t run(LogpArgs args, cudaStream_t stream) {
  Type type = args.policy.type;
  int matrices = args.ref.data ? 2 : 1;
  return with_type<float, bf16, f16>(type, args.r.score, [&](auto of, auto cap) {
    auto kernel = logp_rows<decltype(of), decltype(cap)::value>;
    return launch_rows<LogpArgs>(kernel, args, matrices, scratch_bytes, type, stream);
  });
}

}  // namespace dak::gpu
