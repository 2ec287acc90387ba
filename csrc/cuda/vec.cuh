// 16 bytes of logits at a time: from memory to floats and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/kernels.h"

namespace dak::gpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class A, class B>
inline constexpr bool same = false;
template <class A>
inline constexpr bool same<A, A> = true;

template <class T>
inline constexpr int vec = chunk_bytes / int(sizeof(T));

inline constexpr float inf = __builtin_huge_valf(), nan_value = __builtin_nanf("");

template <class T>
__device__ inline uint32_t minus_inf_bits() {
  if constexpr (same<T, float>) return 0xff800000u;
  if constexpr (same<T, bf16>) return 0xff80u;
  return 0xfc00u;
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ inline float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
__device__ inline T from_float(float x) {
  if constexpr (same<T, float>) return x;
  if constexpr (same<T, bf16>) return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  if constexpr (same<T, f16>) return {__half_as_ushort(__float2half_rn(x))};
}

template <class T>
__device__ inline void unpack(uint4 chunk, float (&x)[vec<T>]) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (same<T, float>) {
      x[i] = __uint_as_float(words[i]);
    } else if constexpr (same<T, bf16>) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else {
      x[2 * i] = __half2float(__ushort_as_half(uint16_t(words[i])));
      x[2 * i + 1] = __half2float(__ushort_as_half(uint16_t(words[i] >> 16)));
    }
  }
}

template <class T>
__device__ inline uint32_t pack2(float low, float high) {
  uint32_t word;  // in one conversion
  if constexpr (same<T, bf16>) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, 4);
  } else {
    __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, 4);
  }
  return word;
}

// The larger halves of two pairs, on 16-bit numbers as they are: half the work of floats.
template <class T>
__device__ inline uint32_t max2(uint32_t a, uint32_t b) {
  if constexpr (same<T, bf16>) {
    __nv_bfloat162 x, y;
    memcpy(&x, &a, 4), memcpy(&y, &b, 4);
    x = __hmax2(x, y);
    memcpy(&a, &x, 4);
  } else {
    __half2 x, y;
    memcpy(&x, &a, 4), memcpy(&y, &b, 4);
    x = __hmax2(x, y);
    memcpy(&a, &x, 4);
  }
  return a;
}

// The larger of two chunks' numbers, place by place, NaN left out.
template <class T>
__device__ inline uint4 larger(uint4 a, uint4 b) {
  auto one = [](uint32_t x, uint32_t y) {
    if constexpr (same<T, float>) {
      return __float_as_uint(fmaxf(__uint_as_float(x), __uint_as_float(y)));
    } else {
      return max2<T>(x, y);
    }
  };
  return make_uint4(one(a.x, b.x), one(a.y, b.y), one(a.z, b.z), one(a.w, b.w));
}
template <class T>
__device__ inline uint4 chunk_of_minus_inf() {
  uint32_t x = minus_inf_bits<T>(), word = same<T, float> ? x : x << 16 | x;
  return make_uint4(word, word, word, word);
}

// The largest of a chunk, NaN left out; -inf if nothing else is there.
template <class T>
__device__ inline float chunk_max(uint4 chunk) {
  if constexpr (same<T, float>) {
    float a = fmaxf(__uint_as_float(chunk.x), __uint_as_float(chunk.y));
    return fmaxf(-inf, fmaxf(a, fmaxf(__uint_as_float(chunk.z), __uint_as_float(chunk.w))));
  } else {
    uint32_t top = max2<T>(max2<T>(chunk.x, chunk.y), max2<T>(chunk.z, chunk.w));
    float low = to_float(T{uint16_t(top)}), high = to_float(T{uint16_t(top >> 16)});
    return fmaxf(-inf, fmaxf(low, high));
  }
}

// Writes g[k] to columns [column, column + vec<T>) of `row`, those that the row has. `aligned`: the
// whole chunk lies on the boundary that one store of it needs.
template <class T, class O>
__device__ inline void store_chunk(O* row, int column, int columns, bool aligned,
                                   const float (&g)[vec<T>]) {
  constexpr int n = vec<T>;
  if (aligned && column >= 0 && column + n <= columns) {
    if constexpr (same<O, float>) {
      __stcs(reinterpret_cast<float4*>(row + column), make_float4(g[0], g[1], g[2], g[3]));
    } else if constexpr (n == 4) {
      __stcs(reinterpret_cast<uint2*>(row + column),
             make_uint2(pack2<O>(g[0], g[1]), pack2<O>(g[2], g[3])));
    } else {
      uint4 chunk = make_uint4(pack2<O>(g[0], g[1]), pack2<O>(g[2], g[3]), pack2<O>(g[4], g[5]),
                               pack2<O>(g[6], g[7]));
      __stcs(reinterpret_cast<uint4*>(row + column), chunk);
    }
  } else {
#pragma unroll
    for (int k = 0; k < n; k++) {
      if (unsigned(column + k) < unsigned(columns)) row[column + k] = from_float<O>(g[k]);
    }
  }
}

// One row of the gradient; 16-bit also for fp32 logits.
template <class T>
struct OutRow {
  char* data;
  Type type;
  bool aligned;
  int columns;

  __device__ OutRow(const Matrix& m, int64_t batch, int64_t token, int lead, int columns)
      : type(m.type), columns(columns) {
    int size = type == Type::f32 ? 4 : 2;
    data = static_cast<char*>(m.data) + (batch * m.batch_stride + token * m.row_stride) * size;
    // Column v is at v + lead of the chunks, which are vec<T> columns wide.
    uintptr_t start = reinterpret_cast<uintptr_t>(data) - uintptr_t(lead) * unsigned(size);
    aligned = start % unsigned(vec<T> * size) == 0;
  }
  __device__ void store(int column, const float (&g)[vec<T>]) const {
    if constexpr (same<T, float>) {
      if (type == Type::f32) {
        store_chunk<T>(reinterpret_cast<float*>(data), column, columns, aligned, g);
      } else if (type == Type::bf16) {
        store_chunk<T>(reinterpret_cast<bf16*>(data), column, columns, aligned, g);
      } else {
        store_chunk<T>(reinterpret_cast<f16*>(data), column, columns, aligned, g);
      }
    } else {
      store_chunk<T>(reinterpret_cast<T*>(data), column, columns, aligned, g);
    }
  }
};

}  // namespace dak::gpu
