// A cluster of blocks shares a row: where each one's part lies, how it gets into shared memory, and
// how blocks put their sums together. Everything is in a fixed order, so results repeat to the bit.
//
// A row is cut into chunks of 16 bytes on the boundaries of the policy's memory; the first begins
// `lead` columns before the row where that one starts in between. A chunk belongs to one thread in
// every sweep, so a sweep needs no barrier before it reads what the one before has loaded.
#pragma once

#include <cooperative_groups.h>
#include <cuda_pipeline.h>

#include "cuda/math.cuh"
#include "cuda/shared.cuh"

namespace dak::gpu {

inline constexpr int warps = threads / 32;
inline constexpr unsigned all_lanes = 0xffffffffu;
inline constexpr int no_chunk = 0x7fffffff;

// A block's largest score or logit, and the first chunk that has it.
struct Top {
  float value = -inf;
  int chunk = no_chunk;
  __device__ void take(float other, int at) {
    if (other > value || (other == value && at < chunk)) value = other, chunk = at;
  }
};

// Beginning of the dynamic shared memory; the chunks follow it.
struct Scratch {
  Top tops[2][2][warps];
  float sums[8][warps];
  float partial[16];  // what the other blocks of the cluster read
};
inline constexpr int scratch_bytes = (int(sizeof(Scratch)) + 127) / 128 * 128;

__device__ inline Scratch& scratch() { return *reinterpret_cast<Scratch*>(shared_memory()); }
__device__ inline uint4* buffer(const LaunchPlan& plan, int matrix) {
  return reinterpret_cast<uint4*>(shared_memory() + scratch_bytes) + int64_t(matrix) * plan.tile;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(all_lanes, x, i);
  return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(all_lanes, x, i));
  return x;
}
__device__ inline Top warp_top(Top x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) {
    float value = __shfl_xor_sync(all_lanes, x.value, i);
    x.take(value, __shfl_xor_sync(all_lanes, x.chunk, i));
  }
  return x;
}

// The block's top of one or two models, the same in every thread. `turn` alternates from call to
// call: a call may overwrite what slow threads still read of the one before the last, but not of
// the last.
template <int N>
__device__ inline void block_tops(Top (&tops)[N], int& turn) {
  auto& slots = scratch().tops[turn];
  turn ^= 1;
#pragma unroll
  for (int n = 0; n < N; n++) {
    tops[n] = warp_top(tops[n]);
    if (threadIdx.x % 32 == 0) slots[n][threadIdx.x / 32] = tops[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; n++) {
    tops[n] = slots[n][0];
#pragma unroll
    for (int w = 1; w < warps; w++) tops[n].take(slots[n][w].value, slots[n][w].chunk);
  }
}

// Sums over the block, the same in every thread.
template <int N>
__device__ inline void block_sums(float (&x)[N]) {
  static_assert(N <= 8);
  auto& slots = scratch().sums;
  __syncthreads();  // of an earlier call
#pragma unroll
  for (int n = 0; n < N; n++) {
    x[n] = warp_sum(x[n]);
    if (threadIdx.x % 32 == 0) slots[n][threadIdx.x / 32] = x[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; n++) {
    x[n] = slots[n][0];
#pragma unroll
    for (int w = 1; w < warps; w++) x[n] += slots[n][w];
  }
}

// Barriers of the cluster; a cluster of one needs none beyond the block's own.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline void cluster_arrive(const LaunchPlan& plan) {
  if (plan.cluster > 1) cooperative_groups::this_cluster().barrier_arrive();
}
__device__ inline void cluster_wait(const LaunchPlan& plan) {
  if (plan.cluster > 1) cooperative_groups::this_cluster().barrier_wait();
}
__device__ inline const float* partial_of(int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(scratch().partial, rank);
}
#else
__device__ inline void cluster_arrive(const LaunchPlan&) {}
__device__ inline void cluster_wait(const LaunchPlan&) {}
__device__ inline const float* partial_of(int) { return scratch().partial; }
#endif

// Hands `mine`, the same in every thread of a block, to the whole cluster: lane r of every warp
// gets that of rank r, a lane beyond the cluster gets `nothing`. Whoever calls this calls
// `leave_cluster` before it ends, since a block that is gone cannot be read.
template <int N>
__device__ inline void exchange(const LaunchPlan& plan, float (&mine)[N], const float (&nothing)[N]) {
  static_assert(N <= 16);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int n = 0; n < N; n++) scratch().partial[n] = mine[n];
  }
  if (plan.cluster > 1) {
    cluster_arrive(plan);
    cluster_wait(plan);
  } else {
    __syncthreads();
  }
  int lane = int(threadIdx.x % 32);
  const float* theirs = partial_of(lane < plan.cluster ? lane : 0);
