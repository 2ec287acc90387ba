#include "cpu/tensors.h"

namespace dak {

std::tuple<Tensor, Tensor> token_logp_fwd(
    Tensor logits, Tensor target, int64_t ignore_index, double temperature, double softcap) {
  Logits x("logits", logits);
  Targets targets(target, x, ignore_index);
  Score score = score_of(temperature, softcap);
  Tensor logp = new_f32(logits, {x.rows()}), norm = new_f32(logits, {x.rows(), 2});
  float *logp_to = f32(logp), *norm_to = f32(norm);
  const Kernels& k = kernels();
  for_rows(x.rows(), x.columns(), [&](int64_t r) {
    LogpRow row{};
    auto kind = targets.kind(r);
    if (kind != Targets::ignored) {
      row = k.logp(x.row(r), kind == Targets::inside ? targets[r] : -1, score);
    }
    logp_to[r] = kind == Targets::outside ? __builtin_nanf("") : float(row.logp);
    put(norm_to, r, row.norm);
  });
  return {logp, norm};
}

void token_logp_bwd(
    Tensor grad, Tensor logits, Tensor target, Tensor norm, int64_t ignore_index,
    double temperature, double softcap, Tensor out) {
  Logits x("logits", logits);
  Targets targets(target, x, ignore_index);
  Score score = score_of(temperature, softcap);
  Vector upstream("grad", grad, x.rows());
  Norms norms("norm", norm, x.rows());
  Gradient gradient(out, x);
  const Kernels& k = kernels();
  for_rows(x.rows(), x.columns(), [&](int64_t r) {
    auto kind = targets.kind(r);
    if (kind == Targets::ignored) return gradient.fill(r, 0.0f);
    if (kind == Targets::outside || !finite(norms[r])) {
      return gradient.fill(r, __builtin_nanf(""));
    }
    k.logp_grad(x.row(r), targets[r], score, norms[r], upstream[r], gradient.row(r));
  });
}

Tensor token_logp_fused(
    Tensor grad, Tensor logits, Tensor target, int64_t ignore_index, double temperature,
    double softcap, Tensor out) {
  Logits x("logits", logits);
  Targets targets(target, x, ignore_index);
  Score score = score_of(temperature, softcap);
  Vector upstream("grad", grad, x.rows());
  Gradient gradient(out, x);
  Tensor logp = new_f32(logits, {x.rows()});
  float* logp_to = f32(logp);
  const Kernels& k = kernels();
  for_rows(x.rows(), x.columns(), [&](int64_t r) {
    auto kind = targets.kind(r);
    logp_to[r] = kind == Targets::ignored ? 0.0f : __builtin_nanf("");
    if (kind == Targets::ignored) return gradient.fill(r, 0.0f);
    if (kind == Targets::outside) return gradient.fill(r, __builtin_nanf(""));
    LogpRow row = k.logp(x.row(r), targets[r], score);
    logp_to[r] = float(row.logp);
    if (!finite(row.norm)) return gradient.fill(r, __builtin_nanf(""));
    k.logp_grad(x.row(r), targets[r], score, row.norm, upstream[r], gradient.row(r));
  });
  return logp;
}

}  // namespace dak
