// Schemas of the native ops and the functions behind them. The CPU library defines the schemas; the
// CUDA library, and a build of it that runs on the host for the tests, implement the same ones.
#pragma once

#include <torch/csrc/stable/library.h>

#include "ops.h"

namespace dak {

template <class Library>
void define(Library& m) {
  m.def(
      "token_logp_fwd(Tensor logits, Tensor target, int ignore_index, float temperature,"
      " float softcap) -> (Tensor logp, Tensor norm)");
  m.def(
      "token_logp_bwd(Tensor grad, Tensor logits, Tensor target, Tensor norm, int ignore_index,"
      " float temperature, float softcap, Tensor(a!) out) -> ()");
  m.def(
      "token_logp_fused(Tensor grad, Tensor logits, Tensor target, int ignore_index,"
      " float temperature, float softcap, Tensor(a!) out) -> Tensor");
  m.def(
      "token_kl_fwd(Tensor policy, Tensor ref, Tensor? valid, int direction, float js_beta,"
      " float temperature, float softcap)"
      " -> (Tensor kl, Tensor norm_policy, Tensor norm_ref, Tensor center)");
  m.def(
      "token_kl_bwd(Tensor grad, Tensor policy, Tensor ref, Tensor? valid, Tensor norm_policy,"
      " Tensor norm_ref, Tensor center, int direction, float js_beta, float temperature,"
      " float softcap, Tensor(a!) out) -> ()");
  m.def(
      "token_kl_fused(Tensor grad, Tensor policy, Tensor ref, Tensor? valid, int direction,"
      " float js_beta, float temperature, float softcap, Tensor(a!) out) -> Tensor");
  m.def(
      "constrained_loss_fwd(Tensor policy, Tensor target, Tensor beta, Tensor? ref_logits,"
      " Tensor? ref_logp, int ignore_index, bool surrogate, float min_weight, float temperature,"
      " float softcap)"
      " -> (Tensor loss, Tensor logp, Tensor ref_logp_out, Tensor weight, Tensor norm)");
  m.def(
      "constrained_loss_fused(Tensor policy, Tensor target, Tensor beta, Tensor? ref_logits,"
      " Tensor? ref_logp, Tensor scale, int ignore_index, bool surrogate, float min_weight,"
      " float temperature, float softcap, Tensor(a!) out)"
      " -> (Tensor loss, Tensor logp, Tensor ref_logp_out, Tensor weight)");
  m.def(
      "token_stats_fwd(Tensor policy, Tensor ref, Tensor? target, Tensor? valid, int ignore_index,"
      " float js_beta, float temperature, float softcap) -> Tensor");
  m.def("scale_grad(Tensor(a!) grad, Tensor factor) -> ()");
  m.def(
      "token_js_parts(Tensor policy, Tensor ref, Tensor? valid, Tensor norm_policy,"
      " Tensor norm_ref, float js_beta, float temperature, float softcap)"
      " -> (Tensor policy_part, Tensor ref_part)");
  // On the CPU alone.
  m.def(
      "token_entropy_fwd(Tensor logits, Tensor? valid, float temperature, float softcap)"
      " -> (Tensor entropy, Tensor norm)");
  m.def(
      "token_entropy_bwd(Tensor grad, Tensor logits, Tensor? valid, Tensor norm, Tensor entropy,"
      " float temperature, float softcap, Tensor(a!) out) -> ()");
  m.def("use_isa(int level) -> int");
  m.def("large_pages(Tensor fresh) -> ()");
  m.def("has_gemm() -> bool");
  m.def("mm(Tensor a, Tensor b, Tensor(a!) out, Tensor(b!) scratch, bool add) -> bool");
}

template <class Library>
void implement(Library& m) {
  m.impl("token_logp_fwd", TORCH_BOX(&token_logp_fwd));
  m.impl("token_logp_bwd", TORCH_BOX(&token_logp_bwd));
  m.impl("token_logp_fused", TORCH_BOX(&token_logp_fused));
  m.impl("token_kl_fwd", TORCH_BOX(&token_kl_fwd));
  m.impl("token_kl_bwd", TORCH_BOX(&token_kl_bwd));
  m.impl("token_kl_fused", TORCH_BOX(&token_kl_fused));
  m.impl("token_js_parts", TORCH_BOX(&token_js_parts));
  m.impl("constrained_loss_fwd", TORCH_BOX(&constrained_loss_fwd));
  m.impl("constrained_loss_fused", TORCH_BOX(&constrained_loss_fused));
  m.impl("token_stats_fwd", TORCH_BOX(&token_stats_fwd));
  m.impl("scale_grad", TORCH_BOX(&scale_grad));
}

}  // namespace dak
