// scale_grad on CUDA tensors: arguments in, one launch, nothing waits.
#include "cuda/tensors.h"

namespace dak {

using gpu::Call;

void scale_grad(Tensor grad, Tensor factor) {
  Call call("scale_grad", "grad", grad, 1.0, 0.0);
  gpu::ScaleArgs args{};
  args.r = call.rows();
  args.grad = call.logits();
  args.factor = call.number("factor", factor);
  call.run(args);
}

}  // namespace dak
