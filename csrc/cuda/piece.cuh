// The gradients of token_logp and token_kl from saved normalisers, and scale_grad: nothing is summed
// up, every block takes a piece of a row. Pieces run from the end of the tensor backwards: what was
// touched last is in L2.
#pragma once

#include "cuda/plan.h"
#include "cuda/row.cuh"

namespace dak::gpu {

inline constexpr int each = 2;  // chunks per thread
inline constexpr int piece = threads * each;

inline int pieces_of(const Rows& r, Type type) { return (chunks_of(r.columns, type) + piece - 1) / piece; }

// A piece of a row; the plan's cluster is the number of pieces per row.
template <class T>
struct Piece {
  int64_t row, batch, token;
  int lead, first, columns;

  __device__ Piece(const Rows& r, const Matrix& m) : columns(r.columns) {
    // Numbers of blocks and rows are below 2^31; a 64-bit division is a hundred instructions.
    unsigned pieces = unsigned(r.plan.cluster), tokens = unsigned(r.tokens);
    unsigned backwards = unsigned(r.rows) * pieces - 1 - blockIdx.x, at_row = backwards / pieces;
    row = at_row, batch = at_row / tokens, token = at_row % tokens;
    lead = int(reinterpret_cast<uintptr_t>(at(m)) / sizeof(T) % vec<T>);
    first = int(backwards % pieces) * piece + int(threadIdx.x);
  }
  __device__ const T* at(const Matrix& m) const {
    return static_cast<const T*>(m.data) + (batch * m.batch_stride + token * m.row_stride);
  }
  // Column that chunk n of this thread begins with.
  __device__ int column(int n) const { return (first + n * threads) * vec<T> - lead; }

  // All chunks of this thread, so that they are in flight together; 0 where there is no column.
  __device__ void load(const T* row, uint4 (&chunks)[each]) const {
    bool aligned = (reinterpret_cast<uintptr_t>(row) / sizeof(T) - unsigned(lead)) % vec<T> == 0;
#pragma unroll
    for (int n = 0; n < each; n++) {
      int from = column(n);
      uint32_t words[4] = {};
      if (aligned && from >= 0 && from + vec<T> <= columns) {
        chunks[n] = __ldcs(reinterpret_cast<const uint4*>(row + from));
      } else {
#pragma unroll
        for (int k = 0; k < vec<T>; k++) {
          uint32_t bits = 0;
          if (unsigned(from + k) < unsigned(columns)) bits = Part<T>::bits_of(row[from + k]);
          words[k * int(sizeof(T)) / 4] |= bits << (k * int(sizeof(T)) % 4 * 8);
        }
        chunks[n] = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
  __device__ OutRow<T> out(const Matrix& m) const { return {m, batch, token, lead, columns}; }
  __device__ void fill_zero(const Matrix& m) const {
    const float zero[vec<T>] = {};
    OutRow<T> to = out(m);
    for (int n = 0; n < each; n++) to.store(column(n), zero);
  }
};

template <class Args>
inline cudaError_t launch_pieces(void (*kernel)(Args), Args args, Type type, cudaStream_t stream) {
  args.r.plan.cluster = pieces_of(args.r, type);
  int64_t blocks = args.r.rows * args.r.plan.cluster;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace dak::gpu
