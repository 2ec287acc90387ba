#include "cpu/tensors.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>

namespace dak {
namespace {

// Gradients of more bytes than this are written around the caches. Computing one of 16 MB and then
// reading it once takes 1.31 times as long through the caches for fp32, 1.04 for bf16
// (constrained_loss, V = 32000). Below this size bf16 gains nothing.
constexpr int64_t stream_from = 4 << 20;

bool is_float(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half ||
         t == ScalarType::Double;
}

void must_be_vector(const char* name, const Tensor& x, int64_t n) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == n, name, ": expected shape [", n, "]");
}

}  // namespace

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

Score score_of(double temperature, double softcap) {
  STD_TORCH_CHECK(temperature > 0, "temperature: expected a number > 0, got ", temperature);
  return {temperature, float(softcap)};
}

Tensor new_f32(const Tensor& like, std::initializer_list<int64_t> shape) {
  torch::headeronly::IntHeaderOnlyArrayRef sizes(shape.begin(), shape.size());
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

Logits::Logits(const char* name, const Tensor& x) : type_(type_of(name, x)) {
  STD_TORCH_CHECK(x.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(x.dim() == 3, name, ": expected [B, T, V], got ", x.dim(), " dimensions");
  batch_ = x.size(0), tokens_ = x.size(1), columns_ = x.size(2);
  batch_stride_ = x.stride(0), token_stride_ = x.stride(1);
  STD_TORCH_CHECK(columns_ >= 1, name, ": expected at least one vocabulary column");
  STD_TORCH_CHECK(columns_ == 1 || x.stride(2) == 1, name, ": expected last stride 1");
  data_ = static_cast<char*>(x.data_ptr());
}

void Logits::must_match(const char* name, const Logits& other, bool dtype) const {
  bool same = batch_ == other.batch_ && tokens_ == other.tokens_ && columns_ == other.columns_;
  STD_TORCH_CHECK(same, name, ": expected the shape of the policy's logits");
  STD_TORCH_CHECK(!dtype || type_ == other.type_, name, ": expected the dtype of the policy");
}

Gradient::Gradient(const Tensor& out, const Logits& logits) : out_("out", out) {
  out_.must_match("out", logits, false);
  bool fits = out_.type() == logits.type() || out_.type() == Type::f32;
  fits |= logits.type() == Type::f32;
  STD_TORCH_CHECK(fits, "out: expected the dtype of the logits or fp32, or any for fp32 logits");
  stream_ = out_.bytes() > stream_from && out_.at(0) != logits.at(0);
  if (stream_ && out_.dense()) prefer_large_pages(out_.at(0), out_.bytes());
}

void Gradient::fill(int64_t r, float value) const {
  Row row = out_.row(r);
  if (value == 0.0f) {
    std::memset(out_.at(r), 0, size_t(row.columns * bytes_of(row.type)));
  } else if (row.type == Type::f32) {
    std::fill_n(reinterpret_cast<float*>(out_.at(r)), row.columns, value);
  } else {
    uint16_t nan = row.type == Type::bf16 ? 0x7fc0 : 0x7e00;
    std::fill_n(reinterpret_cast<uint16_t*>(out_.at(r)), row.columns, nan);
  }
}

Vector::Vector(const char* name, const Tensor& x, int64_t n) : keep_(x) {
  must_be_vector(name, x, n);
  STD_TORCH_CHECK(x.is_cpu() && is_float(x.scalar_type()), name, ": expected CPU floats");
  if (x.scalar_type() != ScalarType::Float) keep_ = torch::stable::to(x, ScalarType::Float);
  data_ = static_cast<const float*>(keep_.data_ptr());
  stride_ = n > 0 ? keep_.stride(0) : 0;
}

Norms::Norms(const char* name, const Tensor& x, int64_t n) {
  bool fits = x.is_cpu() && x.scalar_type() == ScalarType::Float && x.dim() == 2 &&
              x.size(0) == n && x.size(1) == 2;
  STD_TORCH_CHECK(fits, name, ": expected fp32 [", n, ", 2] on the CPU");
  data_ = static_cast<const float*>(x.data_ptr());
  stride_ = x.stride(0), inner_ = x.stride(1);
}

Targets::Targets(const Tensor& target, const Logits& logits, int64_t ignore_index)
    : ignore_index_(ignore_index), columns_(logits.columns()) {
  must_be_vector("target", target, logits.rows());
  bool fits = target.is_cpu() && target.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(fits, "target: expected int64 on the CPU");
  data_ = static_cast<const int64_t*>(target.data_ptr());
  stride_ = target.stride(0);
}

Valid::Valid(const MaybeTensor& valid, int64_t n) {
  if (!valid) return;
  must_be_vector("valid", *valid, n);
  bool fits = valid->is_cpu() && valid->scalar_type() == ScalarType::Bool;
  STD_TORCH_CHECK(fits, "valid: expected bool on the CPU");
  data_ = static_cast<const bool*>(valid->data_ptr());
  stride_ = valid->stride(0);
}

}  // namespace dak
