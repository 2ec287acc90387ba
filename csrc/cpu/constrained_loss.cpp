#include <torch/headeronly/util/Exception.h>

#include <cmath>

#include "cpu/tensors.h"

namespace dak {
namespace {

constexpr float nan = __builtin_nanf("");

struct TokenLoss {
  float loss, weight;
};

// token_loss of the reference, in double.
TokenLoss token_loss(double logp, double ref_logp, double beta, bool surrogate, double floor) {
  if (std::isnan(logp) || std::isnan(ref_logp) || !(beta >= 0)) return {nan, nan};
  double delta = logp == ref_logp ? 0.0 : ref_logp - logp;
  double u = beta == 0 ? 0.0 : beta * delta;
  double weight = 2.0 / (1.0 + std::exp(-u));
  if (surrogate) {
    if (weight < floor) weight = floor;
    return {float(weight * -logp), float(weight)};
  }
  double softplus = (u > 0 ? u : 0.0) + std::log1p(std::exp(-std::fabs(u)));
  return {float(beta == 0 ? delta : 2.0 * softplus / beta), float(weight)};
}

// What both ops do with one row up to its weight.
class LossRows {
 public:
  LossRows(const Tensor& policy, const Tensor& target, const Tensor& beta,
           const MaybeTensor& ref_logits, const MaybeTensor& ref_logp, int64_t ignore_index,
           bool surrogate, double min_weight, Score score)
      : x("policy", policy),
        targets(target, x, ignore_index),
        beta_("beta", beta, x.rows()),
        surrogate_(surrogate),
        floor_(min_weight),
        score(score) {
    bool one = ref_logits.has_value() != ref_logp.has_value();
    STD_TORCH_CHECK(one, "ref_logits, ref_logp: expected exactly one of the two");
    if (ref_logits) ref_.emplace("ref_logits", *ref_logits).must_match("ref_logits", x);
    if (ref_logp) given_.emplace("ref_logp", *ref_logp, x.rows());
    int64_t n = x.rows();
    loss = new_f32(policy, {n}), logp = new_f32(policy, {n});
    ref_logp_out = new_f32(policy, {n}), weight = new_f32(policy, {n});
    loss_ = f32(loss), logp_ = f32(logp), ref_logp_ = f32(ref_logp_out), weight_ = f32(weight);
  }

  // The reference first, so that the policy's row is the one left in the cache.
  LogpRow forward(int64_t r) const {
    auto kind = targets.kind(r);
    LogpRow row{};
    TokenLoss token{};
    double ref_logp = 0.0;
    if (kind != Targets::ignored) {
      int64_t y = kind == Targets::inside ? targets[r] : -1;
      if (given_) {
        ref_logp = (*given_)[r];
      } else {
        ref_logp = y < 0 ? nan : k.logp(ref_->row(r), y, score).logp;
      }
      row = k.logp(x.row(r), y, score);
      if (y < 0) row.logp = nan;
      token = token_loss(row.logp, ref_logp, beta_[r], surrogate_, floor_);
    }
    loss_[r] = token.loss;
    weight_[r] = token.weight;
    logp_[r] = float(row.logp);
    ref_logp_[r] = float(ref_logp);
    return row;
  }
  float weight_of(int64_t r) const { return weight_[r]; }

  Logits x;
  Targets targets;
  const Kernels& k = kernels();

 private:
  Vector beta_;
  bool surrogate_;
  double floor_;
  std::optional<Logits> ref_;
  std::optional<Vector> given_;
  float *loss_, *logp_, *ref_logp_, *weight_;

 public:
  Score score;
  Tensor loss, logp, ref_logp_out, weight;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> constrained_loss_fwd(
    Tensor policy, Tensor target, Tensor beta, MaybeTensor ref_logits, MaybeTensor ref_logp,
    int64_t ignore_index, bool surrogate, double min_weight, double temperature, double softcap) {
  LossRows rows(policy, target, beta, ref_logits, ref_logp, ignore_index, surrogate, min_weight,
                score_of(temperature, softcap));
  Tensor norm = new_f32(policy, {rows.x.rows(), 2});
  float* norm_to = f32(norm);
  for_rows(rows.x.rows(), rows.x.columns(),
           [&](int64_t r) { put(norm_to, r, rows.forward(r).norm); });
  return {rows.loss, rows.logp, rows.ref_logp_out, rows.weight, norm};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> constrained_loss_fused(
    Tensor policy, Tensor target, Tensor beta, MaybeTensor ref_logits, MaybeTensor ref_logp,
    Tensor scale, int64_t ignore_index, bool surrogate, double min_weight, double temperature,
    double softcap, Tensor out) {
  LossRows rows(policy, target, beta, ref_logits, ref_logp, ignore_index, surrogate, min_weight,
                score_of(temperature, softcap));
  STD_TORCH_CHECK(scale.is_cpu() && scale.numel() == 1, "scale: expected one number on the CPU");
  Tensor scale_f32 = torch::stable::to(scale, ScalarType::Float);
  double factor = *f32(scale_f32);
  Gradient gradient(out, rows.x);
  for_rows(rows.x.rows(), rows.x.columns(), [&](int64_t r) {
    LogpRow row = rows.forward(r);
    auto kind = rows.targets.kind(r);
    if (kind == Targets::ignored) return gradient.fill(r, 0.0f);
    if (kind == Targets::outside || !finite(row.norm)) return gradient.fill(r, nan);
    double grad = -factor * double(rows.weight_of(r));
    rows.k.logp_grad(rows.x.row(r), rows.targets[r], rows.score, row.norm, grad, gradient.row(r));
  });
  return {rows.loss, rows.logp, rows.ref_logp_out, rows.weight};
}

}  // namespace dak
