// Registers csrc/cuda, run on the host, as deepalign_cuda_on_host, and stands in for what only a
// CUDA build of torch has.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "cuda_runtime.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(deepalign_cuda_on_host, m) { dak::define(m); }

STABLE_TORCH_LIBRARY_IMPL(deepalign_cuda_on_host, CPU, m) { dak::implement(m); }

extern "C" {
#pragma GCC visibility push(default)

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  return *stream = nullptr, 0;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  return *guard = nullptr, 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }

// The pretended device, set by the tests.
void host_device(int block_shared, int sm_shared, int major, int ptx, int cluster16, int order) {
  host::Device& d = host::device();
  d.number++;
  d.block_shared = block_shared, d.sm_shared = sm_shared, d.major = major;
  d.ptx = ptx, d.cluster16 = cluster16, d.order = order;
}
unsigned host_last_cluster() { return host::device().last_cluster; }
uint64_t host_last_bytes() { return host::device().last_bytes; }
int64_t host_queries() { return host::device().queries; }
int64_t host_dynamic_limit() { return host::device().dynamic_limit; }
int64_t host_launches() { return host::device().launches; }
#pragma GCC visibility pop
}
