// Clusters of blocks; see cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  void barrier_arrive() const { host::cluster_arrive(); }
  void barrier_wait() const { host::cluster_wait(); }
  template <class T>
  T* map_shared_rank(T* p, int rank) const {
    auto offset = reinterpret_cast<const char*>(p) - host::shared_of(host::self->rank);
    return reinterpret_cast<T*>(host::shared_of(unsigned(rank)) + offset);
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
