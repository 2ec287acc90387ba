// The dynamic shared memory of a block.
#pragma once

namespace dak::gpu {

__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char bytes[];
  return bytes;
}

}  // namespace dak::gpu
