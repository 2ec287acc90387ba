// Host side of the row kernels: how a row is laid over blocks, and the launch.
#pragma once

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "cuda/kernels.h"

namespace dak::gpu {

// What one device offers.
struct Limits {
  int block_shared = 0;  // bytes that a block may ask for
  int sm_shared = 0;     // bytes of a multiprocessor
  int reserved = 0;      // bytes that the system takes for each block
  bool clusters = false;

  // Shared memory of a block if `blocks` of them are to be resident.
  int each(int blocks) const { return std::min(block_shared, sm_shared / blocks - reserved); }
};

inline cudaError_t limits_of(int device, Limits& limits) {
  int major = 0;
  cudaError_t error = cudaSuccess;
  auto ask = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  ask(limits.block_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(limits.sm_shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  ask(limits.reserved, cudaDevAttrReservedSharedMemoryPerBlock);
  ask(major, cudaDevAttrComputeCapabilityMajor);
  limits.clusters = major >= 9;
  return error;
}

inline int chunks_of(int columns, Type type) {
  int vec = chunk_bytes / bytes_of(type);
  return (columns + 2 * vec - 2) / vec;  // wherever the row starts
}

struct Choice {
  int cluster, blocks;  // blocks resident on a multiprocessor, which hide each other's waiting
};

// In order of preference. Beyond 8 blocks a cluster needs a GPU that has room for one.
inline constexpr Choice choices[] = {
    {1, 3}, {2, 3}, {4, 3}, {8, 3}, {4, 2}, {8, 2}, {16, 3}, {16, 2}, {1, 1}, {8, 1}, {16, 1},
};

inline size_t shared_bytes(int tile, int matrices, int scratch) {
  return size_t(scratch) + size_t(tile) * size_t(matrices) * chunk_bytes;
}

// The plan for rows of `chunks` chunks in `matrices` matrices: it depends on no row count, so that
// a row's result does not depend on its neighbours. fits(plan, bytes) has the last word.
template <class Fits>
LaunchPlan make_plan(const Limits& limits, int chunks, int matrices, int scratch, const Fits& fits) {
  for (Choice choice : choices) {
    if (choice.cluster > 1 && !limits.clusters) continue;
    int share = (chunks + choice.cluster - 1) / choice.cluster;
    size_t bytes = shared_bytes(share, matrices, scratch);
    if (int64_t(bytes) > limits.each(choice.blocks)) continue;
    LaunchPlan plan{choice.cluster, share, share};
    if (fits(plan, bytes)) return plan;
  }
  int cluster = limits.clusters ? 8 : 1, share = (chunks + cluster - 1) / cluster;
  int room = limits.each(3) - scratch;
  int tile = std::max(1, room / (matrices * chunk_bytes) / threads) * threads;
  return {cluster, share, std::min(tile, share)};
}

struct Launch {
  cudaLaunchAttribute cluster_size{};
  cudaLaunchConfig_t config{};
  Launch(const LaunchPlan& plan, int64_t rows, size_t bytes, cudaStream_t stream) {
    config.gridDim = dim3(unsigned(rows * plan.cluster));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    cluster_size.id = cudaLaunchAttributeClusterDimension;
    cluster_size.val.clusterDim.x = unsigned(plan.cluster);
    cluster_size.val.clusterDim.y = cluster_size.val.clusterDim.z = 1;
    config.attrs = &cluster_size;
    config.numAttrs = plan.cluster > 1 ? 1 : 0;
  }
  Launch(const Launch&) = delete;  // config points into it
};

// Makes `kernel` ready for any launch on this device, and plans rows of `chunks` chunks.
template <class Kernel>
cudaError_t prepare(Kernel kernel, int device, int chunks, int matrices, int scratch, LaunchPlan& plan) {
  Limits limits;
  cudaError_t error = limits_of(device, limits);
  // A GPU newer than this build runs the PTX for sm_80, which knows no clusters.
  cudaFuncAttributes compiled{};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&compiled, kernel);
  if (error != cudaSuccess) return error;
  limits.clusters &= compiled.ptxVersion >= 90;
  // As much as there is, not what this call needs: another thread may be about to launch the
  // kernel on longer rows.
  auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
  error = cudaFuncSetAttribute(kernel, most, limits.block_shared);
  if (error != cudaSuccess) return error;
  // Left alone, the driver may keep only as much of it as one block needs.
  auto carveout = cudaFuncAttributePreferredSharedMemoryCarveout;
  error = cudaFuncSetAttribute(kernel, carveout, int(cudaSharedmemCarveoutMaxShared));
  if (error != cudaSuccess) return error;
  auto fits = [&](const LaunchPlan& candidate, size_t bytes) {
    if (candidate.cluster <= 8) return true;
    int found = 0;
    Launch launch(candidate, 1, bytes, nullptr);
    auto big = cudaFuncAttributeNonPortableClusterSizeAllowed;
    bool allowed = cudaFuncSetAttribute(kernel, big, 1) == cudaSuccess &&
                   cudaOccupancyMaxActiveClusters(&found, kernel, &launch.config) == cudaSuccess;
    if (!allowed) (void)cudaGetLastError();  // this GPU has no such clusters; not an error
    return allowed && found > 0;
  };
  plan = make_plan(limits, chunks, matrices, scratch, fits);
  return cudaSuccess;
}

// The plan, kept for each kernel, device and length: a vocabulary comes back in every step, and
// asking the driver costs more than the launch.
template <class Kernel>
cudaError_t plan_of(Kernel kernel, int chunks, int matrices, int scratch, LaunchPlan& plan) {
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  static std::mutex mutex;
  static std::map<std::tuple<Kernel, int, int, int>, LaunchPlan> plans;
  std::lock_guard<std::mutex> lock(mutex);
  auto key = std::make_tuple(kernel, device, chunks, matrices);
  if (auto found = plans.find(key); found != plans.end()) return plan = found->second, cudaSuccess;
  cudaError_t error = prepare(kernel, device, chunks, matrices, scratch, plan);
  if (plans.size() >= 1024) plans.clear();
  if (error == cudaSuccess) plans[key] = plan;
  return error;
}

template <class Args>
cudaError_t launch_rows(void (*kernel)(Args), Args args, int matrices, int scratch, Type type,
                        cudaStream_t stream) {
  LaunchPlan& plan = args.r.plan;
  int chunks = chunks_of(args.r.columns, type);
  cudaError_t error = plan_of(kernel, chunks, matrices, scratch, plan);
  if (error != cudaSuccess) return error;
  if (args.r.rows * plan.cluster > 0x7fffffff) return cudaErrorInvalidConfiguration;
  Launch launch(plan, args.r.rows, shared_bytes(plan.tile, matrices, scratch), stream);
  return cudaLaunchKernelEx(&launch.config, kernel, args);
}

// Calls f(a value of the type of logits, Flag<there is a softcap>).
template <bool V>
struct Flag {
  static constexpr bool value = V;
};
template <class F32, class Bf16, class F16, class Fn>
cudaError_t with_type(Type type, const Score& score, const Fn& fn) {
  bool cap = score.cap > 0.0f;
  switch (type) {
    case Type::bf16:
      return cap ? fn(Bf16{}, Flag<true>{}) : fn(Bf16{}, Flag<false>{});
    case Type::f16:
      return cap ? fn(F16{}, Flag<true>{}) : fn(F16{}, Flag<false>{});
    default:
      return cap ? fn(F32{}, Flag<true>{}) : fn(F32{}, Flag<false>{});
  }
}

}  // namespace dak::gpu
