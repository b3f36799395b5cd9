// IIC kernels for up to 32 clusters: a thread owns a row, its softmax in registers.
#pragma once

#include "iic_batch.cuh"

namespace iic_dist {

constexpr int kSmallMax = 32;
constexpr int kSmallThreads = 128;
constexpr int kSmallResident = 4;             // blocks that share a multiprocessor: up to 128 registers a thread
constexpr int kSmallRows = 64;                // pairs in a tile: half of the threads take one view, half the other
constexpr int kSmallStride = kSmallRows + 8;  // no bank conflict where lanes read four clusters of two row groups

// Softmax of 64 pairs as probs[view][cluster][row]; of the second view the sum over the repeats. p keeps the
// softmax of this thread's row, of its last repeat in the second view. Rows past the batch are zero.
template <int kMax, typename scalar_t>
__device__ void small_softmax(const Batch<scalar_t>& batch, int head, int64_t first_row,
                              float (&probs)[2][kMax][kSmallStride], float (&p)[kMax]) {
  const int view = threadIdx.x / kSmallRows, row = threadIdx.x % kSmallRows;
  const Rows<scalar_t> source = {view == 0 ? batch.a.data : batch.b.data,
                                 view == 0 ? batch.a.row_stride : batch.b.row_stride,
                                 view == 0 ? batch.a.head_stride : batch.b.head_stride};
  const int repeats = view == 0 ? 1 : batch.repeats;
  const int64_t i = first_row + row;
  for (int r = 0; r < repeats; ++r) {
    const scalar_t* logits = i < batch.num_rows ? source.at(r * batch.num_rows + i, head) : nullptr;
    softmax_row<1>(logits, batch.num_clusters, p);
#pragma unroll
    for (int c = 0; c < kMax; ++c) probs[view][c][row] = r == 0 ? p[c] : probs[view][c][row] + p[c];
  }
}

namespace {

// A block owns a chunk of the rows of one head; a thread owns 4 x 4 sums over every kSlices-th group of 4 rows of a
// tile (and one row of one view in the softmax). Shared memory holds the softmaxes of a tile of 64 pairs.
template <int kMax, typename scalar_t>
__global__ void __launch_bounds__(kSmallThreads, kSmallResident)
    iic_small_joint_kernel(Batch<scalar_t> batch, int tiles_per_block, float* partial) {
  constexpr int kSide = kMax / 4, kSlices = kSmallThreads / (kSide * kSide);
  alignas(16) __shared__ float probs[2][kMax][kSmallStride];
  const int slice = threadIdx.x % kSlices, patch = threadIdx.x / kSlices;
  const int first_i = patch / kSide, first_j = patch % kSide;
  float sums[4][4] = {};
  for (int tile = 0; tile < tiles_per_block; ++tile) {
    const int64_t first_row = (static_cast<int64_t>(blockIdx.x) * tiles_per_block + tile) * kSmallRows;
    if (first_row >= batch.num_rows) break;
    float unused[kMax];
    small_softmax(batch, blockIdx.y, first_row, probs, unused);
    __syncthreads();
#pragma unroll 1
    for (int row = slice * 4; row < kSmallRows; row += kSlices * 4) {
      float4 a[4], b[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        a[k] = *reinterpret_cast<const float4*>(&probs[0][first_i + k * kSide][row]);
        b[k] = *reinterpret_cast<const float4*>(&probs[1][first_j + k * kSide][row]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[i][j] += a[i].x * b[j].x + a[i].y * b[j].y + a[i].z * b[j].z + a[i].w * b[j].w;
        }
      }
    }
    __syncthreads();
  }
  const int k = batch.num_clusters;
  float* out = partial + (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * k * k;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float sum = group_sum<kSlices>(sums[i][j]);
      const int row = first_i + i * kSide, col = first_j + j * kSide;
      if (slice == 0 && row < k && col < k) out[row * k + col] = sum;
    }
  }
}

// z * (g - <z, g>) of one row, in registers; writes the first num_clusters.
template <int kMax, typename scalar_t>
__device__ void small_write_grad(const float (&p)[kMax], const float (&g)[kMax], int num_clusters, scalar_t* out) {
  float dot = 0;
#pragma unroll
  for (int c = 0; c < kMax; ++c) dot += p[c] * g[c];
#pragma unroll
  for (int c = 0; c < kMax; ++c) {
    if (c < num_clusters) out[c] = static_cast<scalar_t>(p[c] * (g[c] - dot));
  }
}

// A block owns 64 pairs of one head; a thread owns one row of one view (of all its repeats in the second view).
// Shared memory holds the softmaxes of both views, which a thread needs of its partner, and the centred gradient.
template <int kMax, typename scalar_t>
__global__ void __launch_bounds__(kSmallThreads, kSmallResident)
    iic_small_grad_kernel(Batch<scalar_t> batch, JointGrad joint_grad, scalar_t* grad_a, scalar_t* grad_b) {
  alignas(16) __shared__ float probs[2][kMax][kSmallStride];
  alignas(16) __shared__ float matrix[kMax][kMax];
  const int head = blockIdx.y, k = batch.num_clusters;
  const int view = threadIdx.x / kSmallRows, row = threadIdx.x % kSmallRows;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kSmallRows, i = first_row + row;
  load_centred<kMax, kMax>(&matrix[0][0], joint_grad, head, 0, kMax, k);
  float p[kMax];
  small_softmax(batch, head, first_row, probs, p);
  __syncthreads();
  if (i >= batch.num_rows) return;
  float g[kMax] = {};
  for (int j = 0; j < k; ++j) {
    const float partner = probs[1 - view][j][row];
#pragma unroll
    for (int c = 0; c < kMax; ++c) g[c] += matrix[j][c] * partner;
  }
  if (view == 0) {
    small_write_grad(p, g, k, grad_a + (i * batch.num_heads + head) * k);
    return;
  }
  for (int r = batch.repeats - 1; r >= 0; --r) {  // backwards: the last repeat's softmax is still in p
    const int64_t repeat_row = r * batch.num_rows + i;
    if (r < batch.repeats - 1) softmax_row<1>(batch.b.at(repeat_row, head), k, p);
    small_write_grad(p, g, k, grad_b + (repeat_row * batch.num_heads + head) * k);
  }
}

}  // namespace
}  // namespace iic_dist
