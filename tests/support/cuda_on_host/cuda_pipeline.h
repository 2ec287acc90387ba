// Asynchronous copies; see cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  host::copy_later(to, from, bytes);
}
inline void __pipeline_commit() { host::commit_copies(); }
inline void __pipeline_wait_prior(int) { host::wait_for_copies(); }
