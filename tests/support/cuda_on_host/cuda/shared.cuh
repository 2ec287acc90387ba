// In the place of csrc/cuda/shared.cuh.
#pragma once

#include "cuda_runtime.h"

namespace dak::gpu {

inline char* shared_memory() { return host::shared_of(host::self->rank); }

}  // namespace dak::gpu
