// IIC kernels for up to 160 clusters: a block owns a chunk of rows, the products run on the tensor cores.
//
// Tensor cores multiply bfloat16 fastest, too coarse for a probability. So one is kept as a sum of bfloat16 numbers,
// its planes: three give a float32 exactly, two of them 2^-17 relative, for logits of 16 bits. See multiply_planes.
#pragma once

#include <type_traits>

#include "iic_batch.cuh"
#include "tensor_core.cuh"

namespace iic_dist {

constexpr int kTiledMax = 160;
constexpr int kTiledLanes = 8;  // lanes that share a row in the softmax
constexpr int kTiledRows = 32;  // pairs in a tile

// A warp for 8 clusters.
template <int kMax>
constexpr int kTiledThreads = kMax / 8 * kWarp;

// Blocks that share a multiprocessor: the registers of larger K leave room for one.
template <int kMax>
constexpr int kTiledResident = kMax <= 48 ? 3 : kMax <= 80 ? 2 : 1;

template <typename scalar_t>
constexpr int kPlanes = std::is_same_v<scalar_t, float> ? 3 : 2;

// Probabilities of both views of a tile in shared memory: planes[plane][row][cluster]. The 16 bytes more than a row let
// eight rows, 16 bytes of each, meet no bank twice.
template <int kMax, int kPlaneCount>
struct TiledProbs {
  static constexpr int kStride = kMax + 8, kPlaneSize = kTiledRows * kStride, kViewSize = kPlaneCount * kPlaneSize;
  static constexpr int kBytes = 2 * kViewSize * sizeof(c10::BFloat16);
  c10::BFloat16* data;

  __device__ c10::BFloat16* at(int view, int plane, int row, int cluster) const {
    return data + view * kViewSize + plane * kPlaneSize + row * kStride + cluster;
  }
  __device__ void set_pair(int view, int row, int cluster, float first, float second) const {
    uint32_t bits[kPlaneCount];
    split(first, second, bits);
#pragma unroll
    for (int p = 0; p < kPlaneCount; ++p) *reinterpret_cast<uint32_t*>(at(view, p, row, cluster)) = bits[p];
  }
  __device__ float2 pair(int view, int row, int cluster) const {
    float2 sum = {0, 0};
#pragma unroll
    for (int p = kPlaneCount - 1; p >= 0; --p) {
      const uint32_t bits = *reinterpret_cast<const uint32_t*>(at(view, p, row, cluster));
      sum.x += __uint_as_float(bits << 16);
      sum.y += __uint_as_float(bits & 0xffff0000u);
    }
    return sum;
  }
};

// Softmax of 32 rows of one view, summed over the repeats [first, last); zeros past the batch and past the clusters.
template <int kMax, int kPlaneCount, typename scalar_t>
__device__ void tiled_softmax(const Batch<scalar_t>& batch, int view, int head, int64_t first_row, int first, int last,
                              const TiledProbs<kMax, kPlaneCount>& probs) {
  constexpr int kCols = kMax / kTiledLanes;
  const Rows<scalar_t> source = {view == 0 ? batch.a.data : batch.b.data,
                                 view == 0 ? batch.a.row_stride : batch.b.row_stride,
                                 view == 0 ? batch.a.head_stride : batch.b.head_stride};
  const int lane = threadIdx.x % kTiledLanes;
  for (int row = threadIdx.x / kTiledLanes; row < kTiledRows; row += kTiledThreads<kMax> / kTiledLanes) {
    const int64_t i = first_row + row;
    float sum[kCols] = {};
    for (int r = first; r < last; ++r) {
      const scalar_t* logits = i < batch.num_rows ? source.at(r * batch.num_rows + i, head) : nullptr;
      float p[kCols];
      softmax_row<kTiledLanes, 2>(logits, batch.num_clusters, p);
#pragma unroll
      for (int j = 0; j < kCols; ++j) sum[j] += p[j];
    }
#pragma unroll
    for (int j = 0; j < kCols; j += 2) {
      probs.set_pair(view, row, j * kTiledLanes + lane * 2, sum[j], sum[j + 1]);
    }
  }
}

// Writes two clusters side by side of a row of k, an even one first: at once where all rows begin at an even place.
template <typename scalar_t>
__device__ void store_pair(scalar_t* row, int cluster, int k, float first, float second) {
  if (cluster >= k) return;
  if (k % 2 == 0) {
    if constexpr (std::is_same_v<scalar_t, float>) {
      *reinterpret_cast<float2*>(row + cluster) = make_float2(first, second);
    } else {
      *reinterpret_cast<uint32_t*>(row + cluster) = pack<scalar_t>(first, second);
    }
    return;
  }
  row[cluster] = static_cast<scalar_t>(first);
  if (cluster + 1 < k) row[cluster + 1] = static_cast<scalar_t>(second);
}

namespace {

// A block owns a chunk of the rows of one head; a warp owns a strip of 16 rows of the joint and half of its columns, in
// registers. Shared memory holds the probabilities of a tile of 32 pairs.
template <int kMax, typename scalar_t>
__global__ void __launch_bounds__(kTiledThreads<kMax>, kTiledResident<kMax>)
    iic_tiled_joint_kernel(Batch<scalar_t> batch, int tiles_per_block, float* partial) {
  constexpr int kCount = kPlanes<scalar_t>, kTiles = kMax / 16, kSteps = kTiledRows / 16;
  extern __shared__ __align__(16) unsigned char tile_memory[];
  const TiledProbs<kMax, kCount> probs = {reinterpret_cast<c10::BFloat16*>(tile_memory)};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, k = batch.num_clusters;
  const int first_i = warp / 2 * 16, first_j = warp % 2 * (kMax / 2);
  float sums[kTiles][4] = {};
  for (int tile = 0; tile < tiles_per_block; ++tile) {
    const int64_t first_row = (static_cast<int64_t>(blockIdx.x) * tiles_per_block + tile) * kTiledRows;
    if (first_row >= batch.num_rows) break;
#pragma unroll 1  // half as many instructions to fetch
    for (int view = 0; view < 2; ++view) {
      tiled_softmax(batch, view, blockIdx.y, first_row, 0, view == 0 ? 1 : batch.repeats, probs);
    }
    __syncthreads();
    if (first_i < k) {
      uint32_t a[kSteps][kCount][4];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int p = 0; p < kCount; ++p) {
          const int row = step * 16 + lane / 16 * 8 + lane % 8, column = first_i + lane / 8 % 2 * 8;
          load_matrices_transposed(a[step][p], probs.at(0, p, row, column));
        }
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (first_j + n * 8 >= k) break;
        uint32_t b[kCount][4];  // of both steps
#pragma unroll
        for (int p = 0; p < kCount; ++p) load_matrices_transposed(b[p], probs.at(1, p, lane, first_j + n * 8));
        float large[4] = {}, small[4] = {};  // tensor cores truncate when they add: keep their chains short
#pragma unroll
        for (int step = 0; step < kSteps; ++step) multiply_planes<2>(large, small, a[step], b, step);
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[n][e] += large[e] + small[e];
      }
    }
    __syncthreads();
  }
  float* out = partial + (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * k * k;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int i = first_i + e / 2 * 8 + lane / 4, j = first_j + n * 8 + lane % 4 * 2;
      if (i < k) store_pair(out + i * k, j, k, sums[n][e], sums[n][e + 1]);
    }
  }
}

