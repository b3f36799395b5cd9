// The NT-Xent ops on CUDA: checks, allocation, choice of kernels by the size of a row, launches.
//
//   rows of up to 1 KiB, so D <= 512 for bfloat16 and float16, D <= 256 for float32     nt_xent_kernels.cuh
//   longer rows (those of 16 bits as float32), and float64                               nt_xent_library.h
//
// No kernel waits for the host or uses an atomic; sums over splits of the columns go through memory and are added in a
// fixed order.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "../nt_xent.h"
#include "launch.h"
#include "nt_xent_kernels.cuh"
#include "nt_xent_library.h"

namespace iic_dist {
namespace {

using c10::cuda::getCurrentCUDAStream;

constexpr int64_t kResident = 2;  // blocks that share a multiprocessor

int64_t padded_features(int64_t num_features) { return ceil_div(num_features, kNTXentGranule) * kNTXentGranule; }

int64_t row_bytes(const at::Tensor& z) { return padded_features(z.size(1)) * z.element_size(); }

bool uses_library(const at::Tensor& z) { return z.scalar_type() == at::kDouble || row_bytes(z) > 1024; }

at::Tensor library_operand(const at::Tensor& z) {
  return z.scalar_type() == at::kDouble ? z : z.to(at::kFloat);
}

// z as the kernels read it: a copy only if its rows are not a multiple of the granule long, or lie otherwise.
at::Tensor kernel_operand(const at::Tensor& z) {
  const int64_t padding = padded_features(z.size(1)) - z.size(1);
  if (padding > 0) return at::constant_pad_nd(z, {0, padding});
  const at::Tensor dense = z.contiguous();
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : dense.clone();
}

// Calls body(Shape(), scalar_t()) with the shape for rows of that length: the largest that fits any device's 99 KiB
// and the registers.
template <int kWarpsForShortRows, int kColumnsForShortRows, typename Body>
void with_shape(const at::Tensor& z, const Body& body) {
  const auto choose = [&]<typename scalar_t>(scalar_t zero) {
    if constexpr (!std::is_same_v<scalar_t, float>) {
      if (row_bytes(z) <= 256) return body(NTXentShape<kWarpsForShortRows, 2, kColumnsForShortRows, 256>(), zero);
    }
    if (row_bytes(z) <= 512) return body(NTXentShape<4, 2, 16, 512>(), zero);
    return body(NTXentShape<4, 1, 16, 1024>(), zero);
  };
  AT_DISPATCH_SWITCH(z.scalar_type(), "nt_xent_cuda",
                     AT_DISPATCH_CASE(at::kFloat, [&] { choose(scalar_t()); })
                     AT_DISPATCH_CASE_REDUCED_FLOATING_TYPES([&] { choose(scalar_t()); }));
}

template <typename scalar_t>
NTXentProblem<scalar_t> problem_of(const at::Tensor& z, int64_t first_row, int64_t num_rows, double temperature) {
  return {z.const_data_ptr<scalar_t>(), z.size(0), first_row, num_rows, static_cast<int>(z.size(1)), 0,
          static_cast<float>(1 / temperature)};
}

// How rows and columns are laid out over blocks: few rows leave the columns to several.
struct NTXentGrid {
  int64_t row_blocks, splits;
  int tiles_per_split;

