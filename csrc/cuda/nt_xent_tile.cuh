// What both NT-Xent kernels do: walk over the columns of z z^T tile by tile, for the rows that a block owns.
#pragma once

#include "reduce.cuh"
#include "tensor_core.cuh"

namespace iic_dist {

// A block owns kRows rows and walks over kColumns columns at a time. A warp owns kStrips strips of 16 rows, and has
// their products with the columns of a tile in registers: as[m][n] is d of 16 rows and 8 columns (tensor_core.cuh).
// Rows of z are kRowBytes long at most.
template <int kWarpCount, int kStripCount, int kColumnCount, int kMostBytes>
struct NTXentShape {
  static constexpr int kWarps = kWarpCount, kThreads = kWarps * kWarp;
  static constexpr int kStrips = kStripCount, kRows = kWarps * kStrips * 16;
  static constexpr int kColumns = kColumnCount, kTiles = kColumns / 8;
  static constexpr int kRowBytes = kMostBytes;
  using Products = float[kStrips][kTiles][4];
};

__device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr float kLog2E = 1.44269504f;
constexpr int kNTXentGranule = 16;  // D is a multiple of it for the kernels: zeros are behind what is not

// From row to row in shared memory, in values. The 16 bytes more than a row let eight rows, 16 bytes of each, meet no
// bank twice.
template <typename Shape, typename scalar_t>
constexpr int kNTXentStride = (Shape::kRowBytes + 16) / sizeof(scalar_t);

// Shared memory of a block: its own rows, two tiles and their columns' factors; in bytes.
template <typename Shape>
constexpr int kNTXentShared =
    (Shape::kRows + 2 * Shape::kColumns) * (Shape::kRowBytes + 16) + 2 * Shape::kColumns * sizeof(float);

template <typename scalar_t>
struct NTXentProblem {
  const scalar_t* z;  // (num_columns, dimensions), at a multiple of 16 bytes
  int64_t num_columns, first_row, num_rows;
  int dimensions;
  int tiles_per_split;  // of the columns; blockIdx.y is the split
  float inverse_temperature;

  __device__ int64_t end_row() const { return first_row + num_rows; }
  __device__ int64_t positive(int64_t row) const {
    const int64_t other = row + num_rows / 2;
    return other < end_row() ? other : other - num_rows;
  }
  // exp(product / temperature) = 2^(product * scale)
  __device__ float scale() const { return kLog2E * inverse_temperature; }
};

// 16-bit operands of a product, in pairs.
template <typename scalar_t, int kRegisters>
struct Pairs {
  uint32_t bits[kRegisters];

  __device__ void set_bits(int index, uint32_t value) { bits[index] = value; }
};

template <typename scalar_t, int kRegisters>
using Fragment =
    std::conditional_t<std::is_same_v<scalar_t, float>, Operand<kRegisters, true>, Pairs<scalar_t, kRegisters>>;

// D[n] += A B[n].
template <typename scalar_t, int kTiles>
__device__ void add_products(float (&d)[kTiles][4], const Pairs<scalar_t, 4>& a,
                             const Pairs<scalar_t, 2> (&b)[kTiles]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) mma_16x8x16<scalar_t>(d[n], a.bits, b[n].bits);
}

// Tensor cores truncate when they add, which float32 would show in long chains: its sums are made outside of them.
template <int kTiles>
__device__ void add_products(float (&d)[kTiles][4], const Operand<4, true>& a, const Operand<2, true> (&b)[kTiles]) {
  float fresh[kTiles][4] = {};
  multiply_add(fresh, a, b);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) d[n][e] += fresh[n][e];
  }
}

// Starts to copy rows [first, first + count) of z to shared memory; rows past the last one are copies of it.
template <typename Shape, typename scalar_t>
__device__ void start_rows(scalar_t* shared, const NTXentProblem<scalar_t>& problem, int64_t first, int count) {
  constexpr int kPiece = 16 / sizeof(scalar_t), kPieces = Shape::kRowBytes / 16;  // what a copy takes, and of a row
  constexpr int kLanes = kPieces < kWarp ? kPieces : kWarp;
  for (int row = threadIdx.x / kLanes; row < count; row += Shape::kThreads / kLanes) {
    const scalar_t* source = problem.z + smaller(first + row, problem.num_columns - 1) * problem.dimensions;
#pragma unroll
    for (int piece = 0; piece < kPieces; piece += kLanes) {
      const int k = (piece + threadIdx.x % kLanes) * kPiece;
      if (k < problem.dimensions) start_copy(shared + row * kNTXentStride<Shape, scalar_t> + k, source + k);
    }
  }
}

