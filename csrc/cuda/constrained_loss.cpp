// constrained_loss on CUDA tensors: arguments in, one launch, nothing waits.
#include "cuda/tensors.h"

namespace dak {
namespace {

using gpu::Call;
using gpu::f32;

struct Loss {
  Tensor loss, logp, ref_logp, weight;
};

// What both forms of constrained_loss have in common.
Loss loss_args(Call& call, gpu::LogpArgs& args, const Tensor& target, const Tensor& beta,
               const MaybeTensor& ref_logits, const MaybeTensor& ref_logp, int64_t ignore_index,
               bool surrogate, double min_weight) {
  bool one = ref_logits.has_value() != ref_logp.has_value();
  STD_TORCH_CHECK(one, "ref_logits, ref_logp: expected exactly one of the two");
  args.r = call.rows();
  args.policy = call.logits();
  if (ref_logits) args.ref = call.matrix("ref_logits", *ref_logits);
  if (ref_logp) args.given = call.vector("ref_logp", *ref_logp);
  args.target = call.targets(target);
  args.beta = call.vector("beta", beta);
  args.ignore_index = ignore_index;
  args.surrogate = surrogate;
  args.min_weight = float(min_weight);
  int64_t n = args.r.rows;
  Loss loss{call.new_f32({n}), call.new_f32({n}), call.new_f32({n}), call.new_f32({n})};
  args.loss = f32(loss.loss), args.logp = f32(loss.logp);
  args.ref_logp = f32(loss.ref_logp), args.weight = f32(loss.weight);
  return loss;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> constrained_loss_fwd(
    Tensor policy, Tensor target, Tensor beta, MaybeTensor ref_logits, MaybeTensor ref_logp,
    int64_t ignore_index, bool surrogate, double min_weight, double temperature, double softcap) {
  Call call("constrained_loss_fwd", "policy", policy, temperature, softcap);
  gpu::LogpArgs args{};
  Loss loss = loss_args(call, args, target, beta, ref_logits, ref_logp, ignore_index, surrogate,
                        min_weight);
  Tensor norm = call.new_f32({args.r.rows, 2});
  args.norm = f32(norm);
  call.run(args);
  return {loss.loss, loss.logp, loss.ref_logp, loss.weight, norm};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> constrained_loss_fused(
    Tensor policy, Tensor target, Tensor beta, MaybeTensor ref_logits, MaybeTensor ref_logp,
    Tensor scale, int64_t ignore_index, bool surrogate, double min_weight, double temperature,
    double softcap, Tensor out) {
  Call call("constrained_loss_fused", "policy", policy, temperature, softcap);
  gpu::LogpArgs args{};
  Loss loss = loss_args(call, args, target, beta, ref_logits, ref_logp, ignore_index, surrogate,
                        min_weight);
  args.scale = call.number("scale", scale);
  args.out = call.gradient(out);
  call.run(args);
  return {loss.loss, loss.logp, loss.ref_logp, loss.weight};
}

}  // namespace dak
