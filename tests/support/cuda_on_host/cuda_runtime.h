// A host in the place of a GPU: just enough of CUDA to run csrc/cuda on the CPU, for the tests.
//
// Every CUDA thread is a fiber; the warps of one cluster run one after the other, each as far as it
// can go: to a barrier or to the end of the kernel. Which warp is next is a matter of
// `device().order`, so code that relies on a barrier which is not there gives other results in
// another order. Shared memory holds NaN at first and asynchronous copies arrive only when they are
// waited for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __CUDACC__ 1

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace host {

struct Device {
  int block_shared = 227 << 10, sm_shared = 228 << 10, major = 9;
  int ptx = 90;       // what the kernels count as compiled for
  int cluster16 = 1;  // whether clusters of 16 blocks are to be had
  int order = 0;      // of the warps: 0 ascending, 1 descending, else a seed
  int64_t launches = 0, queries = 0;  // queries: calls that a driver answers slowly
  int number = 0;                     // another one for every pretended GPU
  int64_t dynamic_limit = 48 << 10;   // of shared memory, until a kernel asks for more
  unsigned last_cluster = 0;
  uint64_t last_bytes = 0;
};
Device& device();

struct Thread {
  dim3 thread, block;
  unsigned rank;  // of the block in its cluster
};
extern thread_local Thread* self;

enum class Scope { warp, block, cluster };
void barrier(Scope scope);
void cluster_arrive();
void cluster_wait();
uint64_t exchange(uint64_t value, unsigned lane);  // what `lane` of this warp gave; all lanes call
uint32_t ballot(bool yes);
char* shared_of(unsigned rank);
void copy_later(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies();

int launch(dim3 grid, unsigned threads, unsigned cluster, size_t bytes,
           const std::function<void()>& kernel);

}  // namespace host

#define threadIdx (::host::self->thread)
#define blockIdx (::host::self->block)

inline void __syncthreads() { host::barrier(host::Scope::block); }

template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  bits = host::exchange(bits, unsigned(lane) % 32);
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int by) {
  return __shfl_sync(mask, x, int(host::self->thread.x % 32) ^ by);
}
inline unsigned __ballot_sync(unsigned, bool yes) { return host::ballot(yes); }
inline int __ffs(int x) { return __builtin_ffs(x); }

inline float __int_as_float(int x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline int __float_as_int(float x) {
  int y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float __uint_as_float(uint32_t x) { return __int_as_float(int(x)); }
inline uint32_t __float_as_uint(float x) { return uint32_t(__float_as_int(x)); }
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;  // never fused with what follows
  return product;
}
inline float __frcp_rn(float x) { return 1.0f / x; }
template <class A>
A min(A a, A b) {
  return b < a ? b : a;
}
template <class A>
A max(A a, A b) {
  return a < b ? b : a;
}

template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T x) {
  *p = x;
}

// The part of the runtime that launches kernels.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "an error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock,
  cudaDevAttrComputeCapabilityMajor
};
inline cudaError_t cudaGetDevice(int* device) {
  return *device = host::device().number, cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  host::Device& d = host::device();
  d.queries++;
  const int values[] = {d.block_shared, d.sm_shared, 1 << 10, d.major};
  return *value = values[which], cudaSuccess;
}
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
struct cudaFuncAttributes {
  int ptxVersion;
};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, Kernel) {
  host::device().queries++;
  return found->ptxVersion = host::device().ptx, cudaSuccess;
}
enum cudaSharedCarveout { cudaSharedmemCarveoutMaxShared = 100 };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute which, int value) {
  host::Device& d = host::device();
  d.queries++;
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > d.block_shared) return cudaErrorInvalidValue;
  return d.dynamic_limit = value, cudaSuccess;
}
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* found, Kernel, const cudaLaunchConfig_t*) {
  host::device().queries++;
  return *found = host::device().cluster16, cudaSuccess;
}
template <class Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(Args), Args args) {
  unsigned cluster = c->numAttrs ? c->attrs[0].val.clusterDim.x : 1;
  return cudaError_t(host::launch(c->gridDim, c->blockDim.x, cluster, c->dynamicSmemBytes,
                                  [&] { kernel(args); }));
}