  NTXentGrid(int64_t num_rows, int64_t rows_per_block, int64_t num_tiles, int64_t blocks_per_row_block) {
    row_blocks = ceil_div(num_rows, rows_per_block);
    const int64_t wanted = kResident * kMultiprocessors / (row_blocks * blocks_per_row_block);
    tiles_per_split = static_cast<int>(ceil_div(num_tiles, std::max<int64_t>(1, wanted)));
    splits = ceil_div(num_tiles, tiles_per_split);
  }
};

// Rows, splits and `depth` in a grid, with the shared memory that the kernel asks for.
template <typename Shape, typename scalar_t, typename... Parameters, typename... Arguments>
void launch(void (*kernel)(NTXentProblem<scalar_t>, Parameters...), const NTXentGrid& grid, int64_t depth,
            NTXentProblem<scalar_t> problem, const Arguments&... arguments) {
  static_assert(kNTXentShared<Shape> <= 99 * 1024);
  const dim3 blocks(static_cast<unsigned>(grid.row_blocks), static_cast<unsigned>(grid.splits),
                    static_cast<unsigned>(depth));
  problem.tiles_per_split = grid.tiles_per_split;
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kNTXentShared<Shape>));
  kernel<<<blocks, Shape::kThreads, kNTXentShared<Shape>, getCurrentCUDAStream()>>>(problem, arguments...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

unsigned blocks_of(int64_t threads) { return static_cast<unsigned>(ceil_div(threads, 256)); }

std::tuple<at::Tensor, at::Tensor> nt_xent_rows_cuda(const at::Tensor& embeddings, int64_t first_row, int64_t num_rows,
                                                     double temperature) {
  check_nt_xent_rows(embeddings, first_row, num_rows, temperature);
  const c10::cuda::CUDAGuard guard(embeddings.device());
  if (uses_library(embeddings)) {
    return nt_xent_rows_library(library_operand(embeddings), first_row, num_rows, temperature);
  }
  const at::Tensor z = kernel_operand(embeddings);
  const auto options = z.options().dtype(at::kFloat);
  const at::Tensor log_sum_exp = at::empty({num_rows}, options), positive = at::empty({num_rows}, options);
  with_shape<8, 48>(z, [&]<typename Shape, typename scalar_t>(Shape, scalar_t) {
    const NTXentGrid grid(num_rows, Shape::kRows, ceil_div(z.size(0), Shape::kColumns), 1);
    const at::Tensor partial = at::empty({grid.splits, num_rows, 2}, options);
    auto* const parts = reinterpret_cast<float2*>(partial.mutable_data_ptr<float>());
    launch<Shape>(nt_xent_rows_kernel<Shape, scalar_t>, grid, 1,
                  problem_of<scalar_t>(z, first_row, num_rows, temperature), parts,
                  positive.mutable_data_ptr<float>());
    nt_xent_finish_rows_kernel<<<blocks_of(num_rows), 256, 0, getCurrentCUDAStream()>>>(
        parts, static_cast<int>(grid.splits), num_rows, log_sum_exp.mutable_data_ptr<float>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {log_sum_exp, positive};
}

at::Tensor nt_xent_rows_grad_cuda(const at::Tensor& embeddings, const at::Tensor& log_sum_exp, int64_t first_row,
                                  int64_t num_rows, double temperature) {
  check_nt_xent_rows(embeddings, first_row, num_rows, temperature);
  check_nt_xent_log_sum_exp(log_sum_exp, embeddings);
  const c10::cuda::CUDAGuard guard(embeddings.device());
  if (uses_library(embeddings)) {
    return nt_xent_rows_grad_library(library_operand(embeddings), log_sum_exp, first_row, num_rows, temperature);
  }
  const at::Tensor z = kernel_operand(embeddings), all_lse = log_sum_exp.contiguous();
  const int64_t num_features = embeddings.size(1), chunks = ceil_div(z.size(1), kNTXentChunk);
  const at::Tensor grad = at::empty({num_rows, num_features}, all_lse.options());
  with_shape<4, 32>(z, [&]<typename Shape, typename scalar_t>(Shape, scalar_t) {
    const int64_t num_tiles = ceil_div(z.size(0), Shape::kColumns), num_factors = num_tiles * Shape::kColumns;
    const NTXentGrid grid(num_rows, Shape::kRows, num_tiles, chunks);
    const at::Tensor factors = at::empty({num_factors}, grad.options());
    const at::Tensor partial =
        grid.splits == 1 ? grad : at::empty({grid.splits, num_rows, num_features}, grad.options());
    const auto stream = getCurrentCUDAStream();
    nt_xent_factors_kernel<<<blocks_of(num_factors), 256, 0, stream>>>(
        all_lse.const_data_ptr<float>(), z.size(0), num_factors, factors.mutable_data_ptr<float>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    launch<Shape>(nt_xent_rows_grad_kernel<Shape, scalar_t>, grid, chunks,
                  problem_of<scalar_t>(z, first_row, num_rows, temperature), all_lse.const_data_ptr<float>(),
                  factors.const_data_ptr<float>(), static_cast<int>(num_features), partial.mutable_data_ptr<float>());
    if (grid.splits > 1) {
      nt_xent_sum_splits_kernel<<<blocks_of(grad.numel()), 256, 0, stream>>>(
          partial.const_data_ptr<float>(), static_cast<int>(grid.splits), grad.numel(), grad.mutable_data_ptr<float>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  return grad;
}

}  // namespace

TORCH_LIBRARY_IMPL(iic_dist, CUDA, m) {
  m.impl("nt_xent_rows", &nt_xent_rows_cuda);
  m.impl("nt_xent_rows_grad", &nt_xent_rows_grad_cuda);
}

}  // namespace iic_dist
