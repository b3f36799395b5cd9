// What nt_xent_cpu.cpp asks of an instruction set between the matrix products of the library.
// nt_xent_cpu_{avx512,avx2,baseline}.cpp each compile nt_xent_kernels.inc for one.
#pragma once

#include <cstdint>

namespace iic_dist::cpu {

constexpr int64_t kTileColumns = 512;  // with 256 rows of float32 a tile takes half of a 1 MiB cache

// Similarities of some rows with some columns, kTileColumns apart; `scale` makes s = z z^T / temperature of them.
// Pairs that do not count are -inf; so may be what follows the last column.
template <typename A>
struct SimilarityTile {
  A* data;
  int64_t rows, columns;
  A scale;
};

template <typename A>
struct NTXentKernels {
  // Goes on with each row's largest s and sum of exp(s - largest) by the columns of the tile.
  void (*add_exponentials)(const SimilarityTile<A>&, A* largest, A* sums);
  // Replaces each similarity by p_ij + p_ji = exp(s - lse_i) + exp(s - lse_j).
  void (*weigh)(const SimilarityTile<A>&, const A* row_lse, const A* column_lse);
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
