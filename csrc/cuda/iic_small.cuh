// IIC kernels for up to 32 clusters: a thread owns a row, its softmax in registers.
#pragma once

#include "iic_batch.cuh"

namespace iic_dist {

constexpr int kSmallMax = 32;
constexpr int kSmallThreads = 128;
constexpr int kSmallRows = 64;                // pairs in a tile: half of the threads take one view, half the other
constexpr int kSmallStride = kSmallRows + 8;  // no bank conflict where lanes read four clusters of two row groups

// Blocks that share a multiprocessor.
template <int kMax>
constexpr int kSmallResident = kMax <= 16 ? 4 : 2;

// Rows [first_row, first_row + 64) of one view and head on their way between global memory, where neighbouring threads
// take neighbouring values, and shared memory, where each thread takes a row: rows[row * (k | 1) + cluster], no bank
// conflict. An element is (e / k, e % k), with the division by a product that is exact below 2048.
template <int kMax>
struct SmallRows {
  static constexpr int kSize = kSmallRows * (kMax + 1), kEach = kSmallRows * kMax / kSmallThreads;
  float* rows;
  int k;

  __device__ const float* row(int index) const { return rows + index * (k | 1); }

  static __device__ int magic(int k) { return (65535 + k) / k; }

  // Calls visit(i, row, cluster, place) for the elements of this thread, where the batch has them.
  template <typename Visit>
  __device__ void each(int64_t rows_left, const Visit& visit) const {
    const int inverse = magic(k);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int e = threadIdx.x + i * kSmallThreads, row = e * inverse >> 16, cluster = e - row * k;
      if (row < kSmallRows && row < rows_left) visit(i, row, cluster, row * (k | 1) + cluster);
    }
  }
};

// The logits of 64 rows in registers, as they go to shared memory; what is not there is a copy of something, since a
// branch would let one load wait for the other.
template <int kMax, typename scalar_t>
__device__ void small_fetch(const Rows<scalar_t>& view, int head, int64_t first_row, int64_t rows_left, int k,
                            float (&values)[SmallRows<kMax>::kEach]) {
  const int magic = SmallRows<kMax>::magic(k);
  const int last = static_cast<int>(rows_left < kSmallRows ? rows_left : kSmallRows) - 1;
#pragma unroll
  for (int i = 0; i < SmallRows<kMax>::kEach; ++i) {
    const int e = threadIdx.x + i * kSmallThreads, row = min(e * magic >> 16, last), cluster = min(e - row * k, k - 1);
    values[i] = static_cast<float>(view.at(first_row + row, head)[cluster]);
  }
}

template <int kMax>
__device__ void small_put(const SmallRows<kMax>& shape, int64_t rows_left,
                          const float (&values)[SmallRows<kMax>::kEach]) {
  shape.each(rows_left, [&](int i, int row, int cluster, int place) { shape.rows[place] = values[i]; });
}

// Softmax of 64 pairs as probs[view][cluster][row]; of the second view the sum over the repeats. p keeps the softmax of
// this thread's row, of its last repeat in the second view. Rows past the batch are zero.
template <int kMax, typename scalar_t>
__device__ void small_softmax(const Batch<scalar_t>& batch, int head, int64_t first_row,
                              float (&probs)[2][kMax][kSmallStride], float (&p)[kMax]) {
  const int view = threadIdx.x / kSmallRows, row = threadIdx.x % kSmallRows;
  const int64_t i = first_row + row;
  for (int r = 0; r < (view == 0 ? 1 : batch.repeats); ++r) {
    const scalar_t* logits = nullptr;
    if (i < batch.num_rows) logits = view == 0 ? batch.a.at(i, head) : batch.b.at(r * batch.num_rows + i, head);
    softmax_row<1>(logits, batch.num_clusters, p);
#pragma unroll
    for (int c = 0; c < kMax; ++c) probs[view][c][row] = r == 0 ? p[c] : probs[view][c][row] + p[c];
  }
}

