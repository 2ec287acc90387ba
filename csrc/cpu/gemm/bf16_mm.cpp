// out = a b, or out += a b: bf16 matrices, fp32 result. For the linear ops; torch has no such product
// on the CPU.
#include "cpu/gemm/bf16_gemm.h"

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "ops.h"

namespace dak {
namespace {

using torch::headeronly::ScalarType;

Bf16Matrix matrix(const char* name, const Tensor& x) {
  bool bf16 = x.is_cpu() && x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(bf16, name, ": expected a bf16 matrix on the CPU");
  bool dense = x.stride(0) == 1 || x.stride(1) == 1;
  STD_TORCH_CHECK(dense, name, ": expected a stride of 1 in one of the two dimensions");
  return {static_cast<const uint16_t*>(x.data_ptr()), x.stride(0), x.stride(1)};
}

}  // namespace

void bf16_mm(Tensor a, Tensor b, Tensor out, Tensor scratch, bool add) {
  Bf16Gemm g{a.size(0), b.size(1), a.size(1), matrix("a", a), matrix("b", b), nullptr, 0, add};
  bool fits = out.is_cpu() && out.dim() == 2 && out.scalar_type() == ScalarType::Float &&
              out.size(0) == g.m && out.size(1) == g.n && out.stride(1) == 1;
  STD_TORCH_CHECK(fits && b.size(0) == g.inner, "out: expected fp32 [", g.m, ", ", g.n, "]");
  STD_TORCH_CHECK(has_bf16_gemm(), "bf16_mm: this CPU has no AVX512-BF16");
  int64_t bytes = scratch.numel() * scratch.element_size();
  int64_t least = bf16_gemm_least(g);
  STD_TORCH_CHECK(bytes >= least, "scratch: expected ", least, " bytes or more, got ", bytes);
  g.out = static_cast<float*>(out.data_ptr());
  g.out_row = out.stride(0);
  bf16_gemm(g, static_cast<char*>(scratch.data_ptr()), bytes);
}

}  // namespace dak
