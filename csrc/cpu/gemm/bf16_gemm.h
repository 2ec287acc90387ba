// Products of bf16 matrices with an fp32 result.
#pragma once

#include <cstdint>

namespace dak {

// Element [i, j] is data[i * row + j * column]; one of the two strides is 1.
struct Bf16Matrix {
  const uint16_t* data;
  int64_t row, column;
};

struct Bf16Gemm {
  int64_t m, n, inner;
  Bf16Matrix a, b;  // [m, inner] and [inner, n]
  float* out;       // [m, n], `out_row` apart
  int64_t out_row;
  bool add;  // out += a b, instead of =
};

// Whether this CPU, and the compiler of this library, can (AVX512-BF16).
bool has_bf16_gemm();

// out = a b. It takes up to 4 KB of `shared` per row of the smaller of a and b; less only makes it
// slower, down to bf16_gemm_least.
int64_t bf16_gemm_least(const Bf16Gemm& g);
void bf16_gemm(const Bf16Gemm& g, char* shared, int64_t shared_bytes);

}  // namespace dak
