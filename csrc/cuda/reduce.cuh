// Device code that the loss kernels share: reductions in a fixed order, a fast exponential, strided rows,
// a softmax in registers.
#pragma once

#include <cmath>
#include <cstdint>

namespace iic_dist {

constexpr int kWarp = 32;

// Logits: rows and heads of any stride, the clusters of a row side by side.
template <typename scalar_t>
struct Rows {
  const scalar_t* data;
  int64_t row_stride, head_stride;

  __device__ const scalar_t* at(int64_t row, int64_t head) const {
    return data + row * row_stride + head * head_stride;
  }
};

// Sum over aligned groups of kLanes lanes; every lane of the warp must call and gets its group's sum.
template <int kLanes, typename T>
__device__ T group_sum(T value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// Likewise the maximum; may lose a NaN, so whoever needs it must meet it again.
template <int kLanes, typename T>
__device__ T group_max(T value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, value, step);
    value = value > other ? value : other;
  }
  return value;
}

// Sum over a block of whole warps; scratch holds one value a warp. Every thread must call and gets the sum.
template <typename T>
__device__ T block_sum(T value, T* scratch) {
  value = group_sum<kWarp>(value);
  __syncthreads();  // scratch may still be read from the call before
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  T sum = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) sum += scratch[warp];
  return sum;
}

// read(0) + ... + read(count - 1), in this order; 16 of them are on their way from memory at once.
template <typename T, typename Read>
__device__ T sum_in_batches(int count, const Read& read) {
  constexpr int kBatch = 16;
  T sum = 0;
  for (int first = 0; first < count; first += kBatch) {
    T values[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) values[i] = first + i < count ? read(first + i) : T(0);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) sum += values[i];
  }
  return sum;
}

// 2^x to 2^-22 relative; 0 below 2^-126.
__device__ inline float fast_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// max(x, low) that lets NaN pass, which fmax does not.
template <typename T>
__device__ T clamp_min(T x, T low) {
  return x < low ? low : x;
}

// Values of one row by a group of kLanes lanes, which take kSide columns side by side in turn: p[j] is that of column
// (j / kSide * kLanes + lane) * kSide + j % kSide, -inf from column num_cols on. A null row gives zeros.
template <int kLanes, int kSide = 1, int kCols, typename scalar_t>
__device__ void load_row(const scalar_t* row, int num_cols, float (&p)[kCols]) {
  const int lane = threadIdx.x % kLanes;
  const bool present = row != nullptr;
#pragma unroll
  for (int j = 0; j < kCols; ++j) {
    const int col = (j / kSide * kLanes + lane) * kSide + j % kSide;
    p[j] = present && col < num_cols ? static_cast<float>(row[col]) : present ? -INFINITY : 0.f;
  }
}

// Their softmax, in place; zeros for a null row, NaN in a row of NaN past the last column too. Every lane of the warp
// must call.
template <int kLanes, int kCols>
__device__ void softmax_values(bool present, float (&p)[kCols]) {
  float largest = p[0];
#pragma unroll
  for (int j = 1; j < kCols; ++j) largest = fmaxf(largest, p[j]);
  largest = group_max<kLanes>(largest);
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kCols; ++j) {
    p[j] = expf(p[j] - largest);
    sum += p[j];
  }
  sum = group_sum<kLanes>(sum);
  const float scale = present ? __fdividef(1.f, sum) : 0.f;
#pragma unroll
  for (int j = 0; j < kCols; ++j) p[j] *= scale;
}

template <int kLanes, int kSide = 1, int kCols, typename scalar_t>
__device__ void softmax_row(const scalar_t* row, int num_cols, float (&p)[kCols]) {
  load_row<kLanes, kSide>(row, num_cols, p);
  softmax_values<kLanes>(row != nullptr, p);
}

}  // namespace iic_dist
