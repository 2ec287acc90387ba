#include <cstdint>

#include "cpu/tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dak {

// Large pages for memory that is about to be written for the first time: one page fault per 2 MiB
// instead of 512, and as many fewer pages to give back (`python -m benchmarks pieces --only pages`
// times both). Only whole large pages inside the tensor are named, so nobody else's memory is
// touched; on pages that are there already it changes nothing.
void prefer_large_pages(char* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = uintptr_t(2) << 20;
  uintptr_t begin = (uintptr_t(data) + page - 1) / page * page;
  uintptr_t end = (uintptr_t(data) + uintptr_t(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void large_pages(Tensor fresh) {
  int64_t bytes = fresh.numel() * fresh.element_size();
  prefer_large_pages(static_cast<char*>(fresh.data_ptr()), bytes);
}

}  // namespace dak
