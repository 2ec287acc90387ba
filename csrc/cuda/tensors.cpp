#include "cuda/tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cmath>

namespace dak::gpu {
namespace {

Type type_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Type::f32;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::f16;
    default:
      STD_TORCH_CHECK(false, name, ": expected bf16, fp16 or fp32");
  }
}

void split(double x, float& hi, float& lo) {
  hi = float(x);
  lo = float(x - double(hi));
}

Score score_of(double temperature, double softcap) {
  STD_TORCH_CHECK(temperature > 0, "temperature: expected a number > 0, got ", temperature);
  Score score{};
  score.exponent = float(1.4426950408889634 / temperature);
  split(1.0 / temperature, score.inverse_hi, score.inverse_lo);
  split(temperature, score.temperature_hi, score.temperature_lo);
  if (softcap > 0) {
    score.cap = float(softcap);
    // hi strictly below, so that both are positive: x = -inf stays an infinity in x * (hi + lo).
    score.per_cap_hi = std::nextafter(float(1.0 / softcap), 0.0f);
    score.per_cap_lo = float(1.0 / softcap - double(score.per_cap_hi));
  }
  return score;
}

}  // namespace

Call::Call(const char* op, const char* name, const Tensor& logits, double temperature,
           double softcap)
    : op_(op), like_(logits), guard_(logits.get_device_index()) {
  STD_TORCH_CHECK(logits.dim() == 3, name, ": expected [B, T, V], got ", logits.dim(),
                  " dimensions");
  int64_t columns = logits.size(2);
  STD_TORCH_CHECK(columns >= 1 && columns < (int64_t(1) << 30), name,
                  ": expected 1 to 2^30 - 1 vocabulary columns, got ", columns);
  rows_.rows = logits.size(0) * logits.size(1);
  rows_.tokens = logits.size(1);
  rows_.columns = int(columns);
  rows_.score = score_of(temperature, softcap);
  logits_ = any_matrix(name, logits);
}

const Tensor& Call::here(const char* name, const Tensor& x) const {
  bool same = x.is_cuda() == like_.is_cuda() && x.get_device_index() == like_.get_device_index();
  STD_TORCH_CHECK(same, name, ": expected a tensor on the device of the logits");
  return x;
}

const Tensor& Call::keep(const Tensor& x) {
  kept_.push_back(x);
  return kept_.back();
}

Matrix Call::any_matrix(const char* name, const Tensor& x) const {
  here(name, x);
  bool shape = x.dim() == 3;
  for (int d = 0; d < 3 && shape; d++) shape = x.size(d) == like_.size(d);
  STD_TORCH_CHECK(shape, name, ": expected the shape of the policy's logits");
  STD_TORCH_CHECK(x.size(2) == 1 || x.stride(2) == 1, name, ": expected last stride 1");
  return {x.data_ptr(), type_of(name, x), x.stride(0), x.stride(1)};
}

Matrix Call::matrix(const char* name, const Tensor& x) const {
  Matrix m = any_matrix(name, x);
  STD_TORCH_CHECK(m.type == logits_.type, name, ": expected the dtype of the policy");
  return m;
}

Matrix Call::gradient(const Tensor& out) const {
  Matrix m = any_matrix("out", out);
  bool fits = m.type == logits_.type || logits_.type == Type::f32;
  STD_TORCH_CHECK(fits, "out: expected the dtype of the logits, or any for fp32 logits");
  return m;
}

Vector Call::vector(const char* name, const Tensor& x) {
  bool shape = here(name, x).dim() == 1 && x.size(0) == rows_.rows;
  STD_TORCH_CHECK(shape, name, ": expected shape [", rows_.rows, "]");
  bool f32 = x.scalar_type() == ScalarType::Float;
  const Tensor& as_f32 = f32 ? x : keep(torch::stable::to(x, ScalarType::Float));
  return {static_cast<const float*>(as_f32.data_ptr()), as_f32.stride(0)};
}

const float* Call::norms(const char* name, const Tensor& x) const {
  bool fits = here(name, x).scalar_type() == ScalarType::Float && x.dim() == 2 &&
              x.size(0) == rows_.rows && x.size(1) == 2 && x.is_contiguous();
  STD_TORCH_CHECK(fits, name, ": expected contiguous fp32 [", rows_.rows, ", 2]");
  return static_cast<const float*>(x.data_ptr());
}

const float* Call::number(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(here(name, x).numel() == 1, name, ": expected one number");
  bool f32 = x.scalar_type() == ScalarType::Float;
  const Tensor& as_f32 = f32 ? x : keep(torch::stable::to(x, ScalarType::Float));
  return static_cast<const float*>(as_f32.data_ptr());
}

const int64_t* Call::targets(const Tensor& target) {
  bool shape = here("target", target).dim() == 1 && target.size(0) == rows_.rows;
  STD_TORCH_CHECK(shape && target.scalar_type() == ScalarType::Long && target.is_contiguous(),
                  "target: expected contiguous int64 [", rows_.rows, "]");
  return static_cast<const int64_t*>(target.data_ptr());
}

const bool* Call::valid(const MaybeTensor& valid) {
  if (!valid) return nullptr;
  bool shape = here("valid", *valid).dim() == 1 && valid->size(0) == rows_.rows;
  STD_TORCH_CHECK(shape && valid->scalar_type() == ScalarType::Bool && valid->is_contiguous(),
                  "valid: expected contiguous bool [", rows_.rows, "]");
  return static_cast<const bool*>(valid->data_ptr());
}

Tensor Call::new_f32(std::initializer_list<int64_t> shape) const {
  torch::headeronly::IntHeaderOnlyArrayRef sizes(shape.begin(), shape.size());
  return torch::stable::new_empty(like_, sizes, ScalarType::Float);
}

cudaStream_t Call::stream() const {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(like_.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void Call::check(cudaError_t error) const {
  STD_TORCH_CHECK(error == cudaSuccess, op_, ": ", cudaGetErrorString(error));
}

}  // namespace dak::gpu
