// The contract of the two NT-Xent ops that the CPU and CUDA files share; library.cpp holds the schemas.
//
//   nt_xent_rows(z, first_row, num_rows, temperature) -> (log_sum_exp, positive)
//   nt_xent_rows_grad(z, log_sum_exp, first_row, num_rows, temperature) -> grad
//
// z            (2G, D), any strides; float64 or float32, on CUDA also bfloat16 or float16, multiplied as they are with
//              sums in float32. The embeddings of all ranks, each rank's own together as [a; b]: row i of the first
//              half of a rank's rows and row i of the second are a positive pair. Unit rows in the loss, but nothing
//              here needs that.
// first_row, num_rows   this rank's rows of z; num_rows = 2N, even.
// temperature  > 0; s = z z^T / temperature.
// log_sum_exp  (2N,) ln sum_{j != i} exp s_ij of this rank's rows; (2G,), any stride, of all rows in the second op.
// positive     (2N,) s_i,pos(i).
// grad         (2N, D), contiguous: 1 / (2G temperature) [sum_{j != i} (p_ij + p_ji) z_j - 2 z_pos(i)] with
//              p_ij = exp(s_ij - lse_i), p_ji = exp(s_ij - lse_j).
//
// All results are float64 for float64 z, else float32. No 2G x 2G matrix: one tile of it a thread, or a block on CUDA.
// NaN in, NaN out. The result does not depend on the number of threads or on timing: no float atomics.
#pragma once

#include <ATen/core/Tensor.h>

namespace iic_dist {

inline void check_nt_xent_rows(const at::Tensor& z, int64_t first_row, int64_t num_rows, double temperature) {
  TORCH_CHECK_VALUE(z.dim() == 2 && z.numel() > 0, "z ", z.sizes(), ": must be (2G, D), neither of them 0");
  const at::ScalarType dtype = z.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kDouble ||
                        (z.is_cuda() && (dtype == at::kBFloat16 || dtype == at::kHalf)),
                    "z of ", dtype, ": must be of float32 or float64, or on CUDA of bfloat16 or float16");
  TORCH_CHECK_VALUE(first_row >= 0 && num_rows >= 2 && num_rows % 2 == 0 && first_row + num_rows <= z.size(0),
                    "rows ", first_row, " to ", first_row + num_rows, " of z ", z.sizes(),
                    ": must be an even number of its rows");
  TORCH_CHECK_VALUE(temperature > 0, "temperature=", temperature, ": must be above 0");
}

inline void check_nt_xent_log_sum_exp(const at::Tensor& log_sum_exp, const at::Tensor& z) {
  const at::ScalarType dtype = z.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(log_sum_exp.dim() == 1 && log_sum_exp.size(0) == z.size(0) &&
                        log_sum_exp.scalar_type() == dtype && log_sum_exp.device() == z.device(),
                    "log_sum_exp ", log_sum_exp.sizes(), " of ", log_sum_exp.scalar_type(), " for z ", z.sizes(),
                    " of ", z.scalar_type(), ": must be one value a row, of ", dtype, ", on its device");
}

}  // namespace iic_dist
