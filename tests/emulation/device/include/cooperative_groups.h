// Clusters of blocks, as csrc/cuda uses them.
#pragma once

#include "device.h"

namespace cooperative_groups {

struct cluster_group {
  void barrier_arrive() const { emulation::cluster_arrive(); }
  void barrier_wait() const { emulation::cluster_wait(); }
  void sync() const {
    emulation::cluster_arrive();
    emulation::cluster_wait();
  }
  template <typename T>
  T* map_shared_rank(T* variable, unsigned block) const {
    return static_cast<T*>(emulation::of_block(variable, block));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
