// In the place of csrc/cuda/approx.cuh: a pseudorandom error up to the largest that PTX allows, the
// same for the same argument; denormal results are 0.
#pragma once

#include <cmath>

#include "cuda_runtime.h"

namespace dak::gpu {

// A number in [-1, 1]; 0 for the arguments that the hardware gets exactly right.
inline double error_at(float x, bool exact) {
  uint32_t h = __float_as_uint(x) * 2654435761u;
  h = (h ^ (h >> 15)) * 2246822519u;
  return exact ? 0.0 : double(int32_t(h ^ (h >> 13))) / 2147483648.0;
}

inline float exp2_fast(float t) {
  double y = std::exp2(double(t));
  if (y < 0x1p-126) return 0.0f;  // NaN stays
  return float(y * (1.0 + 0x1p-22 * error_at(t, t == std::floor(t))));
}
inline float log2_fast(float x) {
  if (!(x >= 0x1p-126f)) return x == x ? -HUGE_VALF : x;  // no negative arguments here
  double y = std::log2(double(x)), size = x > 0.5f && x < 2.0f ? 1.0 : std::fabs(y);
  return float(y + 0x1p-22 * size * error_at(x, y == std::floor(y)));
}

}  // namespace dak::gpu
