// From torch tensors to what the kernels take: checks, strides, device and stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cuda/kernels.h"
#include "ops.h"

namespace dak::gpu {

using torch::headeronly::ScalarType;

// One call on the device of its logits, which stays current until the call ends.
class Call {
 public:
  Call(const char* op, const char* name, const Tensor& logits, double temperature, double softcap);

  const Rows& rows() const { return rows_; }
  Matrix logits() const { return logits_; }
  // Logits of the same shape and dtype; a gradient of fp32 logits may have another dtype.
  Matrix matrix(const char* name, const Tensor& x) const;
  Matrix gradient(const Tensor& out) const;
  // [N], converted to fp32 if need be.
  Vector vector(const char* name, const Tensor& x);
  const float* norms(const char* name, const Tensor& x) const;  // [N, 2]
  const float* number(const char* name, const Tensor& x);       // one, whatever its shape
  const int64_t* targets(const Tensor& target);
  const bool* valid(const MaybeTensor& valid);
  // A new fp32 tensor, uninitialised: [N], [N, 2] or [8, N].
  Tensor new_f32(std::initializer_list<int64_t> shape) const;

  template <class Args>
  void run(const Args& args) const {
    if (rows_.rows > 0) check(gpu::run(args, stream()));
  }

 private:
  Matrix any_matrix(const char* name, const Tensor& x) const;
  const Tensor& here(const char* name, const Tensor& x) const;
  const Tensor& keep(const Tensor& x);
  cudaStream_t stream() const;
  void check(cudaError_t error) const;

  const char* op_;
  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
  Rows rows_;
  Matrix logits_;
  std::vector<Tensor> kept_;  // conversions, alive until the call ends
};

inline float* f32(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

}  // namespace dak::gpu
