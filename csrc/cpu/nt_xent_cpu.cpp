// The NT-Xent ops on the CPU: checks, allocation, choice of instruction set, and the split into blocks of rows.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "../nt_xent.h"
#include "nt_xent_kernels.h"

namespace iic_dist {
namespace {

using cpu::kBlockRows;

template <typename A>
cpu::NTXentKernels<A> choose_nt_xent_kernels() {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return cpu::avx512::nt_xent_kernels<A>();
  if (capability == "AVX2") return cpu::avx2::nt_xent_kernels<A>();
#endif
  return cpu::baseline::nt_xent_kernels<A>();
}

template <typename A>
cpu::NTXentTask<A> task_of(const at::Tensor& z, int64_t first_row, int64_t num_rows, double temperature) {
  return {z.const_data_ptr<A>(), z.size(0), z.size(1), first_row, num_rows, static_cast<A>(1 / temperature)};
}

// One call of `work(block, scratch)` for each block of this rank's rows, in any order on any thread.
template <typename A, typename Work>
void for_each_block(int64_t num_rows, const at::TensorOptions& options, int64_t scratch_size, const Work& work) {
  at::parallel_for(0, (num_rows + kBlockRows - 1) / kBlockRows, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView without_autograd;
    const at::Tensor scratch = at::empty({scratch_size}, options);
    for (int64_t block = begin; block < end; ++block) work(block, scratch.mutable_data_ptr<A>());
  });
}

std::tuple<at::Tensor, at::Tensor> nt_xent_rows_cpu(const at::Tensor& embeddings, int64_t first_row, int64_t num_rows,
                                                    double temperature) {
  check_nt_xent_rows(embeddings, first_row, num_rows, temperature);
  const at::Tensor z = embeddings.contiguous();
  at::Tensor log_sum_exp = at::empty({num_rows}, z.options()), positive = at::empty({num_rows}, z.options());
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "nt_xent_rows_cpu", [&] {
    const auto kernels = choose_nt_xent_kernels<scalar_t>();
    const auto task = task_of<scalar_t>(z, first_row, num_rows, temperature);
    scalar_t* const lse = log_sum_exp.mutable_data_ptr<scalar_t>();
    scalar_t* const positives = positive.mutable_data_ptr<scalar_t>();
    for_each_block<scalar_t>(
        num_rows, z.options(), kernels.scratch_size(z.size(1)),
        [&](int64_t block, scalar_t* scratch) { kernels.rows(task, block, lse, positives, scratch); });
  });
  return {log_sum_exp, positive};
}

at::Tensor nt_xent_rows_grad_cpu(const at::Tensor& embeddings, const at::Tensor& log_sum_exp, int64_t first_row,
                                 int64_t num_rows, double temperature) {
  check_nt_xent_rows(embeddings, first_row, num_rows, temperature);
  check_nt_xent_log_sum_exp(log_sum_exp, embeddings);
  const at::Tensor z = embeddings.contiguous(), all_lse = log_sum_exp.contiguous();
  at::Tensor grad = at::empty({num_rows, z.size(1)}, z.options());
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "nt_xent_rows_grad_cpu", [&] {
    const auto kernels = choose_nt_xent_kernels<scalar_t>();
    const auto task = task_of<scalar_t>(z, first_row, num_rows, temperature);
    const auto scale = static_cast<scalar_t>(1 / (z.size(0) * temperature));
    const scalar_t* const lse = all_lse.const_data_ptr<scalar_t>();
    scalar_t* const out = grad.mutable_data_ptr<scalar_t>();
    for_each_block<scalar_t>(
        num_rows, z.options(), kernels.scratch_size(z.size(1)),
        [&](int64_t block, scalar_t* scratch) { kernels.rows_grad(task, block, lse, scale, out, scratch); });
  });
  return grad;
}

}  // namespace

TORCH_LIBRARY_IMPL(iic_dist, CPU, m) {
  m.impl("nt_xent_rows", &nt_xent_rows_cpu);
  m.impl("nt_xent_rows_grad", &nt_xent_rows_grad_cpu);
}

}  // namespace iic_dist
