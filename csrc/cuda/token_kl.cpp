// token_kl on CUDA tensors: arguments in, one launch, nothing waits.
#include "cuda/tensors.h"

namespace dak {
namespace {

using gpu::Call;
using gpu::f32;

void check_direction(int64_t direction, double js_beta) {
  STD_TORCH_CHECK(direction >= gpu::policy_ref && direction <= gpu::js,
                  "direction: expected 0, 1 or 2");
  bool fits = direction != gpu::js || (js_beta > 0 && js_beta < 1);
  STD_TORCH_CHECK(fits, "js_beta: expected a number above 0 and below 1, got ", js_beta);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> token_kl_fwd(
    Tensor policy, Tensor ref, MaybeTensor valid, int64_t direction, double js_beta,
    double temperature, double softcap) {
  check_direction(direction, js_beta);
  Call call("token_kl_fwd", "policy", policy, temperature, softcap);
  int64_t n = call.rows().rows;
  Tensor kl = call.new_f32({n}), center = call.new_f32({n});
  Tensor norm_policy = call.new_f32({n, 2}), norm_ref = call.new_f32({n, 2});
  gpu::KlArgs args{};
  args.r = call.rows();
  args.policy = call.logits();
  args.ref = call.matrix("ref", ref);
  args.valid = call.valid(valid);
  args.direction = int(direction);
  args.mix = gpu::mixture_of(js_beta);
  args.kl = f32(kl), args.center = f32(center);
  args.norm_policy = f32(norm_policy), args.norm_ref = f32(norm_ref);
  call.run(args);
  return {kl, norm_policy, norm_ref, center};
}

void token_kl_bwd(
    Tensor grad, Tensor policy, Tensor ref, MaybeTensor valid, Tensor norm_policy, Tensor norm_ref,
    Tensor center, int64_t direction, double js_beta, double temperature, double softcap,
    Tensor out) {
  check_direction(direction, js_beta);
  Call call("token_kl_bwd", "policy", policy, temperature, softcap);
  gpu::KlGradArgs args{};
  args.r = call.rows();
  args.policy = call.logits();
  args.ref = call.matrix("ref", ref);
  args.out = call.gradient(out);
  args.valid = call.valid(valid);
  args.grad = call.vector("grad", grad);
  args.norm_policy = call.norms("norm_policy", norm_policy);
  args.norm_ref = call.norms("norm_ref", norm_ref);
  args.center = call.vector("center", center);
  args.direction = int(direction);
  args.mix = gpu::mixture_of(js_beta);
  call.run(args);
}

std::tuple<Tensor, Tensor> token_js_parts(
    Tensor policy, Tensor ref, MaybeTensor valid, Tensor norm_policy, Tensor norm_ref,
    double js_beta, double temperature, double softcap) {
  check_direction(gpu::js, js_beta);
  Call call("token_js_parts", "policy", policy, temperature, softcap);
  int64_t n = call.rows().rows;
  Tensor policy_part = call.new_f32({n}), ref_part = call.new_f32({n});
  gpu::JsPartsArgs args{};
  args.r = call.rows();
  args.policy = call.logits();
  args.ref = call.matrix("ref", ref);
  args.valid = call.valid(valid);
  args.norm_policy = call.norms("norm_policy", norm_policy);
  args.norm_ref = call.norms("norm_ref", norm_ref);
  args.mix = gpu::mixture_of(js_beta);
  args.policy_part = f32(policy_part), args.ref_part = f32(ref_part);
  call.run(args);
  return {policy_part, ref_part};
}

Tensor token_kl_fused(
    Tensor grad, Tensor policy, Tensor ref, MaybeTensor valid, int64_t direction, double js_beta,
    double temperature, double softcap, Tensor out) {
  check_direction(direction, js_beta);
  Call call("token_kl_fused", "policy", policy, temperature, softcap);
  Tensor kl = call.new_f32({call.rows().rows});
  gpu::KlArgs args{};
  args.r = call.rows();
  args.policy = call.logits();
  args.ref = call.matrix("ref", ref);
  args.out = call.gradient(out);
  args.valid = call.valid(valid);
  args.grad = call.vector("grad", grad);
  args.direction = int(direction);
  args.mix = gpu::mixture_of(js_beta);
  args.kl = f32(kl);
  call.run(args);
  return kl;
}

}  // namespace dak
