// From the sums of outer products to the terms of the IIC loss and the gradient of the joint.
//
//   P = max((M + M^T) / 2T, eps),  q = max(row sums, eps),  A = ln P - w (ln q_row + ln q_col)
//   loss = -sum P A,  mutual information = sum P (ln P - ln q_row - ln q_col),  gradient = -A / T
#pragma once

#include <cooperative_groups.h>

#include "reduce.cuh"

namespace iic_dist {

constexpr int kOneBlockMax = 104;  // clusters; the K x K matrix of a head then fits 48 KiB
constexpr int kInformationBlocks = 8;  // most in a cluster that any device with clusters has room for
constexpr int kInformationTile = 32;
constexpr int kInformationThreads = 256;
constexpr int kMarginalThreads = 1024;

template <typename acc_t>
struct InformationArgs {
  const acc_t* sums;  // H matrices, then T
  int num_clusters, num_heads;
  acc_t entropy_weight, eps;
  acc_t *loss, *mutual_information, *entropy, *conditional_entropy;  // (H,)
  acc_t *joint, *joint_grad;                                         // (H, K, K)

  __device__ acc_t num_pairs() const {
    return sums[static_cast<int64_t>(num_heads) * num_clusters * num_clusters];
  }

  // Writes one entry of both matrices of a head; adds to minus the loss and to the mutual information. per_pair: 1 / T.
  __device__ void entry(int64_t index, acc_t two_sums, acc_t per_pair, acc_t independent, acc_t& score_sum,
                        acc_t& information) const {
    const acc_t p = clamp_min(two_sums * (per_pair / 2), eps);
    const acc_t log_p = std::log(p);
    const acc_t score = log_p - entropy_weight * independent;
    score_sum += p * score;
    information += p * (log_p - independent);
    joint[index] = p;
    joint_grad[index] = -score * per_pair;
  }

