// What the CUDA kernels take: plain data, no torch. Edge cases: deepalign_kernels/reference/.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifndef DAK_CUDA_THREADS
#define DAK_CUDA_THREADS 256
#endif

namespace dak::gpu {

inline constexpr int threads = DAK_CUDA_THREADS;  // of every block
inline constexpr int chunk_bytes = 16;            // what one load or store moves

enum class Type : int { f32, bf16, f16 };
inline constexpr int bytes_of(Type type) { return type == Type::f32 ? 4 : 2; }

// [B, T, V] with last stride 1; strides in elements. No data: absent.
struct Matrix {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t batch_stride = 0, row_stride = 0;
};

// [N] fp32 of any stride. No data: absent.
struct Vector {
  const float* data = nullptr;
  int64_t stride = 0;
#ifdef __CUDACC__
  __device__ float at(int64_t row) const { return data[row * stride]; }
#endif
};

// Scores are kept without the temperature, as x or cap * tanh(x / cap); z = score / temperature.
// `hi` and `lo` are a double in two floats.
struct Score {
  float exponent;  // log2(e) / temperature
  float inverse_hi, inverse_lo, temperature_hi, temperature_lo;
  float cap = 0.0f, per_cap_hi = 0.0f, per_cap_lo = 0.0f;  // 1 / cap
};

// How rows are laid over blocks (plan.h): a cluster of blocks shares a row, a block takes `share`
// chunks of it and holds `tile` of them, of each matrix, in shared memory. With tile == share a row
// stays on the chip and is read once; otherwise it is read again for each further sweep.
struct LaunchPlan {
  int cluster = 1, share = 0, tile = 0;
};

// Weights of Jensen-Shannon, m = b p + rest q, and the polynomial of mixture.cuh.
struct Mixture {
  float b = 0.0f, rest = 0.0f, near[4] = {};
};
inline Mixture mixture_of(double js_beta) {
  double b = js_beta, rest = 1.0 - b, l = 0.6931471805599453, both = b * rest;
  float least = 1.17549435e-38f;  // so that no weight is 0
  return {float(b) > least ? float(b) : least,
          float(rest),
          {float(b), float(both * l / 2), float(both * (rest - b) * l * l / 6),
           float(both * (1 - 6 * both) * l * l * l / 24)}};
}

// What every kernel is told of its rows: how many and how wide, what is done to a logit first, and
// how the launch is cut.
struct Rows {
  int64_t rows, tokens;
  int columns;
  Score score;
  LaunchPlan plan;
};

// token_logp and constrained_loss, with `out` the gradient too. Outputs may be absent.
struct LogpArgs {
  Rows r;
  Matrix policy, ref, out;
  const int64_t* target;
  Vector beta, given;
  Vector grad;         // of logp; without a loss
  const float* scale;  // of the sum of losses
  int64_t ignore_index;
  int surrogate;
  float min_weight;
  float *loss, *logp, *ref_logp, *weight, *norm;
};

enum Direction : int { policy_ref = 0, ref_policy = 1, js = 2 };

// token_kl, with `out` the gradient in the same launch. Of the outputs only kl is always there.
struct KlArgs {
  Rows r;
  Matrix policy, ref, out;
  const bool* valid;
  Vector grad;
  int direction;
  Mixture mix;
  float *kl, *norm_policy, *norm_ref, *center;
};

// token_js_parts: the sums of Jensen-Shannon under given normalisers.
struct JsPartsArgs {
  Rows r;
  Matrix policy, ref;
  const bool* valid;
  const float *norm_policy, *norm_ref;
  Mixture mix;
  float *policy_part, *ref_part;
};

struct StatsArgs {
  Rows r;
  Matrix policy, ref;
  const int64_t* target;
  const bool* valid;
  int64_t ignore_index;
  bool with_js;
  Mixture mix;
  float* stats;  // [8, N]
};

// token_logp_bwd and token_kl_bwd: no sum over the row, so no plan.
struct LogpGradArgs {
  Rows r;
  Matrix logits, out;
  const int64_t* target;
  Vector grad;
  const float* norm;
  int64_t ignore_index;
};

struct KlGradArgs {
  Rows r;
  Matrix policy, ref, out;
  const bool* valid;
  Vector grad;
  const float *norm_policy, *norm_ref;
  Vector center;
  int direction;
  Mixture mix;
};

struct ScaleArgs {
  Rows r;
  Matrix grad;
  const float* factor;
};

// Launch on `stream` of the current device; nothing waits. rows > 0.
cudaError_t run(LogpArgs args, cudaStream_t stream);
cudaError_t run(KlArgs args, cudaStream_t stream);
cudaError_t run(JsPartsArgs args, cudaStream_t stream);
cudaError_t run(StatsArgs args, cudaStream_t stream);
cudaError_t run(const LogpGradArgs& args, cudaStream_t stream);
cudaError_t run(const KlGradArgs& args, cudaStream_t stream);
cudaError_t run(const ScaleArgs& args, cudaStream_t stream);

}  // namespace dak::gpu
