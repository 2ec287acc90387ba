#include <torch/headeronly/util/Exception.h>

#include "cpu/tensors.h"

namespace dak {

void scale_grad(Tensor grad, Tensor factor) {
  STD_TORCH_CHECK(factor.is_cpu() && factor.numel() == 1, "factor: expected one CPU number");
  Logits x("grad", grad);
  Tensor factor_f32 = torch::stable::to(factor, ScalarType::Float);
  float by = *f32(factor_f32);
  if (by == 1.0f) return;
  const Kernels& k = kernels();
  for_rows(x.rows(), x.columns(), [&](int64_t r) { k.scale(x.row(r), by); });
}

}  // namespace dak
