// Gradients from saved normalisers, and scale_grad: nothing is summed up, every block takes a piece
// of a row. Pieces run from the end of the tensor backwards: what was touched last is in L2.
#include "cuda/mixture.cuh"
#include "cuda/plan.h"

namespace dak::gpu {
namespace {

inline constexpr int each = 2;  // chunks per thread
inline constexpr int piece = threads * each;

int pieces_of(const Rows& r, Type type) { return (chunks_of(r.columns, type) + piece - 1) / piece; }

// A piece of a row; the plan's cluster is the number of pieces per row.
template <class T>
struct Piece {
  int64_t row, batch, token;
  int lead, first, columns;

  __device__ Piece(const Rows& r, const Matrix& m) : columns(r.columns) {
    // Numbers of blocks and rows are below 2^31; a 64-bit division is a hundred instructions.
    unsigned pieces = unsigned(r.plan.cluster), tokens = unsigned(r.tokens);
    unsigned backwards = unsigned(r.rows) * pieces - 1 - blockIdx.x, at_row = backwards / pieces;
    row = at_row, batch = at_row / tokens, token = at_row % tokens;
    lead = int(reinterpret_cast<uintptr_t>(at(m)) / sizeof(T) % vec<T>);
    first = int(backwards % pieces) * piece + int(threadIdx.x);
  }
  __device__ const T* at(const Matrix& m) const {
    return static_cast<const T*>(m.data) + (batch * m.batch_stride + token * m.row_stride);
  }
  // Column that chunk n of this thread begins with.
  __device__ int column(int n) const { return (first + n * threads) * vec<T> - lead; }

  // All chunks of this thread, so that they are in flight together; 0 where there is no column.
  __device__ void load(const T* row, uint4 (&chunks)[each]) const {
    bool aligned = (reinterpret_cast<uintptr_t>(row) / sizeof(T) - unsigned(lead)) % vec<T> == 0;
#pragma unroll
    for (int n = 0; n < each; n++) {
      int from = column(n);
      uint32_t words[4] = {};
      if (aligned && from >= 0 && from + vec<T> <= columns) {
        chunks[n] = __ldcs(reinterpret_cast<const uint4*>(row + from));
      } else {
#pragma unroll
        for (int k = 0; k < vec<T>; k++) {
          uint32_t bits = 0;
          if (unsigned(from + k) < unsigned(columns)) bits = Part<T>::bits_of(row[from + k]);
          words[k * int(sizeof(T)) / 4] |= bits << (k * int(sizeof(T)) % 4 * 8);
        }
        chunks[n] = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
  __device__ OutRow<T> out(const Matrix& m) const { return {m, batch, token, lead, columns}; }
  __device__ void fill_zero(const Matrix& m) const {
    const float zero[vec<T>] = {};
    OutRow<T> to = out(m);
    for (int n = 0; n < each; n++) to.store(column(n), zero);
  }
};

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

// The factor is read here, so the host never waits for it; where it is 1 nothing is moved.
template <class T>
__global__ void __launch_bounds__(threads) scale_rows(const __grid_constant__ ScaleArgs a) {
  float factor = *a.factor;
  if (factor == 1.0f) return;
  Piece<T> part(a.r, a.grad);
  uint4 chunks[each];
  part.load(part.at(a.grad), chunks);
  OutRow<T> out = part.out(a.grad);
#pragma unroll
  for (int n = 0; n < each; n++) {
    float g[vec<T>];
    unpack<T>(chunks[n], g);
#pragma unroll
    for (int k = 0; k < vec<T>; k++) g[k] *= factor;
    out.store(part.column(n), g);
  }
}

template <class Args>
cudaError_t launch_pieces(void (*kernel)(Args), Args args, Type type, cudaStream_t stream) {
  args.r.plan.cluster = pieces_of(args.r, type);
  int64_t blocks = args.r.rows * args.r.plan.cluster;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace

cudaError_t run(const LogpGradArgs& args, cudaStream_t stream) {
  Type type = args.logits.type;
  return with_type<float, bf16, f16>(type, args.r.score, [&](auto of, auto cap) {
    auto kernel = logp_grad<decltype(of), decltype(cap)::value>;
    return launch_pieces<LogpGradArgs>(kernel, args, type, stream);
  });
}

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

cudaError_t run(const ScaleArgs& args, cudaStream_t stream) {
  Type type = args.grad.type;
  return with_type<float, bf16, f16>(type, args.r.score, [&](auto of, auto) {
    return launch_pieces<ScaleArgs>(scale_rows<decltype(of)>, args, type, stream);
  });
}

}  // namespace dak::gpu