  __device__ void finish(int head, acc_t score_sum, acc_t information, acc_t marginal_entropy) const {
    loss[head] = -score_sum;
    mutual_information[head] = information;
    entropy[head] = marginal_entropy;
    conditional_entropy[head] = marginal_entropy - information;
  }
};

namespace {

// A cluster of blocks owns one head, a warp pieces of rows of its matrix; all blocks work out all marginals. Shared
// memory holds the matrix M, with an odd stride against bank conflicts, and the logarithms of the marginals; that of
// the first block takes the sums of the others.
__global__ void __launch_bounds__(1024) iic_information_kernel(InformationArgs<float> args) {
  constexpr int kSide = (kOneBlockMax + kWarp - 1) / kWarp;  // rows of a warp, and columns of a lane
  extern __shared__ float shared[];
  __shared__ float scratch[3][kWarp];
  [[maybe_unused]] __shared__ float parts[kInformationBlocks][2];
  const int k = args.num_clusters, stride = k | 1, head = blockIdx.y, block = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  float *matrix = shared, *log_marginal = shared + k * stride;
  const int64_t offset = static_cast<int64_t>(head) * k * k;
  const float per_pair = 1 / args.num_pairs();
#if __CUDA_ARCH__ >= 900
  const auto cluster = cooperative_groups::this_cluster();
  cluster.barrier_arrive();
#endif
  float values[kSide][kSide];
#pragma unroll
  for (int r = 0; r < kSide; ++r) {
#pragma unroll
    for (int c = 0; c < kSide; ++c) {
      const int i = warp + r * num_warps, j = lane + c * kWarp;
      values[r][c] = i < k && j < k ? args.sums[offset + i * k + j] : 0.f;
    }
  }
#pragma unroll
  for (int r = 0; r < kSide; ++r) {
#pragma unroll
    for (int c = 0; c < kSide; ++c) {
      const int i = warp + r * num_warps, j = lane + c * kWarp;
      if (i < k && j < k) matrix[i * stride + j] = values[r][c];
    }
  }
  __syncthreads();
  float entropy = 0;
#pragma unroll
  for (int r = 0; r < kSide; ++r) {  // no branch around the sums: one need not wait for the other
    const int i = warp + r * num_warps;
    float sum = 0;
#pragma unroll
    for (int c = 0; c < kSide; ++c) {
      const int j = lane + c * kWarp;
      sum += values[r][c] + (i < k && j < k ? matrix[j * stride + i] : 0.f);
    }
    const float marginal = clamp_min(group_sum<kWarp>(sum) * (per_pair / 2), args.eps);
    const float log = std::log(marginal);
    if (lane == 0 && i < k) {
      log_marginal[i] = log;
      entropy -= marginal * log;
    }
  }
  __syncthreads();
  float score_sum = 0, information = 0;
  const int pieces = (k + kWarp - 1) / kWarp;  // of a row, one a warp
  for (int piece = block * num_warps + warp; piece < k * pieces; piece += gridDim.x * num_warps) {
    const int i = piece / pieces, j = piece % pieces * kWarp + lane;
    if (j >= k) continue;
    args.entry(offset + i * k + j, matrix[i * stride + j] + matrix[j * stride + i], per_pair,
               log_marginal[i] + log_marginal[j], score_sum, information);
  }
  const float mine[3] = {group_sum<kWarp>(score_sum), group_sum<kWarp>(information), group_sum<kWarp>(entropy)};
#pragma unroll
  for (int e = 0; e < 3; ++e) {
    if (lane == 0) scratch[e][warp] = mine[e];
  }
  __syncthreads();
  float sums[3];
#pragma unroll
  for (int e = 0; e < 3; ++e) sums[e] = group_sum<kWarp>(lane < num_warps ? scratch[e][lane] : 0.f);
#if __CUDA_ARCH__ >= 900
  cluster.barrier_wait();  // the first block runs
  if (threadIdx.x < 2) *cluster.map_shared_rank(&parts[block][threadIdx.x], 0) = threadIdx.x == 0 ? sums[0] : sums[1];
  cluster.sync();
  if (block > 0) return;
  sums[0] = sums[1] = 0;
  for (int other = 0; other < static_cast<int>(gridDim.x); ++other) {
    sums[0] += parts[other][0];
    sums[1] += parts[other][1];
  }
#endif
  if (threadIdx.x == 0) args.finish(head, sums[0], sums[1], sums[2]);
}

// A block owns 32 marginals of one head; a warp sums a row, a thread also a part of one column. Shared memory holds
// the row sums and 32 parts of each column sum. Writes (2, H, K): logarithms, and parts of the entropy.
template <typename acc_t>
__global__ void __launch_bounds__(kMarginalThreads)
    iic_marginal_kernel(InformationArgs<acc_t> args, acc_t* marginals) {
  constexpr int kParts = kMarginalThreads / kWarp;
  __shared__ acc_t row_sums[kWarp], column_sums[kParts][kWarp];
  const int k = args.num_clusters, head = blockIdx.y, first = blockIdx.x * kWarp;
  const int lane = threadIdx.x % kWarp, part = threadIdx.x / kWarp, column = first + lane;
  const acc_t* matrix = args.sums + static_cast<int64_t>(head) * k * k;
  for (int row = part; row < kWarp; row += kParts) {
    acc_t sum = 0;
    if (first + row < k) {
      const acc_t* source = matrix + static_cast<int64_t>(first + row) * k + lane;
      sum = sum_in_batches<acc_t>((k - lane + kWarp - 1) / kWarp, [&](int j) { return source[j * kWarp]; });
    }
    sum = group_sum<kWarp>(sum);
    if (lane == 0) row_sums[row] = sum;
  }
  acc_t sum = 0;
  if (column < k) {
    const acc_t* source = matrix + static_cast<int64_t>(part) * k + column;
    sum = sum_in_batches<acc_t>((k - part + kParts - 1) / kParts,
                                [&](int i) { return source[static_cast<int64_t>(i) * kParts * k]; });
  }
  column_sums[part][lane] = sum;
  __syncthreads();
  if (part > 0 || column >= k) return;
  acc_t total = row_sums[lane];
  for (int other = 0; other < kParts; ++other) total += column_sums[other][lane];
  const acc_t marginal = clamp_min(total / (2 * args.num_pairs()), args.eps);
  const int64_t index = static_cast<int64_t>(head) * k + column;
  marginals[index] = std::log(marginal);
  marginals[static_cast<int64_t>(args.num_heads) * k + index] = -marginal * std::log(marginal);
}

// A block owns a 32 x 32 tile of one head's matrices, a thread 4 entries of it. Shared memory holds the mirror image
// of the tile. Writes (H, tiles, 2): the tile's part of minus the loss and of the mutual information.
template <typename acc_t>
__global__ void __launch_bounds__(kInformationThreads)
    iic_terms_kernel(InformationArgs<acc_t> args, const acc_t* marginals, acc_t* partial) {
  constexpr int kTile = kInformationTile, kStep = kInformationThreads / kTile;
  __shared__ acc_t mirror[kTile][kTile + 1], scratch[kWarp];
  const int k = args.num_clusters, head = blockIdx.z, first_i = blockIdx.y * kTile, first_j = blockIdx.x * kTile;
  const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  const int64_t offset = static_cast<int64_t>(head) * k * k;
  const acc_t* log_marginal = marginals + static_cast<int64_t>(head) * k;
  acc_t own[kTile / kStep], independent[kTile / kStep];
  const acc_t log_column = first_j + x < k ? log_marginal[first_j + x] : acc_t(0);
#pragma unroll
  for (int each = 0; each < kTile / kStep; ++each) {
    const int row = y + each * kStep, i = first_i + row, j = first_j + x;
    own[each] = i < k && j < k ? args.sums[offset + static_cast<int64_t>(i) * k + j] : acc_t(0);
    independent[each] = log_column + (i < k ? log_marginal[i] : acc_t(0));
  }
#pragma unroll
  for (int each = 0; each < kTile / kStep; ++each) {
    const int row = y + each * kStep, j = first_j + row, i = first_i + x;
    mirror[row][x] = j < k && i < k ? args.sums[offset + static_cast<int64_t>(j) * k + i] : acc_t(0);
  }
  __syncthreads();
  const acc_t per_pair = 1 / args.num_pairs();
  acc_t score_sum = 0, information = 0;
#pragma unroll
  for (int each = 0; each < kTile / kStep; ++each) {
    const int row = y + each * kStep, i = first_i + row, j = first_j + x;
    if (i >= k || j >= k) continue;
    args.entry(offset + static_cast<int64_t>(i) * k + j, own[each] + mirror[x][row], per_pair, independent[each],
               score_sum, information);
  }
  score_sum = block_sum(score_sum, scratch);
  information = block_sum(information, scratch);
  if (threadIdx.x > 0) return;
  const int64_t tile = (static_cast<int64_t>(head) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  partial[2 * tile] = score_sum;
  partial[2 * tile + 1] = information;
}

// A block owns one head and adds up its tiles and its marginals. Shared memory holds one value a warp.
template <typename acc_t>
__global__ void __launch_bounds__(kInformationThreads)
    iic_finish_kernel(InformationArgs<acc_t> args, const acc_t* marginals, const acc_t* partial, int tiles) {
  __shared__ acc_t scratch[kWarp];
  const int k = args.num_clusters, head = blockIdx.x;
  const acc_t* entropies = marginals + (static_cast<int64_t>(args.num_heads) + head) * k;
  const acc_t* parts = partial + static_cast<int64_t>(head) * tiles * 2;
  acc_t score_sum = 0, information = 0, entropy = 0;
  for (int tile = threadIdx.x; tile < tiles; tile += blockDim.x) {
    score_sum += parts[2 * tile];
    information += parts[2 * tile + 1];
  }
  for (int i = threadIdx.x; i < k; i += blockDim.x) entropy += entropies[i];
  score_sum = block_sum(score_sum, scratch);
  information = block_sum(information, scratch);
  entropy = block_sum(entropy, scratch);
  if (threadIdx.x == 0) args.finish(head, score_sum, information, entropy);
}

}  // namespace
}  // namespace iic_dist
