#include <torch/headeronly/util/Exception.h>

#include <cmath>

#include "cpu/tensors.h"

namespace dak {
namespace {

void check_direction(int64_t direction, double js_beta) {
  STD_TORCH_CHECK(direction >= policy_ref && direction <= js, "direction: expected 0, 1 or 2");
  bool fits = direction != js || (js_beta > 0 && js_beta < 1);
  STD_TORCH_CHECK(fits, "js_beta: expected a number above 0 and below 1, got ", js_beta);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> token_kl_fwd(
    Tensor policy, Tensor ref, MaybeTensor valid, int64_t direction, double js_beta,
    double temperature, double softcap) {
  Logits q("policy", policy), p("ref", ref);
  p.must_match("ref", q);
  check_direction(direction, js_beta);
  Valid keep(valid, q.rows());
  Score score = score_of(temperature, softcap);
  int64_t n = q.rows();
  Tensor kl = new_f32(policy, {n}), center = new_f32(policy, {n});
  Tensor norm_q = new_f32(policy, {n, 2}), norm_p = new_f32(policy, {n, 2});
  float *kl_to = f32(kl), *center_to = f32(center), *q_to = f32(norm_q), *p_to = f32(norm_p);
  const Kernels& k = kernels();
  for_rows(n, q.columns(), [&](int64_t r) {
    KlRow row{};
    if (keep[r]) row = k.kl(q.row(r), p.row(r), direction, js_beta, score);
    kl_to[r] = row.kl;
    center_to[r] = row.center;
    put(q_to, r, row.policy);
    put(p_to, r, row.ref);
  });
  return {kl, norm_q, norm_p, center};
}

void token_kl_bwd(
    Tensor grad, Tensor policy, Tensor ref, MaybeTensor valid, Tensor norm_policy, Tensor norm_ref,
    Tensor center, int64_t direction, double js_beta, double temperature, double softcap,
    Tensor out) {
  Logits q("policy", policy), p("ref", ref);
  p.must_match("ref", q);
  check_direction(direction, js_beta);
  int64_t n = q.rows();
  Valid keep(valid, n);
  Score score = score_of(temperature, softcap);
  Vector upstream("grad", grad, n), centers("center", center, n);
  Norms norm_q("norm_policy", norm_policy, n), norm_p("norm_ref", norm_ref, n);
  Gradient gradient(out, q);
  const Kernels& k = kernels();
  for_rows(n, q.columns(), [&](int64_t r) {
    if (!keep[r]) return gradient.fill(r, 0.0f);
    KlGrad g{norm_q[r], norm_p[r], upstream[r], centers[r], direction, js_beta};
    if (!finite(g.policy) || !finite(g.ref) || !std::isfinite(g.center)) {
      return gradient.fill(r, __builtin_nanf(""));
    }
    k.kl_grad(q.row(r), p.row(r), g, score, gradient.row(r));
  });
}

std::tuple<Tensor, Tensor> token_js_parts(
    Tensor policy, Tensor ref, MaybeTensor valid, Tensor norm_policy, Tensor norm_ref,
    double js_beta, double temperature, double softcap) {
  Logits q("policy", policy), p("ref", ref);
  p.must_match("ref", q);
  check_direction(js, js_beta);
  int64_t n = q.rows();
  Valid keep(valid, n);
  Score score = score_of(temperature, softcap);
  Norms norm_q("norm_policy", norm_policy, n), norm_p("norm_ref", norm_ref, n);
  Tensor policy_part = new_f32(policy, {n}), ref_part = new_f32(policy, {n});
  float *q_to = f32(policy_part), *p_to = f32(ref_part);
  const Kernels& k = kernels();
  for_rows(n, q.columns(), [&](int64_t r) {
    JsParts parts{};
    if (keep[r]) parts = k.js_parts(q.row(r), p.row(r), norm_q[r], norm_p[r], js_beta, score);
    q_to[r] = parts.policy;
    p_to[r] = parts.ref;
  });
  return {policy_part, ref_part};
}

Tensor token_kl_fused(
    Tensor grad, Tensor policy, Tensor ref, MaybeTensor valid, int64_t direction, double js_beta,
    double temperature, double softcap, Tensor out) {
  Logits q("policy", policy), p("ref", ref);
  p.must_match("ref", q);
  check_direction(direction, js_beta);
  Valid keep(valid, q.rows());
  Score score = score_of(temperature, softcap);
  Vector upstream("grad", grad, q.rows());
  Gradient gradient(out, q);
  Tensor kl = new_f32(policy, {q.rows()});
  float* kl_to = f32(kl);
  const Kernels& k = kernels();
  for_rows(q.rows(), q.columns(), [&](int64_t r) {
    kl_to[r] = 0.0f;
    if (!keep[r]) return gradient.fill(r, 0.0f);
    KlRow row = k.kl(q.row(r), p.row(r), direction, js_beta, score);
    kl_to[r] = row.kl;
    if (!finite(row.policy) || !finite(row.ref) || !std::isfinite(row.center)) {
      return gradient.fill(r, __builtin_nanf(""));
    }
    KlGrad g{row.policy, row.ref, upstream[r], row.center, direction, js_beta};
    k.kl_grad(q.row(r), p.row(r), g, score, gradient.row(r));
  });
  return kl;
}

}  // namespace dak