// Rows [first, first + 64) of one head's gradient of the joint, centred (see load_centred), where the probabilities of
// both views belong; zeros from row and column K on.
template <int kMax, int kPlaneCount>
__device__ void tiled_centred(const float* matrix, int k, float scale, int first,
                              const TiledProbs<kMax, kPlaneCount>& probs) {
  constexpr int kCols = kMax / kTiledLanes;
  const int lane = threadIdx.x % kTiledLanes;
  for (int row = threadIdx.x / kTiledLanes; row < 2 * kTiledRows; row += kTiledThreads<kMax> / kTiledLanes) {
    const float* source = matrix + (first + row) * k;
    float value[kCols], sum = 0;
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const int col = (j / 2 * kTiledLanes + lane) * 2 + j % 2;
      value[j] = first + row < k && col < k ? source[col] : 0.f;
      sum += value[j];
    }
    const float mean = group_sum<kTiledLanes>(sum) / k;
#pragma unroll
    for (int j = 0; j < kCols; j += 2) {
      const int col = j * kTiledLanes + lane * 2;
      const float left = col < k ? (value[j] - mean) * scale : 0.f;
      const float right = col + 1 < k ? (value[j + 1] - mean) * scale : 0.f;
      probs.set_pair(row / kTiledRows, row % kTiledRows, col, left, right);
    }
  }
}

// Which part of the gradient a warp owns: 16 clusters of one view, or where the registers do not hold that much of the
// K x K matrix, 8 clusters of both.
template <int kMax>
struct TiledPart {
  static constexpr bool kWide = kMax <= 112;
  static constexpr int kViews = kWide ? 1 : 2, kTiles = kWide ? 2 : 1, kParts = kMax / 8 / kTiles;

  static __device__ int index() { return threadIdx.x / kWarp / kTiles; }
  static __device__ int first_view() { return kWide ? threadIdx.x / kWarp % 2 : 0; }
  static __device__ int first_cluster() { return index() * kTiles * 8; }
};