// Products of this warp's rows with the columns of a tile.
template <typename Shape, typename scalar_t>
__device__ void multiply_tile(typename Shape::Products& products, const scalar_t* own, const scalar_t* tile,
                              int dimensions) {
  constexpr int kHalf = 16 / sizeof(scalar_t);  // values in 16 bytes; a step takes two of these from each row
  constexpr int kStride = kNTXentStride<Shape, scalar_t>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const scalar_t* row_a = own + (warp * Shape::kStrips * 16 + lane % 16) * kStride + lane / 16 * kHalf;
  const scalar_t* row_b = tile + (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * kHalf;
#pragma unroll 2
  for (int k = 0; k < dimensions; k += 2 * kHalf) {
    uint32_t bits[4];
    Fragment<scalar_t, 2> b[Shape::kTiles];
#pragma unroll
    for (int n = 0; n < Shape::kTiles; n += 2) {
      load_matrices(bits, row_b + n * 8 * kStride + k);
#pragma unroll
      for (int i = 0; i < 4; ++i) b[n + i / 2].set_bits(i % 2, bits[i]);
    }
#pragma unroll
    for (int m = 0; m < Shape::kStrips; ++m) {
      Fragment<scalar_t, 4> a;
      load_matrices(bits, row_a + m * 16 * kStride + k);
#pragma unroll
      for (int i = 0; i < 4; ++i) a.set_bits(i, bits[i]);
      add_products(products[m], a, b);
    }
  }
}

// One call of `visit(value, row, column)` for each pair of a tile that this thread holds.
template <typename Shape, typename Visit>
__device__ void for_each_pair(typename Shape::Products& products, int64_t block_row, int64_t first_column,
                              const Visit& visit) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int m = 0; m < Shape::kStrips; ++m) {
#pragma unroll
    for (int n = 0; n < Shape::kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        visit(products[m][n][e], block_row + (warp * Shape::kStrips + m) * 16 + e / 2 * 8 + lane / 4,
              first_column + n * 8 + lane % 4 * 2 + e % 2);
      }
    }
  }
}

// Whether a tile may hold a row with itself, a row with its positive, or columns past the last: elsewhere nobody looks.
template <typename Shape, typename scalar_t>
__device__ bool is_special(const NTXentProblem<scalar_t>& problem, int64_t block_row, int64_t first_column) {
  const auto meets = [&](int64_t first) {
    return first < first_column + Shape::kColumns && first_column < first + Shape::kRows;
  };
  const int64_t half = problem.num_rows / 2;
  return meets(block_row) || meets(block_row + half) || meets(block_row - half) ||
         first_column + Shape::kColumns > problem.num_columns;
}

// The rows of a block, and its walk over the tiles of its split. The next tile is copied while one is worked on.
template <typename Shape, typename scalar_t>
class NTXentBlock {
 public:
  const NTXentProblem<scalar_t>& problem;
  const int64_t first_row;  // of the block, as a row of z
  const scalar_t* tile = nullptr;  // the one at hand, kNTXentStride from row to row
  const float* factors = nullptr;  // one a column of it, where the walk has any

  __device__ NTXentBlock(const NTXentProblem<scalar_t>& which, scalar_t* memory)
      : problem(which),
        first_row(which.first_row + static_cast<int64_t>(blockIdx.x) * Shape::kRows),
        own_(memory) {}

  // One call of `work(products, first_column)` for each tile. all_factors: a value for each column up to the last
  // tile's end, at a multiple of 16 bytes; or null.
  template <typename Work>
  __device__ void walk(const float* all_factors, const Work& work) {
    const int64_t num_tiles = (problem.num_columns + Shape::kColumns - 1) / Shape::kColumns;
    const int64_t begin = static_cast<int64_t>(blockIdx.y) * problem.tiles_per_split;
    const int64_t end = smaller(begin + problem.tiles_per_split, num_tiles);
    start_rows<Shape>(own_, problem, first_row, Shape::kRows);
    start(begin, all_factors);
    for (int64_t each = begin; each < end; ++each) {
      finish_copies();
      __syncthreads();  // all have copied their part of this tile, and are done with the one before
      if (each + 1 < end) start(each + 1, all_factors);
      tile = tiles(each);
      factors = factors_of(each);
      typename Shape::Products products = {};
      multiply_tile<Shape>(products, own_, tile, problem.dimensions);
      work(products, each * Shape::kColumns);
    }
  }

 private:
  static constexpr int kStride = kNTXentStride<Shape, scalar_t>;
  scalar_t* const own_;

  __device__ scalar_t* tiles(int64_t index) const {
    return own_ + (Shape::kRows + index % 2 * Shape::kColumns) * kStride;
  }
  __device__ float* factors_of(int64_t index) const {
    return reinterpret_cast<float*>(own_ + (Shape::kRows + 2 * Shape::kColumns) * kStride) +
           index % 2 * Shape::kColumns;
  }
  __device__ void start(int64_t index, const float* all_factors) const {
    const int64_t column = index * Shape::kColumns;
    start_rows<Shape>(tiles(index), problem, column, Shape::kColumns);
    const int mine = threadIdx.x * 4;  // 16 bytes a thread
    if (all_factors != nullptr && mine < Shape::kColumns) {
      start_copy(factors_of(index) + mine, all_factors + column + mine);
    }
  }
};

}  // namespace iic_dist