// Likewise by way of `rows` in shared memory; `between` runs while the first logits are on their way. It saves a
// quarter of the gradient's time at 1024 x 10 on an H100, and costs the joint as much. Every thread must call.
template <int kMax, typename scalar_t, typename Between>
__device__ void small_softmax_through(const Batch<scalar_t>& batch, int head, int64_t first_row, float* rows,
                                      float (&probs)[2][kMax][kSmallStride], float (&p)[kMax],
                                      const Between& between) {
  const int view = threadIdx.x / kSmallRows, row = threadIdx.x % kSmallRows, k = batch.num_clusters;
  const int64_t rows_left = batch.num_rows - first_row;
  const SmallRows<kMax> rows_a = {rows, k}, rows_b = {rows + SmallRows<kMax>::kSize, k};
  for (int r = 0; r < batch.repeats; ++r) {
    float values_a[SmallRows<kMax>::kEach], values_b[SmallRows<kMax>::kEach];
    if (r == 0) small_fetch<kMax>(batch.a, head, first_row, rows_left, k, values_a);
    small_fetch<kMax>(batch.b, head, r * batch.num_rows + first_row, rows_left, k, values_b);
    if (r == 0) between();
    if (r > 0) __syncthreads();  // the repeat before has been read
    if (r == 0) small_put(rows_a, rows_left, values_a);
    small_put(rows_b, rows_left, values_b);
    __syncthreads();
    if (view == 0 && r > 0) continue;
    const float* const logits = rows_a.row(row) + view * SmallRows<kMax>::kSize;
    softmax_row<1>(row < rows_left ? logits : nullptr, k, p);
#pragma unroll
    for (int c = 0; c < kMax; ++c) probs[view][c][row] = r == 0 ? p[c] : probs[view][c][row] + p[c];
  }
}

namespace {

// A block owns a chunk of the rows of one head; a thread owns 4 x 4 sums over every kSlices-th group of 4 rows of a
// tile (and one row of one view in the softmax). Shared memory holds the softmaxes of a tile of 64 pairs.
template <int kMax, typename scalar_t>
__global__ void __launch_bounds__(kSmallThreads, kSmallResident<kMax>)
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

// A block owns 64 pairs of one head; a thread owns one row of one view (of all its repeats in the second view).
// Shared memory holds logits, and later gradients, and softmaxes of both views, which a thread needs of its partner,
// and the centred gradient.
template <int kMax, typename scalar_t>
__global__ void __launch_bounds__(kSmallThreads, kSmallResident<kMax>)
    iic_small_grad_kernel(Batch<scalar_t> batch, JointGrad joint_grad, scalar_t* grad_a, scalar_t* grad_b) {
  alignas(16) __shared__ float probs[2][kMax][kSmallStride];
  alignas(16) __shared__ float matrix[kMax][kMax];
  __shared__ float rows[2 * SmallRows<kMax>::kSize];
  const int head = blockIdx.y, k = batch.num_clusters;
  const int view = threadIdx.x / kSmallRows, row = threadIdx.x % kSmallRows;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kSmallRows, rows_left = batch.num_rows - first_row;
  float p[kMax];
  small_softmax_through(batch, head, first_row, rows, probs, p,
                        [&] { load_centred<kMax>(&matrix[0][0], joint_grad, head, k); });
  __syncthreads();
  float g[kMax] = {};
  for (int j = 0; j < k; ++j) {
    const float partner = probs[1 - view][j][row];
#pragma unroll
    for (int c = 0; c < kMax; ++c) g[c] += matrix[j][c] * partner;
  }
  const auto copy_out = [&](const float* source, int64_t first, scalar_t* grad) {
    SmallRows<kMax>{nullptr, k}.each(rows_left, [&](int i, int at, int cluster, int place) {
      grad[((first + at) * batch.num_heads + head) * k + cluster] = static_cast<scalar_t>(source[place]);
    });
  };
  for (int r = batch.repeats - 1; r >= 0; --r) {  // backwards: the last repeat's softmax is still in p
    const bool last = r == batch.repeats - 1;
    const int64_t repeat_row = r * batch.num_rows + first_row;
    if (!last && view == 1) {
      softmax_row<1>(row < rows_left ? batch.b.at(repeat_row + row, head) : nullptr, k, p);
    }
    if (last || view == 1) {
      float dot = 0;
#pragma unroll
      for (int c = 0; c < kMax; ++c) dot += p[c] * g[c];
#pragma unroll
      for (int c = 0; c < kMax; ++c) {
        if (c < k) rows[view * SmallRows<kMax>::kSize + row * (k | 1) + c] = p[c] * (g[c] - dot);
      }
    }
    __syncthreads();
    if (last) copy_out(rows, first_row, grad_a);
    copy_out(rows + SmallRows<kMax>::kSize, repeat_row, grad_b);
    if (r > 0) __syncthreads();  // before the next repeat's gradients take their place
  }
}

}  // namespace
}  // namespace iic_dist
