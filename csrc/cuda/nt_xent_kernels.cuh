// The NT-Xent kernels: log-sum-exp and gradient of this rank's rows, and the sums over splits of the columns.
#pragma once

#include <cfloat>

#include "nt_xent_tile.cuh"

namespace iic_dist {

constexpr int kNTXentChunk = 128;  // columns of the gradient that a block sums, in registers

// Weights p_ij + p_ji are computed times 2^14, which lifts those of a large batch into the range of float16.
constexpr float kWeightShift = 14;
constexpr float kPositiveWeight = -2 * 16384.f;

// How far a log-sum-exp may lie from a common one for one exponential a pair: as in cpu/nt_xent_kernels.inc, what
// exp(s - lse_i) then loses below 1e-38 is below 1e-20 in exp(s - lse_j) too.
constexpr float kNearRange = 20;

namespace {

// A block owns rows and one split of the columns, a thread 4 of the rows of its warp (2 with one strip) and every 4th
// pair of columns. Shared memory holds the rows and two tiles of columns. Writes for each row the logarithm to base 2
// of its largest exp(s) in the split, and the sum of all exp(s) divided by that.
template <typename Shape, typename scalar_t>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    nt_xent_rows_kernel(NTXentProblem<scalar_t> problem, float2* partial, float* positive) {
  extern __shared__ __align__(16) unsigned char shared[];
  NTXentBlock<Shape, scalar_t> block(problem, reinterpret_cast<scalar_t*>(shared));
  const float scale = problem.scale();
  float largest[Shape::kStrips][2], sums[Shape::kStrips][2] = {};
#pragma unroll
  for (int m = 0; m < Shape::kStrips; ++m) largest[m][0] = largest[m][1] = -FLT_MAX;
  block.walk(nullptr, [&](typename Shape::Products& products, int64_t first_column) {
    if (is_special<Shape>(problem, block.first_row, first_column)) {
      for_each_pair<Shape>(products, block.first_row, first_column, [&](float& product, int64_t row, int64_t column) {
        if (row < problem.end_row() && column == problem.positive(row)) {
          positive[row - problem.first_row] = product * problem.inverse_temperature;
        }
        if (column == row || column >= problem.num_columns) product = -INFINITY;
      });
    }
#pragma unroll
    for (int m = 0; m < Shape::kStrips; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < Shape::kTiles; ++n) {
          top = fmaxf(top, fmaxf(products[m][n][2 * h], products[m][n][2 * h + 1]));
        }
        if (top * scale > largest[m][h]) {
          sums[m][h] *= fast_exp2(largest[m][h] - top * scale);
          largest[m][h] = top * scale;
        }
        float sum = 0;
#pragma unroll
        for (int n = 0; n < Shape::kTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) sum += fast_exp2(fmaf(products[m][n][2 * h + e], scale, -largest[m][h]));
        }
        sums[m][h] += sum;
      }
    }
  });
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int m = 0; m < Shape::kStrips; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float top = group_max<4>(largest[m][h]);
      const float sum = group_sum<4>(sums[m][h] * fast_exp2(largest[m][h] - top));
      const int64_t row = block.first_row + (warp * Shape::kStrips + m) * 16 + h * 8 + lane / 4 - problem.first_row;
      if (lane % 4 == 0 && row < problem.num_rows) partial[blockIdx.y * problem.num_rows + row] = make_float2(top, sum);
    }
  }
}

// A thread owns one row and adds what the splits hold, in order. Nothing in shared memory.
__global__ void __launch_bounds__(256)
    nt_xent_finish_rows_kernel(const float2* partial, int splits, int64_t num_rows, float* log_sum_exp) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= num_rows) return;
  float top = -FLT_MAX, sum = 0;
  for (int split = 0; split < splits; ++split) top = fmaxf(top, partial[split * num_rows + row].x);
  for (int split = 0; split < splits; ++split) {
    const float2 part = partial[split * num_rows + row];
    sum += part.y * fast_exp2(part.x - top);
  }
  log_sum_exp[row] = top / kLog2E + logf(sum);
}

