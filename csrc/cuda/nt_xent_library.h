// NT-Xent on CUDA for what its kernels do not cover: the library's products of blocks of rows with all columns, and
// element-wise ops between them. As iic_dist/ops/nt_xent.py does it, in the same order.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cmath>
#include <tuple>

namespace iic_dist {

constexpr int64_t kLibraryElements = 1 << 22;  // similarities held at once: 16 MiB of float32, three times

// One call of `work(begin, count, similarities)` for each block of this rank's rows, begin counted from the first of
// them; a row has -inf with itself.
template <typename Work>
void for_each_library_block(const at::Tensor& z, int64_t first_row, int64_t num_rows, double temperature,
                            const Work& work) {
  const int64_t size = std::max<int64_t>(1, kLibraryElements / z.size(0));
  for (int64_t begin = 0; begin < num_rows; begin += size) {
    const int64_t count = std::min(size, num_rows - begin);
    at::Tensor similarities = at::mm(z.narrow(0, first_row + begin, count).div(temperature), z.t());
    similarities.diagonal(first_row + begin).fill_(-INFINITY);
    work(begin, count, similarities);
  }
}

inline std::tuple<at::Tensor, at::Tensor> nt_xent_rows_library(const at::Tensor& z, int64_t first_row,
                                                               int64_t num_rows, double temperature) {
  const at::Tensor log_sum_exp = at::empty({num_rows}, z.options());
  for_each_library_block(z, first_row, num_rows, temperature, [&](int64_t begin, int64_t count, at::Tensor& s) {
    log_sum_exp.narrow(0, begin, count).copy_(at::logsumexp(s, 1));
  });
  const int64_t half = num_rows / 2;
  const at::Tensor a = z.narrow(0, first_row, half), b = z.narrow(0, first_row + half, half);
  const at::Tensor positive = a.mul(b).sum(1).div_(temperature);
  return {log_sum_exp, at::cat({positive, positive})};
}

inline at::Tensor nt_xent_rows_grad_library(const at::Tensor& z, const at::Tensor& log_sum_exp, int64_t first_row,
                                            int64_t num_rows, double temperature) {
  const int64_t half = num_rows / 2;
  const at::Tensor a = z.narrow(0, first_row, half), b = z.narrow(0, first_row + half, half);
  const at::Tensor grad = at::cat({b, a}).mul_(-2);
  for_each_library_block(z, first_row, num_rows, temperature, [&](int64_t begin, int64_t count, at::Tensor& s) {
    at::Tensor weights = s.sub(log_sum_exp.narrow(0, first_row + begin, count).unsqueeze(1)).exp_();
    weights.add_(s.sub_(log_sum_exp).exp_());
    grad.narrow(0, begin, count).addmm_(weights, z);
  });
  return grad.div_(z.size(0) * temperature);
}

}  // namespace iic_dist
