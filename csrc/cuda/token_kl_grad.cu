// token_kl_bwd: the gradient from the saved normalisers.
#include "cuda/mixture.cuh"
#include "cuda/piece.cuh"

namespace dak::gpu {
namespace {

// f(policy score, reference score): the gradient with respect to the policy's score.
template <class T, bool Cap, class Fn>
__device__ inline void write_pairs(const KlGradArgs& a, const Piece<T>& part, const Fn& f) {
  const Score& c = a.r.score;
  uint4 x[each], y[each];
  part.load(part.at(a.policy), x);
  part.load(part.at(a.ref), y);
  OutRow<T> out = part.out(a.out);
#pragma unroll
  for (int n = 0; n < each; n++) {
    float g[vec<T>], zp[vec<T>];
    unpack<T>(x[n], g);
    unpack<T>(y[n], zp);
#pragma unroll
    for (int k = 0; k < vec<T>; k++) {
      float slope, zq = score_of<Cap>(c, g[k], slope);
      g[k] = f(zq, score_of<Cap>(c, zp[k])) * slope;
    }
    out.store(part.column(n), g);
  }
}

template <class T, bool Cap, int D>
__global__ void __launch_bounds__(threads) kl_grad(const __grid_constant__ KlGradArgs a) {
  const Score& c = a.r.score;
  Piece<T> part(a.r, a.policy);
  if (a.valid && !a.valid[part.row]) return part.fill_zero(a.out);
  Anchor q(c, a.norm_policy, part.row), p(c, a.norm_ref, part.row);
  float center = a.center.at(part.row), factor = a.grad.at(part.row) * c.inverse_hi;
  float per_q = expf(-q.log_sum), per_p = expf(-p.log_sum);
  auto exp_of = [&](const Anchor& x, float z) { return exp2_fast((z - x.top) * c.exponent); };
  if constexpr (D == policy_ref) {
    float scale = center < inf ? factor * per_q : nan_value;
    write_pairs<T, Cap>(a, part, [&](float zq, float zp) {
      return no_less((q.log_prob(c, zq) - p.log_prob(c, zp)) - center) * (exp_of(q, zq) * scale);
    });
  } else if constexpr (D == ref_policy) {
    write_pairs<T, Cap>(a, part, [&](float zq, float zp) {
      return factor * (__fmul_rn(exp_of(q, zq), per_q) - __fmul_rn(exp_of(p, zp), per_p));
    });
  } else {
    Log2Prob log_q(c, q), log_p(c, p);
    factor *= a.mix.rest;
    write_pairs<T, Cap>(a, part, [&](float zq, float zp) {
      return js_slope(log_q(zq), log_p(zp), a.mix, center, factor);
    });
  }
}

}  // namespace

cudaError_t run(const KlGradArgs& args, cudaStream_t stream) {
  Type type = args.policy.type;
  return with_type<float, bf16, f16>(type, args.r.score, [&](auto of, auto cap) {
    using T = decltype(of);
    constexpr bool capped = decltype(cap)::value;
    auto kernel = args.direction == policy_ref   ? kl_grad<T, capped, policy_ref>
                  : args.direction == ref_policy ? kl_grad<T, capped, ref_policy>
                                                 : kl_grad<T, capped, js>;
    return launch_pieces<KlGradArgs>(kernel, args, type, stream);
  });
}

}  // namespace dak::gpu