// A thread owns one column and writes its factor exp(lse_0 - lse_j), or -1 where that is out of range or NaN. Nothing
// in shared memory.
__global__ void __launch_bounds__(256)
    nt_xent_factors_kernel(const float* log_sum_exp, int64_t num_columns, int64_t num_factors, float* factors) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= num_factors) return;
  const float difference = log_sum_exp[0] - log_sum_exp[j < num_columns ? j : 0];
  factors[j] = fabsf(difference) <= kNearRange ? expf(difference) : -1.f;
}

// Of one row of this thread, for the weights of its pairs.
struct WeightRow {
  float log_sum_exp;  // to base 2, less kWeightShift
  float factor;       // exp(lse_i - lse_0)
};

// Makes of this thread's products of a tile the weights p_ij + p_ji times 2^14, with one exponential each where the
// factors allow it:  exp(s - lse_i) + exp(s - lse_j) = exp(s - lse_i) (1 + exp(lse_i - lse_0) exp(lse_0 - lse_j)).
// log_sum_exp: that of the tile's first column, `columns` up to the last.
template <typename Shape>
__device__ void weigh(typename Shape::Products& products, const WeightRow (&rows)[Shape::kStrips][2], bool near,
                      const float* factors, const float* log_sum_exp, int64_t columns, float scale) {
  const int first = threadIdx.x % 4 * 2;
  float others[Shape::kTiles][2];
#pragma unroll
  for (int n = 0; n < Shape::kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      others[n][e] = factors[n * 8 + first + e];
      near = near && others[n][e] > 0;
    }
  }
  const auto replace = [&](const auto& weight) {
#pragma unroll
    for (int m = 0; m < Shape::kStrips; ++m) {
#pragma unroll
      for (int n = 0; n < Shape::kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          products[m][n][e] = weight(products[m][n][e], rows[m][e / 2], others[n][e % 2]);
        }
      }
    }
  };
  if (near) {
    replace([&](float product, const WeightRow& row, float factor) {
      return fast_exp2(fmaf(product, scale, -row.log_sum_exp)) * fmaf(row.factor, factor, 1.f);
    });
    return;
  }
#pragma unroll
  for (int n = 0; n < Shape::kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      others[n][e] = log_sum_exp[smaller(n * 8 + first + e, columns - 1)] * kLog2E - kWeightShift;
    }
  }
  replace([&](float product, const WeightRow& row, float other) {
    return fast_exp2(fmaf(product, scale, -row.log_sum_exp)) + fast_exp2(fmaf(product, scale, -other));
  });
}

// sums += weights z for columns [0, width) of the gradient: `tile` points to the first of them in the tile's first row.
template <typename Shape, typename scalar_t>
__device__ void add_weighted(float (&sums)[kNTXentChunk / 16][Shape::kStrips][2][4],
                             const typename Shape::Products& weights, const scalar_t* tile, int width) {
  constexpr bool kExact = std::is_same_v<scalar_t, float>;
  constexpr int kDepth = 32 / sizeof(scalar_t), kSteps = Shape::kColumns / kDepth;  // rows of the tile in a product
  constexpr int kStride = kNTXentStride<Shape, scalar_t>;
  const int lane = threadIdx.x % kWarp;
  Fragment<scalar_t, 4> a[kSteps][Shape::kStrips];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int m = 0; m < Shape::kStrips; ++m) {
      if constexpr (kExact) {  // columns 2t, 2t + 1 of the weights stand where t, t + 4 belong: so do rows of z below
        const float(&w)[4] = weights[m][step];
        a[step][m].set(0, w[0]);
        a[step][m].set(1, w[2]);
        a[step][m].set(2, w[1]);
        a[step][m].set(3, w[3]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* w = weights[m][step * 2 + i / 2] + i % 2 * 2;
          a[step][m].set_bits(i, pack<scalar_t>(w[0], w[1]));
        }
      }
    }
  }
