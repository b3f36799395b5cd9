// The NT-Xent ops on the CPU: rows go in blocks, one task each; within a block the library multiplies tile by tile
// and the kernels work on each tile while it is in the cache.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <limits>

#include "../nt_xent.h"
#include "nt_xent_kernels.h"

namespace iic_dist {
namespace {

using cpu::kTileColumns;
using cpu::SimilarityTile;

constexpr int64_t kTileRows = 256;

template <typename A>
cpu::NTXentKernels<A> choose_nt_xent_kernels() {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return cpu::avx512::nt_xent_kernels<A>();
  if (capability == "AVX2") return cpu::avx2::nt_xent_kernels<A>();
#endif
  return cpu::baseline::nt_xent_kernels<A>();
}

// This rank's rows of z.
struct Rows {
  const at::Tensor& z;
  int64_t first, count;

  int64_t positive(int64_t row) const { return first + (row - first + count / 2) % count; }
};

// One call of `work(begin, end, buffer)` for each block of rows of z. Never a single block: it would run outside of
// a parallel region, where the library's products use all threads and round in another order.
template <typename Work>
void for_each_block(const Rows& rows, const Work& work) {
  const int64_t size = std::min(kTileRows, (rows.count + 1) / 2), last = rows.first + rows.count;
  at::parallel_for(0, (rows.count + size - 1) / size, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView without_autograd;
    const at::Tensor buffer = at::empty({size, kTileColumns}, rows.z.options());
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = rows.first + block * size;
      work(row, std::min(row + size, last), buffer);
    }
  });
}

// One call of `work(products, columns, first_column)` for each tile of the block: the products z z^T there, with
// -inf for a row with itself, and the rows of z that are its columns.
template <typename Work>
void for_each_tile(const at::Tensor& z, int64_t begin, int64_t end, const at::Tensor& buffer, const Work& work) {
  const at::Tensor own = z.narrow(0, begin, end - begin);
  for (int64_t first = 0; first < z.size(0); first += kTileColumns) {
    const int64_t count = std::min(kTileColumns, z.size(0) - first);
    const at::Tensor columns = z.narrow(0, first, count);
    at::Tensor products = buffer.narrow(0, 0, end - begin).narrow(1, 0, count);
    at::mm_out(products, own, columns.t());
    const int64_t from = std::max(begin, first), to = std::min(end, first + count);
    if (from < to) products.narrow(0, from - begin, to - from).diagonal(from - first).fill_(-INFINITY);
    work(products, columns, first);
  }
}

template <typename A>
SimilarityTile<A> tile_of(const at::Tensor& products, double temperature) {
  return {products.mutable_data_ptr<A>(), products.size(0), products.size(1), static_cast<A>(1 / temperature)};
}

// One call of `work(value)` for the place of each row's positive in the tile, if it is there.
template <typename A, typename Work>
void for_each_positive(const Rows& rows, const SimilarityTile<A>& tile, int64_t begin, int64_t first_column,
                       const Work& work) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t column = rows.positive(begin + i) - first_column;
    if (column >= 0 && column < tile.columns) work(i, tile.data[i * kTileColumns + column]);
  }
}

std::tuple<at::Tensor, at::Tensor> nt_xent_rows_cpu(const at::Tensor& embeddings, int64_t first_row, int64_t num_rows,
                                                    double temperature) {
  check_nt_xent_rows(embeddings, first_row, num_rows, temperature);
  const at::Tensor z = embeddings.contiguous();
  const Rows rows{z, first_row, num_rows};
  at::Tensor log_sum_exp = at::empty({num_rows}, z.options()), positive = at::empty({num_rows}, z.options());
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "nt_xent_rows_cpu", [&] {
    const auto kernels = choose_nt_xent_kernels<scalar_t>();
    scalar_t* const all_lse = log_sum_exp.mutable_data_ptr<scalar_t>();
    scalar_t* const all_positives = positive.mutable_data_ptr<scalar_t>();
    for_each_block(rows, [&](int64_t begin, int64_t end, const at::Tensor& buffer) {
      scalar_t* const lse = all_lse + begin - first_row;
      scalar_t* const positives = all_positives + begin - first_row;
      std::array<scalar_t, kTileRows> largest, sums{};
      largest.fill(std::numeric_limits<scalar_t>::lowest());
      for_each_tile(z, begin, end, buffer, [&](const at::Tensor& products, const at::Tensor&, int64_t column) {
        const auto tile = tile_of<scalar_t>(products, temperature);
        for_each_positive(rows, tile, begin, column, [&](int64_t i, scalar_t s) { positives[i] = s * tile.scale; });
        kernels.add_exponentials(tile, largest.data(), sums.data());
      });
      for (int64_t i = 0; i < end - begin; ++i) lse[i] = largest[i] + std::log(sums[i]);
    });
  });
  return {log_sum_exp, positive};
}

at::Tensor nt_xent_rows_grad_cpu(const at::Tensor& embeddings, const at::Tensor& log_sum_exp, int64_t first_row,
                                 int64_t num_rows, double temperature) {
  check_nt_xent_rows(embeddings, first_row, num_rows, temperature);
  check_nt_xent_log_sum_exp(log_sum_exp, embeddings);
  const at::Tensor z = embeddings.contiguous(), all_lse = log_sum_exp.contiguous();
  const Rows rows{z, first_row, num_rows};
  const double scale = 1 / (z.size(0) * temperature);
  at::Tensor grad = at::empty({num_rows, z.size(1)}, z.options());
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "nt_xent_rows_grad_cpu", [&] {
    const auto kernels = choose_nt_xent_kernels<scalar_t>();
    const scalar_t* const lse = all_lse.const_data_ptr<scalar_t>();
    for_each_block(rows, [&](int64_t begin, int64_t end, const at::Tensor& buffer) {
      at::Tensor own_grad = grad.narrow(0, begin - first_row, end - begin);
      for_each_tile(z, begin, end, buffer, [&](const at::Tensor& products, const at::Tensor& others, int64_t column) {
        const auto tile = tile_of<scalar_t>(products, temperature);
        kernels.weigh(tile, lse + begin, lse + column);
        for_each_positive(rows, tile, begin, column, [](int64_t, scalar_t& weight) { weight -= 2; });
        at::addmm_out(own_grad, own_grad, products, others, column == 0 ? 0 : 1, scale);
      });
    });
  });
  return grad;
}

}  // namespace

TORCH_LIBRARY_IMPL(iic_dist, CPU, m) {
  m.impl("nt_xent_rows", &nt_xent_rows_cpu);
  m.impl("nt_xent_rows_grad", &nt_xent_rows_grad_cpu);
}

}  // namespace iic_dist
