// out = a b, or out += a b: fp32, bf16 and fp16 in any mixture, for the linear ops. Torch's products on
// the CPU have operands and result of one type.
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/gemm/gemm.h"
#include "cpu/tensors.h"
#include "ops.h"

namespace dak {
namespace {

Matrix matrix(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2, name, ": expected a matrix on the CPU");
  return {x.data_ptr(), type_of(name, x), x.stride(0), x.stride(1)};
}

}  // namespace

// Portable code has no fma: there torch's own fp32 product of converted operands is faster.
bool has_gemm() { return runs_avx2(); }

bool mm(Tensor a, Tensor b, Tensor out, Tensor scratch, bool add) {
  Matrix left = matrix("a", a), right = matrix("b", b), into = matrix("out", out);
  int64_t m = a.size(0), n = b.size(1), inner = a.size(1);
  Gemm g{m, n, inner, left, right, out.data_ptr(), into.type, into.row, add};
  STD_TORCH_CHECK(b.size(0) == inner, "b: expected ", inner, " rows, got ", b.size(0));
  bool fits = out.size(0) == m && out.size(1) == n && (into.column == 1 || n == 1);
  STD_TORCH_CHECK(fits, "out: expected [", m, ", ", n, "], neighbours in a row side by side");
  return gemm(g, scratch.data_ptr(), scratch.numel() * scratch.element_size());
}

}  // namespace dak
