// What nt_xent_cpu.cpp asks of an instruction set. nt_xent_cpu_{avx512,avx2,baseline}.cpp each compile
// nt_xent_kernels.inc for one.
#pragma once

#include <cstdint>

namespace iic_dist::cpu {

constexpr int64_t kBlockRows = 64;  // of z, of one task: from the shape alone, never from the number of threads

template <typename A>
struct NTXentTask {
  const A* z;                 // (2G, D)
  int64_t total, dimensions;  // 2G, D
  int64_t first, count;       // this rank's rows of z
  A scale;                    // 1 / temperature

  int64_t positive(int64_t row) const { return first + (row - first + count / 2) % count; }
};

// Each function does one independent piece of work, a block of this rank's rows, in scratch memory of its own.
template <typename A>
struct NTXentKernels {
  int64_t (*scratch_size)(int64_t dimensions);  // elements that a block needs
  void (*rows)(const NTXentTask<A>&, int64_t block, A* log_sum_exp, A* positive, A* scratch);
  void (*rows_grad)(const NTXentTask<A>&, int64_t block, const A* log_sum_exp, A grad_scale, A* grad, A* scratch);
};

namespace avx512 {
template <typename A>
NTXentKernels<A> nt_xent_kernels();
}
namespace avx2 {
template <typename A>
NTXentKernels<A> nt_xent_kernels();
}
namespace baseline {
template <typename A>
NTXentKernels<A> nt_xent_kernels();
}

}  // namespace iic_dist::cpu
