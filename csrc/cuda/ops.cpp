// The ops of ops.h on CUDA tensors: arguments in, one launch each, nothing waits.
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

Tensor token_stats_fwd(
    Tensor policy, Tensor ref, MaybeTensor target, MaybeTensor valid, int64_t ignore_index,
    double js_beta, double temperature, double softcap) {
  Call call("token_stats_fwd", "policy", policy, temperature, softcap);
  Tensor stats = call.new_f32({8, call.rows().rows});
  gpu::StatsArgs args{};
  args.r = call.rows();
  args.policy = call.logits();
  args.ref = call.matrix("ref", ref);
  if (target) args.target = call.targets(*target);
  args.valid = call.valid(valid);
  args.ignore_index = ignore_index;
  args.with_js = js_beta > 0;
  args.mix = gpu::mixture_of(js_beta);
  args.stats = f32(stats);
  call.run(args);
  return stats;
}

void scale_grad(Tensor grad, Tensor factor) {
  Call call("scale_grad", "grad", grad, 1.0, 0.0);
  gpu::ScaleArgs args{};
  args.r = call.rows();
  args.grad = call.logits();
  args.factor = call.number("factor", factor);
  call.run(args);
}

}  // namespace dak
