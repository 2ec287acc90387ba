// fp16 numbers through the compiler's own; see cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half h) { return h.bits; }
inline float __half2float(__half h) {
  _Float16 x;
  std::memcpy(&x, &h, 2);
  return float(x);
}
inline __half __float2half_rn(float f) {
  _Float16 x = _Float16(f);
  __half h;
  std::memcpy(&h, &x, 2);
  return h;
}
inline __half2 __floats2half2_rn(float a, float b) {
  return {__float2half_rn(a), __float2half_rn(b)};
}
inline __half2 __hmax2(__half2 a, __half2 b) {
  auto larger = [](__half p, __half q) {
    return __float2half_rn(fmaxf(__half2float(p), __half2float(q)));
  };
  return {larger(a.x, b.x), larger(a.y, b.y)};
}
