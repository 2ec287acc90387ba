// token_logp on CUDA tensors: arguments in, one launch, nothing waits.
#include "cuda/tensors.h"

namespace dak {

using gpu::Call;
using gpu::f32;

std::tuple<Tensor, Tensor> token_logp_fwd(
    Tensor logits, Tensor target, int64_t ignore_index, double temperature, double softcap) {
  Call call("token_logp_fwd", "logits", logits, temperature, softcap);
  int64_t n = call.rows().rows;
  Tensor logp = call.new_f32({n}), norm = call.new_f32({n, 2});
  gpu::LogpArgs args{};
  args.r = call.rows();
  args.policy = call.logits();
  args.target = call.targets(target);
  args.ignore_index = ignore_index;
  args.logp = f32(logp), args.norm = f32(norm);
  call.run(args);
  return {logp, norm};
}

void token_logp_bwd(
    Tensor grad, Tensor logits, Tensor target, Tensor norm, int64_t ignore_index,
    double temperature, double softcap, Tensor out) {
  Call call("token_logp_bwd", "logits", logits, temperature, softcap);
  gpu::LogpGradArgs args{};
  args.r = call.rows();
  args.logits = call.logits();
  args.out = call.gradient(out);
  args.target = call.targets(target);
  args.grad = call.vector("grad", grad);
  args.norm = call.norms("norm", norm);
  args.ignore_index = ignore_index;
  call.run(args);
}

Tensor token_logp_fused(
    Tensor grad, Tensor logits, Tensor target, int64_t ignore_index, double temperature,
    double softcap, Tensor out) {
  Call call("token_logp_fused", "logits", logits, temperature, softcap);
  Tensor logp = call.new_f32({call.rows().rows});
  gpu::LogpArgs args{};
  args.r = call.rows();
  args.policy = call.logits();
  args.out = call.gradient(out);
  args.target = call.targets(target);
  args.grad = call.vector("grad", grad);
  args.ignore_index = ignore_index;
  args.logp = f32(logp);
  call.run(args);
  return logp;
}

}  // namespace dak
