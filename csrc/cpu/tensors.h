// From torch tensors to rows: checks, strides, and the loop over rows.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <string>

#include "cpu/rows/rows.h"
#include "ops.h"

namespace dak {

using torch::headeronly::ScalarType;

Type type_of(const char* name, const Tensor& x);
Score score_of(double temperature, double softcap);
// For memory that is written for the first time; see large_pages.cpp.
void prefer_large_pages(char* data, int64_t bytes);
// A new fp32 tensor, uninitialised.
Tensor new_f32(const Tensor& like, std::initializer_list<int64_t> shape);
inline float* f32(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

// [B, T, V] with last stride 1 and any other strides; row r is [r / T, r % T].
class Logits {
 public:
  Logits(const char* name, const Tensor& x);
  int64_t rows() const { return batch_ * tokens_; }
  int64_t columns() const { return columns_; }
  Type type() const { return type_; }
  int64_t bytes() const { return rows() * columns_ * bytes_of(type_); }
  char* at(int64_t r) const {
    return data_ + (r / tokens_ * batch_stride_ + r % tokens_ * token_stride_) * bytes_of(type_);
  }
  Row row(int64_t r) const { return {at(r), columns_, type_}; }
  bool dense() const {  // one piece of memory, rows one after the other
    return token_stride_ == columns_ && (batch_ == 1 || batch_stride_ == tokens_ * columns_);
  }
  void must_match(const char* name, const Logits& other, bool dtype = true) const;

 private:
  char* data_;
  int64_t batch_, tokens_, columns_, batch_stride_, token_stride_;
  Type type_;
};

// The gradient of `logits`, to be written row by row.
class Gradient {
 public:
  Gradient(const Tensor& out, const Logits& logits);
  OutRow row(int64_t r) const { return {out_.at(r), out_.type(), stream_}; }
  void fill(int64_t r, float value) const;  // 0 or NaN

 private:
  Logits out_;
  bool stream_;
};

// [N] of any stride, converted to fp32.
class Vector {
 public:
  Vector(const char* name, const Tensor& x, int64_t n);
  float operator[](int64_t r) const { return data_[r * stride_]; }

 private:
  Tensor keep_;
  const float* data_;
  int64_t stride_;
};

// [N, 2] fp32
class Norms {
 public:
  Norms(const char* name, const Tensor& x, int64_t n);
  Norm operator[](int64_t r) const { return {data_[r * stride_], data_[r * stride_ + inner_]}; }

 private:
  const float* data_;
  int64_t stride_, inner_;
};

// Not so for a row of only -inf, or with NaN or +inf in it: its gradient is NaN, whatever else.
inline bool finite(Norm norm) { return norm.m - norm.m == 0.0f && norm.s - norm.s == 0.0f; }

inline void put(float* norms, int64_t r, Norm norm) {
  norms[2 * r] = norm.m;
  norms[2 * r + 1] = norm.s;
}

// The target column of each row.
class Targets {
 public:
  enum Kind { ignored, outside, inside };
  Targets(const Tensor& target, const Logits& logits, int64_t ignore_index);
  int64_t operator[](int64_t r) const { return data_[r * stride_]; }
  Kind kind(int64_t r) const {
    int64_t y = (*this)[r];
    return y == ignore_index_ ? ignored : y < 0 || y >= columns_ ? outside : inside;
  }

 private:
  const int64_t* data_;
  int64_t stride_, ignore_index_, columns_;
};

// valid [N] bool, or all.
class Valid {
 public:
  Valid(const MaybeTensor& valid, int64_t n);
  bool operator[](int64_t r) const { return !data_ || data_[r * stride_]; }

 private:
  const bool* data_ = nullptr;
  int64_t stride_ = 0;
};

// body(r) for every row, on all threads. Rows are handed out a few at a time: ignored rows cost
// nothing, so equal shares would not be equal work. Which thread takes a row does not change its
// result.
template <class Body>
void for_rows(int64_t rows, int64_t columns, const Body& body) {
  constexpr int64_t grain = 1 << 15;  // columns; about 10 us
  if (rows * columns <= grain) {
    for (int64_t r = 0; r < rows; r++) body(r);
    return;
  }
  int64_t share = columns >= grain ? 1 : grain / columns;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t b, int64_t e) {
    for (; b < e; b++) {
      for (int64_t r; (r = next.fetch_add(share, std::memory_order_relaxed)) < rows;) {
        int64_t end = r + share < rows ? r + share : rows;
        for (; r < end; r++) body(r);
      }
    }
  });
}

}  // namespace dak
