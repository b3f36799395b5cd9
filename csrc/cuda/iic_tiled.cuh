// IIC kernels for up to 160 clusters: a block owns a chunk of rows, the products run on the tensor cores.
#pragma once

#include <type_traits>

#include "iic_batch.cuh"
#include "tensor_core.cuh"

namespace iic_dist {

constexpr int kTiledMax = 160;
constexpr int kTiledThreads = 256;
constexpr int kTiledLanes = 8;                            // lanes that share a row in the softmax
constexpr int kTiledRows = kTiledThreads / kTiledLanes;  // pairs in a tile: every thread takes part of one row

// Blocks that share a multiprocessor: the registers of larger K leave room for one.
template <int kMax>
constexpr int kTiledResident = kMax <= 96 ? 2 : 1;

// Rows of the gradient in shared memory at once: all, or half where they would not fit the 99 KiB of any device.
template <int kMax>
constexpr int kSlabRows = kMax <= 96 ? kMax : kMax / 2;

// Strides that free the operand reads of a warp of bank conflicts: 8 columns of 4 rows want 8 (mod 32), 4 columns
// of 8 rows want 4.
template <int kMax>
constexpr int kColumnStride = kMax + 8;
template <int kMax>
constexpr int kRowStride = kMax + 4;

template <int kMax>
constexpr int kTiledGradShared = 2 * kTiledRows * kRowStride<kMax> + kSlabRows<kMax> * kColumnStride<kMax>;  // floats

// Softmax of 32 rows of one view as tile[row][cluster], summed over the repeats [first, last); zeros past the batch
// and past the clusters.
template <int kMax, int kStride, typename scalar_t>
__device__ void tiled_softmax(const Rows<scalar_t>& view, const Batch<scalar_t>& batch, int head,
                              int64_t first_row, int first, int last, float* tile) {
  const int row = threadIdx.x / kTiledLanes, lane = threadIdx.x % kTiledLanes;
  const int64_t i = first_row + row;
  float* out = tile + row * kStride + lane;
  for (int r = first; r < last; ++r) {
    const scalar_t* logits = i < batch.num_rows ? view.at(r * batch.num_rows + i, head) : nullptr;
    float p[kMax / kTiledLanes];
    softmax_row<kTiledLanes>(logits, batch.num_clusters, p);
#pragma unroll
    for (int j = 0; j < kMax / kTiledLanes; ++j) {
      out[j * kTiledLanes] = r == first ? p[j] : out[j * kTiledLanes] + p[j];
    }
  }
}

namespace {

// A block owns a chunk of the rows of one head; a warp owns every 2nd strip of 16 rows and every 4th of 8 columns of
// the joint, in registers. Shared memory holds the softmaxes of a tile of 32 pairs.
template <int kMax, typename scalar_t>
__global__ void __launch_bounds__(kTiledThreads, kTiledResident<kMax>)
    iic_tiled_joint_kernel(Batch<scalar_t> batch, int tiles_per_block, float* partial) {
  constexpr bool kExact = std::is_same_v<scalar_t, float>;
  constexpr int kStrips = kMax / 32, kStride = kColumnStride<kMax>;
  __shared__ float probs_a[kTiledRows * kStride], probs_b[kTiledRows * kStride];
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int first_i = warp % 2 * 16 + g, first_j = warp / 2 * 8 + g, k = batch.num_clusters;
  float sums[kStrips][kStrips][4] = {};
  for (int tile = 0; tile < tiles_per_block; ++tile) {
    const int64_t first_row = (static_cast<int64_t>(blockIdx.x) * tiles_per_block + tile) * kTiledRows;
    if (first_row >= batch.num_rows) break;
    tiled_softmax<kMax, kStride>(batch.a, batch, blockIdx.y, first_row, 0, 1, probs_a);
    tiled_softmax<kMax, kStride>(batch.b, batch, blockIdx.y, first_row, 0, batch.repeats, probs_b);
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kStrips; ++m) {
      if (warp % 2 * 16 + m * 32 >= k) break;
      float fresh[kStrips][4] = {};  // tensor cores truncate when they add: keep their chains short
#pragma unroll 1
      for (int row = t; row < kTiledRows; row += 8) {
        Operand<4, kExact> a;
        Operand<2, kExact> b[kStrips];
        const float* column_a = probs_a + row * kStride + first_i + m * 32;
        const float* column_b = probs_b + row * kStride + first_j;
#pragma unroll
        for (int n = 0; n < kStrips; ++n) {
          b[n].set(0, column_b[n * 32]);
          b[n].set(1, column_b[n * 32 + 4 * kStride]);
        }
        a.set(0, column_a[0]);
        a.set(1, column_a[8]);
        a.set(2, column_a[4 * kStride]);
        a.set(3, column_a[4 * kStride + 8]);
        multiply_add(fresh, a, b);
      }
#pragma unroll
      for (int n = 0; n < kStrips; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[m][n][e] += fresh[n][e];
      }
    }
    __syncthreads();
  }
  float* out = partial + (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * k * k;
#pragma unroll
  for (int m = 0; m < kStrips; ++m) {
#pragma unroll
    for (int n = 0; n < kStrips; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = first_i + m * 32 + e / 2 * 8, j = warp / 2 * 8 + n * 32 + 2 * t + e % 2;
        if (i < k && j < k) out[i * k + j] = sums[m][n][e];
      }
    }
  }
}

// A block owns a chunk of the rows of one head; a warp owns 16 rows of one view and every 2nd strip of 8 clusters.
// Shared memory holds the softmaxes of a tile of 32 pairs and the centred gradient, by halves if it is large.
template <int kMax, typename scalar_t>
__global__ void __launch_bounds__(kTiledThreads, kTiledResident<kMax>)
    iic_tiled_grad_kernel(Batch<scalar_t> batch, JointGrad joint_grad, int tiles_per_block, scalar_t* grad_a,
                          scalar_t* grad_b) {
  constexpr bool kExact = std::is_same_v<scalar_t, float>;
  constexpr int kStrips = kMax / 16, kStride = kRowStride<kMax>, kSlab = kSlabRows<kMax>;
  extern __shared__ float shared[];
  __shared__ float dots[2][2 * kTiledRows];  // <z, g> of every row, in two parts
  float* probs_a = shared;
  float* probs_b = probs_a + kTiledRows * kStride;
  float* matrix = probs_b + kTiledRows * kStride;
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int half = warp / 4, view = warp / 2 % 2, strip = warp % 2 * 16, head = blockIdx.y, k = batch.num_clusters;
  const int padded = (k + 7) / 8 * 8;
  const float* own = (view == 0 ? probs_a : probs_b) + (strip + g) * kStride;
  const float* partner = (view == 0 ? probs_b : probs_a) + (strip + g) * kStride + t;
  for (int tile = 0; tile < tiles_per_block; ++tile) {
    const int64_t first_row = (static_cast<int64_t>(blockIdx.x) * tiles_per_block + tile) * kTiledRows;
    if (first_row >= batch.num_rows) break;
    __syncthreads();  // the tile before is done with
    tiled_softmax<kMax, kStride>(batch.a, batch, head, first_row, 0, 1, probs_a);
    tiled_softmax<kMax, kStride>(batch.b, batch, head, first_row, 0, batch.repeats, probs_b);
    float sums[kStrips][4] = {};
    for (int first = 0; first < padded; first += kSlab) {
      const int count = min(kSlab, padded - first);
      if (first > 0) __syncthreads();  // the slab before is done with
      if (tile == 0 || padded > kSlab) {
        load_centred<kMax, kColumnStride<kMax>>(matrix, joint_grad, head, first, count, k);
      }
      __syncthreads();
#pragma unroll 1
      for (int j = 0; j < count; j += 8) {
        Operand<4, kExact> a;
        Operand<2, kExact> b[kStrips];
        const float* row_b = matrix + (j + t) * kColumnStride<kMax> + half * 8 + g;
#pragma unroll
        for (int n = 0; n < kStrips; ++n) {
          b[n].set(0, row_b[n * 16]);
          b[n].set(1, row_b[n * 16 + 4 * kColumnStride<kMax>]);
        }
        const float* row_a = partner + first + j;
        a.set(0, row_a[0]);
        a.set(1, row_a[8 * kStride]);
        a.set(2, row_a[4]);
        a.set(3, row_a[8 * kStride + 4]);
        multiply_add(sums, a, b);
      }
    }
    for (int r = 0; r < batch.repeats; ++r) {
      if (batch.repeats > 1) {  // probs_b holds the sum: put this repeat there
        __syncthreads();
        tiled_softmax<kMax, kStride>(batch.b, batch, head, first_row, r, r + 1, probs_b);
        __syncthreads();
      }
      float dot[2] = {};
#pragma unroll
      for (int n = 0; n < kStrips; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          dot[e / 2] += sums[n][e] * own[e / 2 * 8 * kStride + n * 16 + half * 8 + 2 * t + e % 2];
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        dot[e] = group_sum<4>(dot[e]);
        if (t == 0) dots[half][view * kTiledRows + strip + g + e * 8] = dot[e];
      }
      __syncthreads();
      if (view == 0 && r > 0) continue;
      scalar_t* grad = view == 0 ? grad_a : grad_b + r * batch.num_rows * batch.num_heads * k;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = strip + g + e * 8;
        const int64_t i = first_row + row;
        if (i >= batch.num_rows) continue;
        const float all = dots[0][view * kTiledRows + row] + dots[1][view * kTiledRows + row];
        scalar_t* out = grad + (i * batch.num_heads + head) * k;
#pragma unroll
        for (int n = 0; n < kStrips; ++n) {
#pragma unroll
          for (int f = 0; f < 2; ++f) {
            const int c = n * 16 + half * 8 + 2 * t + f;
            if (c < k) out[c] = static_cast<scalar_t>(own[e * 8 * kStride + c] * (sums[n][e * 2 + f] - all));
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace iic_dist
