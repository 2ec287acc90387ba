#include "cpu/tensors.h"

namespace dak {

std::tuple<Tensor, Tensor> token_entropy_fwd(
    Tensor logits, MaybeTensor valid, double temperature, double softcap) {
  Logits x("logits", logits);
  Valid keep(valid, x.rows());
  Score score = score_of(temperature, softcap);
  Tensor entropy = new_f32(logits, {x.rows()}), norm = new_f32(logits, {x.rows(), 2});
  float *entropy_to = f32(entropy), *norm_to = f32(norm);
  const Kernels& k = kernels();
  for_rows(x.rows(), x.columns(), [&](int64_t r) {
    EntropyRow row = keep[r] ? k.entropy(x.row(r), score) : EntropyRow{};
    entropy_to[r] = row.entropy;
    put(norm_to, r, row.norm);
  });
  return {entropy, norm};
}

void token_entropy_bwd(
    Tensor grad, Tensor logits, MaybeTensor valid, Tensor norm, Tensor entropy, double temperature,
    double softcap, Tensor out) {
  Logits x("logits", logits);
  Valid keep(valid, x.rows());
  Score score = score_of(temperature, softcap);
  Vector upstream("grad", grad, x.rows()), value("entropy", entropy, x.rows());
  Norms norms("norm", norm, x.rows());
  Gradient gradient(out, x);
  const Kernels& k = kernels();
  for_rows(x.rows(), x.columns(), [&](int64_t r) {
    if (!keep[r]) return gradient.fill(r, 0.0f);
    if (!finite(norms[r])) return gradient.fill(r, __builtin_nanf(""));
    k.entropy_grad(x.row(r), score, norms[r], value[r], upstream[r], gradient.row(r));
  });
}

}  // namespace dak
