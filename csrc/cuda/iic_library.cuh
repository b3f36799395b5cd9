// IIC kernels for many clusters, and for float64: the element-wise parts around the library's matrix products.
#pragma once

#include "iic_batch.cuh"

namespace iic_dist {

constexpr int kLibraryThreads = 256;
constexpr int kLibraryRows = kLibraryThreads / kWarp;  // rows in a block: a warp each

// The largest logit of a row and the reciprocal sum of exp(logit - largest), by a whole warp.
template <typename acc_t>
struct SoftmaxScale {
  acc_t largest, reciprocal;
};

template <typename acc_t, typename scalar_t>
__device__ SoftmaxScale<acc_t> softmax_scale(const scalar_t* row, int num_cols) {
  const int lane = threadIdx.x % kWarp;
  acc_t largest = -INFINITY;
  for (int c = lane; c < num_cols; c += kWarp) {
    const acc_t x = static_cast<acc_t>(row[c]);
    largest = x > largest ? x : largest;
  }
  largest = group_max<kWarp>(largest);
  acc_t sum = 0;
  for (int c = lane; c < num_cols; c += kWarp) sum += std::exp(static_cast<acc_t>(row[c]) - largest);
  return {largest, 1 / group_sum<kWarp>(sum)};
}

namespace {

// In all three launch bounds, the 1 keeps ptxas from spilling float64 registers for the sake of occupancy.

// A block owns 8 rows of one head, a warp one of them; with kCols, a lane keeps that many values of it in registers.
// Nothing in shared memory.
template <int kCols, typename acc_t, typename operand_t, typename scalar_t>
__global__ void __launch_bounds__(kLibraryThreads, 1)
    iic_softmax_kernel(Rows<scalar_t> logits, int64_t num_rows, int num_clusters, operand_t* probs) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kLibraryRows + threadIdx.x / kWarp;
  if (row >= num_rows) return;
  const scalar_t* source = logits.at(row, blockIdx.y);
  operand_t* out = probs + (row * gridDim.y + blockIdx.y) * num_clusters;
  if constexpr (kCols > 0) {
    float p[kCols];
    softmax_row<kWarp>(source, num_clusters, p);
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const int c = threadIdx.x % kWarp + j * kWarp;
      if (c < num_clusters) out[c] = static_cast<operand_t>(p[j]);
    }
    return;
  }
  const auto scale = softmax_scale<acc_t>(source, num_clusters);
  for (int c = threadIdx.x % kWarp; c < num_clusters; c += kWarp) {
    const acc_t x = static_cast<acc_t>(source[c]);
    out[c] = static_cast<operand_t>(std::exp(x - scale.largest) * scale.reciprocal);
  }
}

// A block owns 8 rows of the (H * K, K) gradient, a warp one of them. Nothing in shared memory. Writes each row
// minus its mean, times grad_loss: see load_centred. It makes rounding to 16 bits harmless, too.
template <typename acc_t, typename operand_t>
__global__ void __launch_bounds__(kLibraryThreads, 1)
    iic_centre_kernel(const acc_t* joint_grad, const acc_t* grad_loss, int64_t grad_loss_stride, int64_t num_rows,
                      int num_clusters, operand_t* centred) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kLibraryRows + threadIdx.x / kWarp;
  if (row >= num_rows) return;
  const int lane = threadIdx.x % kWarp;
  const acc_t* source = joint_grad + row * num_clusters;
  const acc_t scale = grad_loss[row / num_clusters * grad_loss_stride];
  acc_t sum = 0;
#pragma unroll 16
  for (int c = lane; c < num_clusters; c += kWarp) sum += source[c];
  const acc_t mean = group_sum<kWarp>(sum) / num_clusters;
#pragma unroll 8
  for (int c = lane; c < num_clusters; c += kWarp) {
    centred[row * num_clusters + c] = static_cast<operand_t>((source[c] - mean) * scale);
  }
}

// A block owns 8 rows of one head, a warp one of them: z * (g - <z, g>), where row r*N + i of the logits takes row
// i of g, (H, N, K); with kCols, a lane keeps that many values of each in registers. Nothing in shared memory.
template <int kCols, typename acc_t, typename scalar_t>
__global__ void __launch_bounds__(kLibraryThreads, 1)
    iic_softmax_grad_kernel(Rows<scalar_t> logits, const acc_t* grad_probs, int64_t num_rows, int64_t num_samples,
                            int num_clusters, scalar_t* grad) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kLibraryRows + threadIdx.x / kWarp;
  if (row >= num_rows) return;
  const int lane = threadIdx.x % kWarp;
  const scalar_t* source = logits.at(row, blockIdx.y);
  const acc_t* g = grad_probs + (blockIdx.y * num_samples + row % num_samples) * num_clusters;
  scalar_t* out = grad + (row * gridDim.y + blockIdx.y) * num_clusters;
  if constexpr (kCols > 0) {
    float p[kCols], value[kCols], dot = 0;
#pragma unroll
    for (int j = 0; j < kCols; ++j) value[j] = lane + j * kWarp < num_clusters ? g[lane + j * kWarp] : 0.f;
    softmax_row<kWarp>(source, num_clusters, p);
#pragma unroll
    for (int j = 0; j < kCols; ++j) dot += p[j] * value[j];
    dot = group_sum<kWarp>(dot);
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const int c = lane + j * kWarp;
      if (c < num_clusters) out[c] = static_cast<scalar_t>(p[j] * (value[j] - dot));
    }
    return;
  }
  const auto scale = softmax_scale<acc_t>(source, num_clusters);
  acc_t dot = 0;
  for (int c = lane; c < num_clusters; c += kWarp) {
    dot += std::exp(static_cast<acc_t>(source[c]) - scale.largest) * g[c];
  }
  dot = group_sum<kWarp>(dot) * scale.reciprocal;
  for (int c = lane; c < num_clusters; c += kWarp) {
    const acc_t x = static_cast<acc_t>(source[c]);
    out[c] = static_cast<scalar_t>(std::exp(x - scale.largest) * scale.reciprocal * (g[c] - dot));
  }
}

}  // namespace
}  // namespace iic_dist
