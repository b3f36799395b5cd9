// What the IIC kernels of every size share: the batch they read, the centred gradient, the sum of partial results.
#pragma once

#include "reduce.cuh"

namespace iic_dist {

// Both views: a has num_rows rows (N), b has repeats * num_rows; repeat r of sample i stands in row r*N + i.
template <typename scalar_t>
struct Batch {
  Rows<scalar_t> a, b;
  int64_t num_rows;
  int repeats, num_heads, num_clusters;
};

// d loss / d joint of every head, (H, K, K), and the gradient of the losses that multiplies it.
struct JointGrad {
  const float* data;
  const float* grad_loss;
  int64_t grad_loss_stride;
};

// Copies one head's K x K gradient to `out`, minus each row's mean, times grad_loss; zeros from row and column K on. A
// constant per row of G adds the same to all g_i of G^T z and cancels in g - <z, g>; taken out beforehand, it leaves no
// rounding error behind. kMax: a multiple of 16, on whole warps.
template <int kMax>
__device__ void load_centred(float* out, const JointGrad& grad, int head, int num_clusters) {
  constexpr int kLanes = 8, kCols = kMax / kLanes;
  const int lane = threadIdx.x % kLanes;
  const float scale = grad.grad_loss[head * grad.grad_loss_stride];
  const float* matrix = grad.data + static_cast<int64_t>(head) * num_clusters * num_clusters;
  for (int row = threadIdx.x / kLanes; row < kMax; row += blockDim.x / kLanes) {
    float value[kCols], sum = 0;
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const int col = lane + j * kLanes;
      value[j] = row < num_clusters && col < num_clusters ? matrix[row * num_clusters + col] : 0.f;
      sum += value[j];
    }
    const float mean = group_sum<kLanes>(sum) / num_clusters;
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const int col = lane + j * kLanes;
      out[row * kMax + col] = col < num_clusters ? (value[j] - mean) * scale : 0.f;
    }
  }
}

namespace {

// A thread owns one entry of the sums and adds what the chunks of its head hold, in order; the last thread writes
// the number of pairs. Nothing in shared memory.
__global__ void __launch_bounds__(256)
    iic_sum_chunks_kernel(const float* partial, int chunks, int matrix_size, int64_t num_entries, float num_pairs,
                          float* sums) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (entry > num_entries) return;
  float sum = 0;
  if (entry < num_entries) {
    const int64_t head = entry / matrix_size;
    const float* source = partial + head * chunks * matrix_size + entry % matrix_size;
    sum = sum_in_batches<float>(chunks,
                                [&](int chunk) { return source[static_cast<int64_t>(chunk) * matrix_size]; });
  }
  sums[entry] = entry < num_entries ? sum : num_pairs;
}

}  // namespace
}  // namespace iic_dist
