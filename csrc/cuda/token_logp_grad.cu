// token_logp_bwd: the gradient from the saved normaliser.
#include "cuda/piece.cuh"

namespace dak::gpu {
namespace {

// In place: a thread overwrites only what it has loaded; the target's column is one of them.
template <class T, bool Cap>
__global__ void __launch_bounds__(threads) logp_grad(const __grid_constant__ LogpGradArgs a) {
  const Score& c = a.r.score;
  Piece<T> part(a.r, a.logits);
  int64_t y = a.target[part.row];
  if (y == a.ignore_index) return part.fill_zero(a.out);
  uint4 chunks[each];
  part.load(part.at(a.logits), chunks);
  float grad = a.grad.at(part.row);
  if (y < 0 || y >= part.columns) grad = nan_value;
  Anchor anchor(c, a.norm, part.row);
  float factor = grad * c.inverse_hi, by = -factor * expf(-anchor.log_sum);
  OutRow<T> out = part.out(a.out);
#pragma unroll
  for (int n = 0; n < each; n++) {
    float g[vec<T>];
    unpack<T>(chunks[n], g);
    int from = part.column(n);
    bool has_target = y >= from && y < from + vec<T>;
#pragma unroll
    for (int k = 0; k < vec<T>; k++) {
      float slope, z = score_of<Cap>(c, g[k], slope);
      g[k] = by * exp2_fast((z - anchor.top) * c.exponent) * slope;
      // 1 - p would lose the digits of a confident token.
      if (has_target && from + k == y) {
        float logp = anchor.log_prob(c, z);
        g[k] = -expm1f(logp > 0.0f ? 0.0f : logp) * factor * slope;  // fminf would lose a NaN
      }
    }
    out.store(from, g);
  }
}

}  // namespace

cudaError_t run(const LogpGradArgs& args, cudaStream_t stream) {
  Type type = args.logits.type;
  return with_type<float, bf16, f16>(type, args.r.score, [&](auto of, auto cap) {
    auto kernel = logp_grad<decltype(of), decltype(cap)::value>;
    return launch_pieces<LogpGradArgs>(kernel, args, type, stream);
  });
}

}  // namespace dak::gpu