#pragma unroll
  for (int n = 0; n < N; n++) mine[n] = lane < plan.cluster ? theirs[n] : nothing[n];
  cluster_arrive(plan);
}
// Between two exchanges and at the end: all have read the partial results of the last exchange.
__device__ inline void leave_cluster(const LaunchPlan& plan) {
  if (plan.cluster > 1) {
    cluster_wait(plan);
  } else {
    __syncthreads();
  }
}

// Where this block's part of its row lies.
template <class T>
struct Part {
  int64_t row, batch, token;
  int rank, lead, begin, end, columns;  // chunks [begin, end)

  __device__ Part(const Rows& r, const Matrix& policy)
      : row(blockIdx.x / unsigned(r.plan.cluster)),
        batch(unsigned(row) / unsigned(r.tokens)),
        token(unsigned(row) % unsigned(r.tokens)),
        rank(int(blockIdx.x % unsigned(r.plan.cluster))),
        columns(r.columns) {
    lead = int(reinterpret_cast<uintptr_t>(at(policy)) / sizeof(T) % vec<T>);
    int chunks = (lead + columns + vec<T> - 1) / vec<T>;
    begin = min(rank * r.plan.share, chunks);
    end = min(begin + r.plan.share, chunks);
  }
  __device__ const T* at(const Matrix& m) const {
    return static_cast<const T*>(m.data) + (batch * m.batch_stride + token * m.row_stride);
  }
  __device__ int column(int chunk) const { return chunk * vec<T> - lead; }
  __device__ bool writes() const { return rank == 0 && threadIdx.x == 0; }
  __device__ OutRow<T> out(const Matrix& m) const { return {m, batch, token, lead, columns}; }