#pragma unroll
  for (int pair = 0; pair < kNTXentChunk / 16; ++pair) {
    if (pair * 16 >= width) break;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Fragment<scalar_t, 2> b[2];
      const scalar_t* corner = tile + step * kDepth * kStride + pair * 16;
      if constexpr (kExact) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          b[i / 2].set(i % 2, corner[(lane % 4 * 2 + i % 2) * kStride + i / 2 * 8 + lane / 4]);
        }
      } else {
        uint32_t bits[4];
        load_matrices_transposed(bits, corner + lane % 16 * kStride + lane / 16 * 8);
#pragma unroll
        for (int i = 0; i < 4; ++i) b[i / 2].set_bits(i % 2, bits[i]);
      }
#pragma unroll
      for (int m = 0; m < Shape::kStrips; ++m) add_products(sums[pair][m], a[step][m], b);
    }
  }
}

// A block owns rows, one split of the columns of z z^T and 128 columns of the gradient, which its warps keep in
// registers; a thread owns pairs as above. Shared memory holds the rows and two tiles with their factors. Writes the
// sums over the split to out, (splits, num_rows, num_features).
template <typename Shape, typename scalar_t>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    nt_xent_rows_grad_kernel(NTXentProblem<scalar_t> problem, const float* log_sum_exp, const float* factors,
                             int num_features, float* out) {
  extern __shared__ __align__(16) unsigned char shared[];
  NTXentBlock<Shape, scalar_t> block(problem, reinterpret_cast<scalar_t*>(shared));
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, first_feature = blockIdx.z * kNTXentChunk;
  const int64_t first_row = block.first_row + warp * Shape::kStrips * 16 + lane / 4;
  const float scale = problem.scale();
  WeightRow rows[Shape::kStrips][2];
  bool rows_near = true;
#pragma unroll
  for (int m = 0; m < Shape::kStrips; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float own = log_sum_exp[smaller(first_row + m * 16 + h * 8, problem.num_columns - 1)];
      rows_near = rows_near && fabsf(own - log_sum_exp[0]) <= kNearRange;
      rows[m][h] = {own * kLog2E - kWeightShift, expf(own - log_sum_exp[0])};
    }
  }
  float sums[kNTXentChunk / 16][Shape::kStrips][2][4] = {};
  block.walk(factors, [&](typename Shape::Products& weights, int64_t first_column) {
    weigh<Shape>(weights, rows, rows_near, block.factors, log_sum_exp + first_column,
                 problem.num_columns - first_column, scale);
    if (is_special<Shape>(problem, block.first_row, first_column)) {
      for_each_pair<Shape>(weights, block.first_row, first_column, [&](float& weight, int64_t row, int64_t column) {
        if (column == row || column >= problem.num_columns) weight = 0;
        if (column == problem.positive(row)) weight += kPositiveWeight;
      });
    }
    add_weighted<Shape>(sums, weights, block.tile + first_feature, problem.dimensions - first_feature);
  });
  const float mean = problem.inverse_temperature / (16384.f * problem.num_columns);
#pragma unroll
  for (int pair = 0; pair < kNTXentChunk / 16; ++pair) {
#pragma unroll
    for (int m = 0; m < Shape::kStrips; ++m) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int64_t row = first_row + m * 16 + i / 2 % 2 * 8 - problem.first_row;
        const int feature = first_feature + pair * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (row < problem.num_rows && feature < num_features) {
          out[(blockIdx.y * problem.num_rows + row) * num_features + feature] = sums[pair][m][i / 4][i % 4] * mean;
        }
      }
    }
  }
}

// A thread owns one value of the gradient and adds what the splits hold, in order. Nothing in shared memory.
__global__ void __launch_bounds__(256)
    nt_xent_sum_splits_kernel(const float* partial, int splits, int64_t size, float* grad) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (entry >= size) return;
  float sum = 0;
  for (int split = 0; split < splits; ++split) sum += partial[split * size + entry];
  grad[entry] = sum;
}

}  // namespace
}  // namespace iic_dist