// A block owns a chunk of the rows of one head; a warp owns a part of the clusters, and keeps those columns of the
// centred gradient (see load_centred) in registers. Shared memory holds the probabilities of a tile of 32 pairs.
template <int kMax, typename scalar_t>
__global__ void __launch_bounds__(kTiledThreads<kMax>, kTiledResident<kMax>)
    iic_tiled_grad_kernel(Batch<scalar_t> batch, JointGrad joint_grad, int tiles_per_block, scalar_t* grad_a,
                          scalar_t* grad_b) {
  using Part = TiledPart<kMax>;
  constexpr int kCount = kPlanes<scalar_t>, kSteps = kMax / 16, kStrips = kTiledRows / 16;
  extern __shared__ __align__(16) unsigned char tile_memory[];
  __shared__ float dots[Part::kParts][2][kTiledRows];  // <z, g> of every row, in parts
  const TiledProbs<kMax, kCount> probs = {reinterpret_cast<c10::BFloat16*>(tile_memory)};
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4, head = blockIdx.y, k = batch.num_clusters;
  const int first_view = Part::first_view(), first_cluster = Part::first_cluster();
  const float* matrix = joint_grad.data + static_cast<int64_t>(head) * k * k;
  const float scale = joint_grad.grad_loss[head * joint_grad.grad_loss_stride];
  uint32_t b[kSteps][Part::kTiles][kCount][2];
#pragma unroll
  for (int first = 0; first < kSteps; first += 4) {
    if (first > 0) __syncthreads();  // the rows before have been read
    tiled_centred(matrix, k, scale, first * 16, probs);
    __syncthreads();
#pragma unroll
    for (int step = first; step < first + 4 && step < kSteps; step += 2) {
#pragma unroll
      for (int n = 0; n < Part::kTiles; ++n) {
#pragma unroll
        for (int p = 0; p < kCount; ++p) {
          uint32_t bits[4];  // of two steps
          load_matrices_transposed(bits, probs.at((step - first) / 2, p, lane, first_cluster + n * 8));
#pragma unroll
          for (int i = 0; i < 4 && step + i / 2 < kSteps; ++i) b[step + i / 2][n][p][i % 2] = bits[i];
        }
      }
    }
  }
  for (int tile = 0; tile < tiles_per_block; ++tile) {
    const int64_t first_row = (static_cast<int64_t>(blockIdx.x) * tiles_per_block + tile) * kTiledRows;
    if (first_row >= batch.num_rows) break;
    __syncthreads();  // the tile before is done with
#pragma unroll 1
    for (int view = 0; view < 2; ++view) {
      tiled_softmax(batch, view, head, first_row, 0, view == 0 ? 1 : batch.repeats, probs);
    }
    __syncthreads();
    float sums[Part::kViews][kStrips][Part::kTiles][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step * 16 >= k) break;
#pragma unroll
      for (int v = 0; v < Part::kViews; ++v) {
#pragma unroll
        for (int m = 0; m < kStrips; ++m) {
          uint32_t a[kCount][4];
#pragma unroll
          for (int p = 0; p < kCount; ++p) {
            load_matrices(a[p], probs.at(1 - first_view - v, p, m * 16 + lane % 16, step * 16 + lane / 16 * 8));
          }
#pragma unroll
          for (int n = 0; n < Part::kTiles; ++n) {
            multiply_planes<1>(sums[v][m][n], sums[v][m][n], a, b[step][n], 0);
          }
        }
      }
    }
    for (int r = 0; r < batch.repeats; ++r) {
      if (batch.repeats > 1) {  // the second view's probabilities are a sum: put this repeat there
        __syncthreads();
        tiled_softmax(batch, 1, head, first_row, r, r + 1, probs);
        __syncthreads();
      }
#pragma unroll
      for (int v = 0; v < Part::kViews; ++v) {
#pragma unroll
        for (int i = 0; i < kStrips * 2; ++i) {
          const int row = i * 8 + g;
          float dot = 0;
#pragma unroll
          for (int n = 0; n < Part::kTiles; ++n) {
            const float2 z = probs.pair(first_view + v, row, first_cluster + n * 8 + t * 2);
            const float* sum = sums[v][i / 2][n] + i % 2 * 2;
            dot += sum[0] * z.x + sum[1] * z.y;
          }
          dot = group_sum<4>(dot);
          if (t == 0) dots[Part::index()][first_view + v][row] = dot;
        }
      }
      __syncthreads();
#pragma unroll
      for (int v = 0; v < Part::kViews; ++v) {
        const int view = first_view + v;
        if (view == 0 && r > 0) continue;
        scalar_t* grad = view == 0 ? grad_a : grad_b + r * batch.num_rows * batch.num_heads * k;
#pragma unroll
        for (int i = 0; i < kStrips * 2; ++i) {
          const int row = i * 8 + g;
          if (first_row + row >= batch.num_rows) continue;
          float dot = 0;
#pragma unroll
          for (int part = 0; part < Part::kParts; ++part) dot += dots[part][view][row];
          scalar_t* out = grad + ((first_row + row) * batch.num_heads + head) * k;
#pragma unroll
          for (int n = 0; n < Part::kTiles; ++n) {
            const int cluster = first_cluster + n * 8 + t * 2;
            const float2 z = probs.pair(view, row, cluster);
            const float* sum = sums[v][i / 2][n] + i % 2 * 2;
            store_pair(out, cluster, k, z.x * (sum[0] - dot), z.y * (sum[1] - dot));
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace iic_dist
