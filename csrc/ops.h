// The ops of namespace deepalign_native, in either library. Arguments, results and edge cases:
// deepalign_kernels/reference/<stem>.py. Gradients go to `out`, which may be the policy's logits.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace dak {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> token_logp_fwd(
    Tensor logits, Tensor target, int64_t ignore_index, double temperature, double softcap);
void token_logp_bwd(
    Tensor grad, Tensor logits, Tensor target, Tensor norm, int64_t ignore_index,
    double temperature, double softcap, Tensor out);
Tensor token_logp_fused(
    Tensor grad, Tensor logits, Tensor target, int64_t ignore_index, double temperature,
    double softcap, Tensor out);

std::tuple<Tensor, Tensor> token_entropy_fwd(
    Tensor logits, MaybeTensor valid, double temperature, double softcap);
void token_entropy_bwd(
    Tensor grad, Tensor logits, MaybeTensor valid, Tensor norm, Tensor entropy, double temperature,
    double softcap, Tensor out);

std::tuple<Tensor, Tensor, Tensor, Tensor> token_kl_fwd(
    Tensor policy, Tensor ref, MaybeTensor valid, int64_t direction, double js_beta,
    double temperature, double softcap);
void token_kl_bwd(
    Tensor grad, Tensor policy, Tensor ref, MaybeTensor valid, Tensor norm_policy, Tensor norm_ref,
    Tensor center, int64_t direction, double js_beta, double temperature, double softcap,
    Tensor out);
std::tuple<Tensor, Tensor> token_js_parts(
    Tensor policy, Tensor ref, MaybeTensor valid, Tensor norm_policy, Tensor norm_ref,
    double js_beta, double temperature, double softcap);
Tensor token_kl_fused(
    Tensor grad, Tensor policy, Tensor ref, MaybeTensor valid, int64_t direction, double js_beta,
    double temperature, double softcap, Tensor out);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> constrained_loss_fwd(
    Tensor policy, Tensor target, Tensor beta, MaybeTensor ref_logits, MaybeTensor ref_logp,
    int64_t ignore_index, bool surrogate, double min_weight, double temperature, double softcap);
std::tuple<Tensor, Tensor, Tensor, Tensor> constrained_loss_fused(
    Tensor policy, Tensor target, Tensor beta, MaybeTensor ref_logits, MaybeTensor ref_logp,
    Tensor scale, int64_t ignore_index, bool surrogate, double min_weight, double temperature,
    double softcap, Tensor out);

Tensor token_stats_fwd(
    Tensor policy, Tensor ref, MaybeTensor target, MaybeTensor valid, int64_t ignore_index,
    double js_beta, double temperature, double softcap);

void scale_grad(Tensor grad, Tensor factor);

// For tests: the kernels of instruction set 0 (portable), 1 (AVX2) or 2 (AVX-512) from here on; below
// 0 nothing changes. Returns the one that was in use.
int64_t use_isa(int64_t level);
void large_pages(Tensor fresh);
bool has_gemm();
bool mm(Tensor a, Tensor b, Tensor out, Tensor scratch, bool add);

}  // namespace dak
