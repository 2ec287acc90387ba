#include <cstdint>

#include "cpu/tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dak {

// Large pages for memory that is about to be written for the first time. A fresh 262 MB gradient costs
// 85 ms of page faults and 22 ms to give back in 4 KiB pages, 25 ms and 0.7 ms in 2 MiB pages (two
// cores of an EPYC of 2023; writing it takes 10 ms). Only whole large pages inside the tensor are
// named, so nobody else's memory is touched; on pages that are there already it changes nothing.
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
