// exp2 and log2 in one instruction each. PTX ISA: ex2 within 2^-22 of the result, 0 at -inf, denormal
// results 0; lg2 within 2^-22 absolute for arguments in (0.5, 2), else within 2^-22 of the result.
// tests/support/cuda_on_host has its own, with errors as large as these.
#pragma once

namespace dak::gpu {

__device__ inline float exp2_fast(float t) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(t));
  return y;
}
__device__ inline float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace dak::gpu