  // Chunks [first, first + count) of `row` into shared memory; -inf in columns that the row lacks.
  // Whole chunks, all but one at either end, are copied asynchronously where they lie on 16 bytes.
  __device__ void load(const T* row, uint4* to, int first, int count) const {
    bool aligned = (reinterpret_cast<uintptr_t>(row) / sizeof(T) - unsigned(lead)) % vec<T> == 0;
    int me = int(threadIdx.x), low = min(lead, 1 - min(first, 1));
    int high = aligned ? min(count, (columns + lead) / vec<T> - first) : 0;
    const T* from = row + column(first);
#pragma unroll 4
    for (int i = me < low ? me + threads : me; i < high; i += threads) {
      __pipeline_memcpy_async(to + i, from + int64_t(i) * vec<T>, chunk_bytes);
    }
    // What is left: the ends, or all of a row that lies otherwise.
    int step = aligned ? max(count - 1, 1) : threads;
    for (int i = aligned ? 0 : me; i < count; i += step) {
      if (i % threads == me && (i < low || i >= high)) to[i] = gather(row, column(first + i));
    }
  }
  __device__ uint4 gather(const T* row, int from) const {
    uint32_t words[4] = {};
#pragma unroll
    for (int k = 0; k < vec<T>; k++) {
      uint32_t bits = minus_inf_bits<T>();
      if (unsigned(from + k) < unsigned(columns)) bits = bits_of(row[from + k]);
      words[k * int(sizeof(T)) / 4] |= bits << (k * int(sizeof(T)) % 4 * 8);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
  __device__ static uint32_t bits_of(T x) {
    if constexpr (same<T, float>) {
      return __float_as_uint(x);
    } else {
      return x.bits;
    }
  }
};

// The tiles of a block's part of a row, one at a time in shared memory, over the rows of one or two
// matrices. body(first chunk, chunks) runs on every tile. Sweeps alternate in direction: the next
// one begins with the tile that is still there, and a row of one tile is never loaded again.
template <class T>
struct Tiles {
  const LaunchPlan& plan;
  const Part<T>& part;
  const T* rows[2];
  int matrices;
  int held = -1;  // first chunk of the tile in shared memory

  template <class Body>
  __device__ void tile(int first, const Body& body) {
    int chunks = min(plan.tile, part.end - first);
    if (first != held) {
      if (held >= 0) __syncthreads();  // slow threads may be at a chunk of another thread
      part.load(rows[0], buffer(plan, 0), first, chunks);
      if (matrices > 1) part.load(rows[1], buffer(plan, 1), first, chunks);
      __pipeline_commit();
      __pipeline_wait_prior(0);  // now a thread sees the chunks that it loaded itself
      held = first;
    }
    body(first, chunks);
  }
  template <class Body>
  __device__ void sweep(const Body& body) {
    for (int first = part.begin; first < part.end; first += plan.tile) tile(first, body);
  }
  template <class Body>
  __device__ void sweep_back(const Body& body) {
    if (part.begin >= part.end) return;
    int last = part.begin + (part.end - part.begin - 1) / plan.tile * plan.tile;
    for (int first = last; first >= part.begin; first -= plan.tile) tile(first, body);
  }
};

// A thread's largest logit of a tile, of those it loaded itself.
template <class T>
__device__ inline Top top_of(const uint4* chunks, int first, int count) {
  Top top;
#pragma unroll 4
  for (int i = int(threadIdx.x); i < count; i += threads) {
    float value = chunk_max<T>(chunks[i]);
    if (value > top.value) top.value = value, top.chunk = first + i;
  }
  return top;
}

// The same without its place, which costs half as much.
template <class T>
__device__ inline Top top_value_of(const uint4* chunks, int count) {
  uint4 top = chunk_of_minus_inf<T>();
#pragma unroll 4
  for (int i = int(threadIdx.x); i < count; i += threads) top = larger<T>(top, chunks[i]);
  return {chunk_max<T>(top), no_chunk};
}

// Scores of one chunk; -inf in columns that the row lacks.
template <class T, bool Cap>
__device__ inline void scores_of(const Score& c, const Part<T>& part, int chunk, uint4 raw,
                                 float (&z)[vec<T>]) {
  unpack<T>(raw, z);
  if constexpr (Cap) {
    int from = part.column(chunk);
#pragma unroll
    for (int k = 0; k < vec<T>; k++) {
      float s = score_of<true>(c, z[k]);
      z[k] = unsigned(from + k) < unsigned(part.columns) ? s : -inf;
    }
  }
}

template <class T, bool Cap>
__device__ inline float score_at(const Score& c, const T* row, int64_t column) {
  return score_of<Cap>(c, to_float(row[column]));
}

// Sum of 2^((score - top) * exponent) of a thread's share of a row, or of more.
struct ExpSum {
  float top = -inf, sum = 0.0f;

  // Moves the top; what the old terms sink by.
  __device__ float raise(const Score& c, float to) {
    float sunk = exp2_fast((top - shift(to)) * c.exponent);
    sum *= sunk;
    top = to;
    return sunk;
  }
  // Takes a tile whose largest logit, in the whole block, is `raw_top`.
  template <class T, bool Cap>
  __device__ void add(const Score& c, const Part<T>& part, const uint4* chunks, int first,
                      int count, float raw_top) {
    raise(c, fmaxf(top, score_of<Cap>(c, raw_top)));
    float at = shift(top);
#pragma unroll 2
    for (int i = int(threadIdx.x); i < count; i += threads) {
      float z[vec<T>];
      scores_of<T, Cap>(c, part, first + i, chunks[i], z);
#pragma unroll
      for (int k = 0; k < vec<T>; k++) z[k] = exp2_fast((z[k] - at) * c.exponent);
#pragma unroll
      for (int n = vec<T> / 2; n > 0; n /= 2) {
#pragma unroll
        for (int k = 0; k < n; k++) z[k] += z[k + n];
      }
      sum += z[0];
    }
  }
  // From one in each lane to that of all lanes.
  __device__ void merge_lanes(const Score& c) {
    raise(c, warp_max(top));
    sum = warp_sum(sum);
  }
  __device__ float log_prob(const Score& c, float score) const {  // never above 0
    return fminf((score - shift(top)) * c.inverse_hi, 0.0f) - logf(sum);
  }
};

// Terms e^dx t of a sum, with t = dx or dx - dy. A column that x masks has e^dx = 0 and must add 0,
// but t is -inf there, NaN if y masks it too, or finite and huge (masks of torch.finfo.min):
// `no_less` leaves a finite t, so that the product is 0. Where y alone masks it with -inf, t is
// +inf, the term +inf, or NaN if e^dx underflowed: `divergence` takes either for what it is.
__device__ inline float no_less(float t) { return fmaxf(t, -largest); }

// Where y alone masks it with finfo.min, t is as large as fp32 goes; with all e^dx 2^-24 of what they
// are, a sum of up to 2^24 columns does not overflow.
inline constexpr float headroom = 24.0f, room = 16777216.0f;  // 2^24

// Such a sum after its shifts moved: scale = e^(old cx - new cx), `delta` is what each t gained, d
// the sum of the e^dx. Between a mask of finfo.min and a logit lies more than fp32 holds.
__device__ inline float rescale(float a, float d, float scale, float delta) {
  if (!(fabsf(a) < inf)) return a;
  return scale == 0.0f ? 0.0f : scale * fmaf(delta, d, a);
}

// The mean of t under x, from the sum of its terms and the two models' sums of e^dx: +inf if y is 0
// in a column that x can produce. A row of only -inf, or with NaN, has no positive sum: NaN.
__device__ inline float divergence(float cross, float sum_x, float sum_y) {
  float mean = cross / sum_x;
  return mean != mean && sum_x > 0.0f && sum_y > 0.0f ? inf : mean;
}

// A row that is left out: gradient 0, nothing read.
template <class T>
__device__ inline void fill_zero(const Part<T>& part, const Matrix& out) {
  OutRow<T> to = part.out(out);
  const float zero[vec<T>] = {};
  for (int i = part.begin + int(threadIdx.x); i < part.end; i += threads) {
    to.store(part.column(i), zero);
  }
}

}  // namespace dak::gpu
