// Schemas and registrations of namespace deepalign_native, and nothing else. The CUDA library
// registers its kernels against the same schemas.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(deepalign_native, m) {
  m.def(
      "token_logp_fwd(Tensor logits, Tensor target, int ignore_index, float temperature,"
      " float softcap) -> (Tensor logp, Tensor norm)");
  m.def(
      "token_logp_bwd(Tensor grad, Tensor logits, Tensor target, Tensor norm, int ignore_index,"
      " float temperature, float softcap, Tensor(a!) out) -> ()");
  m.def(
      "token_kl_fwd(Tensor policy, Tensor ref, Tensor? valid, int direction, float js_beta,"
      " float temperature, float softcap)"
      " -> (Tensor kl, Tensor norm_policy, Tensor norm_ref, Tensor center)");
  m.def(
      "token_kl_bwd(Tensor grad, Tensor policy, Tensor ref, Tensor? valid, Tensor norm_policy,"
      " Tensor norm_ref, Tensor center, int direction, float js_beta, float temperature,"
      " float softcap, Tensor(a!) out) -> ()");
  m.def(
      "token_js_parts(Tensor policy, Tensor ref, Tensor? valid, Tensor norm_policy,"
      " Tensor norm_ref, float js_beta, float temperature, float softcap)"
      " -> (Tensor policy_part, Tensor ref_part)");
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
  m.def("has_bf16_gemm() -> bool");
  m.def("bf16_mm(Tensor a, Tensor b, Tensor(a!) out, Tensor(b!) scratch, bool add) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deepalign_native, CPU, m) {
  m.impl("token_logp_fwd", TORCH_BOX(&dak::token_logp_fwd));
  m.impl("token_logp_bwd", TORCH_BOX(&dak::token_logp_bwd));
  m.impl("token_kl_fwd", TORCH_BOX(&dak::token_kl_fwd));
  m.impl("token_kl_bwd", TORCH_BOX(&dak::token_kl_bwd));
  m.impl("token_js_parts", TORCH_BOX(&dak::token_js_parts));
  m.impl("constrained_loss_fwd", TORCH_BOX(&dak::constrained_loss_fwd));
  m.impl("constrained_loss_fused", TORCH_BOX(&dak::constrained_loss_fused));
  m.impl("token_stats_fwd", TORCH_BOX(&dak::token_stats_fwd));
  m.impl("scale_grad", TORCH_BOX(&dak::scale_grad));
  m.impl("bf16_mm", TORCH_BOX(&dak::bf16_mm));
}

STABLE_TORCH_LIBRARY_IMPL(deepalign_native, CompositeExplicitAutograd, m) {
  m.impl("has_bf16_gemm", TORCH_BOX(&dak::has_bf16_gemm));
}
