// constrained_loss of one token, from its log-probabilities: what token_logp.cu does with them.
#pragma once

#include "cuda/math.cuh"

namespace dak::gpu {

struct TokenLoss {
  float loss, weight;
};

// reference/constrained_loss.py
__device__ inline TokenLoss token_loss(const LogpArgs& a, float logp, float ref_logp, float beta) {
  float delta = logp == ref_logp ? 0.0f : ref_logp - logp;
  float u = beta == 0.0f ? 0.0f : beta * delta, e = expf(-fabsf(u));
  float weight = 2.0f * ((u >= 0.0f ? 1.0f : e) / (1.0f + e));
  if (beta < 0.0f || delta != delta || u != u) weight = nan_value;
  if (a.surrogate) {
    if (weight < a.min_weight) weight = a.min_weight;
    return {weight * -logp, weight};
  }
  float softplus = (u < 0.0f ? 0.0f : u) + log1pf(e);
  float loss = beta == 0.0f ? delta : 2.0f * softplus / beta;
  return {beta < 0.0f ? nan_value : loss, weight};
}

}  // namespace dak::gpu
