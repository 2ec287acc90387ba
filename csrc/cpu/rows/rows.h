// What the row kernels take and give: plain data, no torch, shared by all instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dak {

enum class Type : int8_t { f32, bf16, f16 };

inline int64_t bytes_of(Type type) { return type == Type::f32 ? 4 : 2; }

// z = softcap * tanh(x / softcap) / temperature, or x / temperature for softcap == 0.
struct Score {
  double temperature = 1.0;
  float softcap = 0.0f;
};

struct Row {
  const void* data;
  int64_t columns;
  Type type;
};

// `stream`: write around the caches. Worth it for gradients that no cache holds anyway: it saves
// reading every line of the output before it is overwritten.
struct OutRow {
  void* data;
  Type type;
  bool stream;
};

// (m, s) of reference/_rows.py: log softmax(z)_v = (z_v - m) - s.
struct Norm {
  float m, s;
};

struct LogpRow {
  Norm norm;
  double logp;  // in double, for the difference of two that may both be -500
};

struct EntropyRow {
  Norm norm;
  float entropy;
};

struct KlRow {
  Norm policy, ref;
  float kl, center;
};

struct JsParts {
  float policy, ref;  // what a row's columns add to KL(policy || m) and KL(ref || m)
};

enum Direction : int64_t { policy_ref = 0, ref_policy = 1, js = 2 };

// One row of the gradient of token_kl; `grad` is the upstream gradient.
struct KlGrad {
  Norm policy, ref;
  float grad, center;
  int64_t direction;
  double js_beta;
};

// The fields of reference/token_stats.py, in its order.
struct StatsRow {
  float logp, ref_logp, kl_policy_ref, kl_ref_policy, js, entropy, ref_entropy, top1_agree;
};

struct Tiles;  // cpu/gemm/gemm.h

// The kernels of one instruction set. A column `y` of -1 stands for "no target".
struct Kernels {
  LogpRow (*logp)(Row x, int64_t y, Score score);
  void (*logp_grad)(Row x, int64_t y, Score score, Norm norm, double grad, OutRow out);
  EntropyRow (*entropy)(Row x, Score score);
  void (*entropy_grad)(Row x, Score score, Norm norm, float entropy, double grad, OutRow out);
  KlRow (*kl)(Row policy, Row ref, int64_t direction, double js_beta, Score score);
  JsParts (*js_parts)(Row policy, Row ref, Norm norm_policy, Norm norm_ref, double js_beta,
                      Score score);
  void (*kl_grad)(Row policy, Row ref, const KlGrad& g, Score score, OutRow out);
  StatsRow (*stats)(Row policy, Row ref, int64_t y, double js_beta, Score score);
  void (*scale)(Row x, float factor);  // in place
  const Tiles* tiles;
};

// The table in use: the best for this machine, or that of DEEPALIGN_CPU_ISA=portable|avx2|avx512.
const Kernels& kernels();
bool runs_avx2();    // whether that is the AVX2 one or better
bool runs_avx512();  // whether that is the AVX-512 one

}  // namespace dak
