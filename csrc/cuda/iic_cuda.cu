// The IIC ops on CUDA: checks, allocation, choice of kernels by the number of clusters, launches.
//
//   K <= 32             iic_small.cuh     a thread owns a row
//   K <= 160            iic_tiled.cuh     a block owns a chunk of rows, tensor cores
//   larger, or float64  iic_library.cuh   the library's matrix products between element-wise kernels
//
// The first two keep nothing between forward and backward: probs_a and probs_b are empty, (0,). The library keeps
// its operands, probs_a (N, H, K) and probs_b summed over the repeats (N, H, K), in operand_type. No kernel waits for
// the host or uses an atomic; sums over blocks go through memory and are added in a fixed order.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "../iic.h"
#include "iic_information.cuh"
#include "iic_library.cuh"
#include "iic_small.cuh"
#include "iic_tiled.cuh"
#include "launch.h"

namespace iic_dist {
namespace {

using c10::cuda::getCurrentCUDAStream;

at::ScalarType acc_type(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// float16 goes to the library as bfloat16: gradients of a large batch and small probabilities leave its range.
at::ScalarType operand_type(const at::Tensor& x) {
  return x.scalar_type() == at::kHalf ? at::kBFloat16 : x.scalar_type();
}

bool uses_library(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble || logits.size(2) > kTiledMax;
}

// The kernels take rows and heads of any stride; only logits whose clusters lie apart are copied.
at::Tensor with_dense_rows(const at::Tensor& x) { return x.stride(2) == 1 ? x : x.contiguous(); }

template <typename scalar_t>
Rows<scalar_t> rows_of(const at::Tensor& x) {
  return {x.const_data_ptr<scalar_t>(), x.stride(0), x.stride(1)};
}

template <typename scalar_t>
Batch<scalar_t> batch_of(const at::Tensor& logits_a, const at::Tensor& logits_b) {
  return {rows_of<scalar_t>(logits_a), rows_of<scalar_t>(logits_b), logits_a.size(0),
          static_cast<int>(logits_b.size(0) / logits_a.size(0)), static_cast<int>(logits_a.size(1)),
          static_cast<int>(logits_a.size(2))};
}

// Calls body(std::integral_constant<int, kMax>) with the smallest compiled kMax that holds k clusters.
template <typename Body>
auto with_small_max(int64_t k, const Body& body) {
  if (k <= 16) return body(std::integral_constant<int, 16>());
  return body(std::integral_constant<int, kSmallMax>());
}

template <typename Body>
auto with_tiled_max(int64_t k, const Body& body) {
  if (k <= 48) return body(std::integral_constant<int, 48>());
  if (k <= 80) return body(std::integral_constant<int, 80>());
  if (k <= 112) return body(std::integral_constant<int, 112>());
  return body(std::integral_constant<int, kTiledMax>());
}

// Likewise with the values of a row that a lane keeps in registers, 0 where they would be too many.
template <typename acc_t, typename Body>
auto with_library_cols(int64_t k, const Body& body) {
  if constexpr (std::is_same_v<acc_t, float>) {
    if (k <= 8 * kWarp) return body(std::integral_constant<int, 8>());
    if (k <= 32 * kWarp) return body(std::integral_constant<int, 32>());
  }
  return body(std::integral_constant<int, 0>());
}

// How the rows of every head are split over blocks: chunks of whole tiles, enough to fill the device once.
struct Chunks {
  int64_t chunks, heads;
  int tiles_per_block;

  Chunks(int64_t num_rows, int64_t num_heads, int64_t rows_per_tile, int64_t resident) : heads(num_heads) {
    const int64_t tiles = ceil_div(num_rows, rows_per_tile);
    tiles_per_block = static_cast<int>(ceil_div(tiles, ceil_div(resident * kMultiprocessors, heads)));
    chunks = ceil_div(tiles, tiles_per_block);
  }

  dim3 grid() const { return dim3(static_cast<unsigned>(chunks), static_cast<unsigned>(heads)); }
};

template <typename scalar_t>
Chunks small_chunks(const Batch<scalar_t>& batch) {
  return Chunks(batch.num_rows, batch.num_heads, kSmallRows, 2);
}

template <typename scalar_t>
Chunks tiled_chunks(const Batch<scalar_t>& batch) {
  const int resident = with_tiled_max(batch.num_clusters, [](auto max) { return kTiledResident<max.value>; });
  return Chunks(batch.num_rows, batch.num_heads, kTiledRows, resident);
}

void check_heads(int64_t heads) {
  TORCH_CHECK_VALUE(heads <= 65535, heads, " sub-heads: at most 65535, the limit of a CUDA grid");
}

// With the shared memory that the probabilities of a tile take.
template <int kMax, typename scalar_t, typename... Parameters, typename... Arguments>
void launch_tiled(void (*kernel)(Parameters...), dim3 grid, const Arguments&... arguments) {
  constexpr int kShared = TiledProbs<kMax, kPlanes<scalar_t>>::kBytes;
  static_assert(kShared <= 90 * 1024);  // of the 99 KiB of any device; some are static
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  kernel<<<grid, kTiledThreads<kMax>, kShared, getCurrentCUDAStream()>>>(arguments...);
}

// ---- iic_joint

template <typename scalar_t>
void launch_joint(const at::Tensor& logits_a, const at::Tensor& logits_b, const at::Tensor& sums) {
  const auto batch = batch_of<scalar_t>(logits_a, logits_b);
  const int64_t h = batch.num_heads, k = batch.num_clusters;
  const auto stream = getCurrentCUDAStream();
  const bool small = k <= kSmallMax;
  const Chunks split = small ? small_chunks(batch) : tiled_chunks(batch);
  const at::Tensor partial = at::empty({h, split.chunks, k, k}, sums.options());
  auto* out = partial.mutable_data_ptr<float>();
  if (small) {
    with_small_max(k, [&](auto max) {
      iic_small_joint_kernel<max.value, scalar_t>
          <<<split.grid(), kSmallThreads, 0, stream>>>(batch, split.tiles_per_block, out);
    });
  } else {
    with_tiled_max(k, [&](auto max) {
      launch_tiled<max.value, scalar_t>(iic_tiled_joint_kernel<max.value, scalar_t>, split.grid(), batch,
                                        split.tiles_per_block, out);
    });
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  iic_sum_chunks_kernel<<<ceil_div(h * k * k + 1, 256), 256, 0, stream>>>(
      partial.const_data_ptr<float>(), static_cast<int>(split.chunks), static_cast<int>(k * k), h * k * k,
      static_cast<float>(logits_b.size(0)), sums.mutable_data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Softmax as an operand of the library, (rows, H, K).
at::Tensor library_softmax(const at::Tensor& logits) {
  const at::Tensor probs = at::empty(logits.sizes(), logits.options().dtype(operand_type(logits)));
  const dim3 grid(static_cast<unsigned>(ceil_div(logits.size(0), kLibraryRows)), static_cast<unsigned>(logits.size(1)));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "iic_softmax_cuda", [&] {
    using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    using operand_t = std::conditional_t<std::is_same_v<scalar_t, c10::Half>, c10::BFloat16, scalar_t>;
    with_library_cols<acc_t>(logits.size(2), [&](auto cols) {
      iic_softmax_kernel<cols.value, acc_t, operand_t, scalar_t>
          <<<grid, kLibraryThreads, 0, getCurrentCUDAStream()>>>(rows_of<scalar_t>(logits), logits.size(0),
                                                                 static_cast<int>(logits.size(2)),
                                                                 probs.mutable_data_ptr<operand_t>());
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return probs;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> iic_joint_cuda(const at::Tensor& first, const at::Tensor& second) {
  check_iic_logits(first, second);
  const int64_t n = first.size(0), h = first.size(1), k = first.size(2), repeats = second.size(0) / n;
  check_heads(h);
  const c10::cuda::CUDAGuard guard(first.device());
  const at::Tensor logits_a = with_dense_rows(first), logits_b = with_dense_rows(second);
  const at::Tensor sums = at::empty({h * k * k + 1}, logits_a.options().dtype(acc_type(logits_a)));
  if (!uses_library(logits_a)) {
    const auto launch = [&](auto zero) { launch_joint<decltype(zero)>(logits_a, logits_b, sums); };
    AT_DISPATCH_SWITCH(logits_a.scalar_type(), "iic_joint_cuda",
                       AT_DISPATCH_CASE(at::kFloat, [&] { launch(scalar_t()); })
                       AT_DISPATCH_CASE_REDUCED_FLOATING_TYPES([&] { launch(scalar_t()); }));
    return {sums, at::empty({0}, sums.options()), at::empty({0}, sums.options())};
  }
  const at::Tensor probs_a = library_softmax(logits_a);
  at::Tensor probs_b = library_softmax(logits_b);
  if (repeats > 1) probs_b = probs_b.view({repeats, n, h, k}).sum(0);
  at::Tensor joint = sums.narrow(0, 0, h * k * k).view({h, k, k});
  const at::Tensor left = probs_a.permute({1, 2, 0}), right = probs_b.permute({1, 0, 2});
  at::bmm_out(joint, left, right, sums.scalar_type());
  sums.narrow(0, h * k * k, 1).fill_(logits_b.size(0));
  return {sums, probs_a, probs_b};
}

// ---- iic_information

// Blocks that share a head's matrix: one where the device or the code that runs on it knows no clusters of blocks.
int information_blocks(int num_clusters) {
  static const bool compiled = [] {
    cudaFuncAttributes attributes;
    C10_CUDA_CHECK(cudaFuncGetAttributes(&attributes, iic_information_kernel));
    return attributes.ptxVersion >= 90;
  }();
  int major = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, c10::cuda::current_device()));
  return compiled && major >= 9 && num_clusters > kWarp ? kInformationBlocks : 1;
}

void launch_one_cluster(const InformationArgs<float>& args) {
  const int k = args.num_clusters, blocks = information_blocks(k);
  cudaLaunchAttribute shape;
  shape.id = cudaLaunchAttributeClusterDimension;
  shape.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks, args.num_heads);
  config.blockDim = dim3(std::min(1024, k * kWarp));
  config.dynamicSmemBytes = sizeof(float) * (k * (k | 1) + k);
  config.stream = getCurrentCUDAStream();
  config.attrs = &shape;
  config.numAttrs = blocks > 1 ? 1 : 0;
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, iic_information_kernel, args));
}

template <typename acc_t>
void launch_information(const InformationArgs<acc_t>& args, const at::TensorOptions& options) {
  if constexpr (std::is_same_v<acc_t, float>) {
    if (args.num_clusters <= kOneBlockMax) return launch_one_cluster(args);
  }
  const auto stream = getCurrentCUDAStream();
  const auto heads = static_cast<unsigned>(args.num_heads);
  const auto side = static_cast<unsigned>(ceil_div(args.num_clusters, kInformationTile));
  const at::Tensor marginals = at::empty({2, args.num_heads, args.num_clusters}, options);
  const at::Tensor partial = at::empty({args.num_heads, side, side, 2}, options);
  iic_marginal_kernel<acc_t><<<dim3(side, heads), kMarginalThreads, 0, stream>>>(
      args, marginals.mutable_data_ptr<acc_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  iic_terms_kernel<acc_t><<<dim3(side, side, heads), kInformationThreads, 0, stream>>>(
      args, marginals.const_data_ptr<acc_t>(), partial.mutable_data_ptr<acc_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  iic_finish_kernel<acc_t><<<heads, kInformationThreads, 0, stream>>>(
      args, marginals.const_data_ptr<acc_t>(), partial.const_data_ptr<acc_t>(), static_cast<int>(side * side));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> iic_information_cuda(
    const at::Tensor& sums, int64_t k, double entropy_weight) {
  const int64_t num_heads = heads_of_sums(sums, k);
  check_heads(num_heads);
  const c10::cuda::CUDAGuard guard(sums.device());
  const auto terms = [&] { return at::empty({num_heads}, sums.options()); };
  const at::Tensor loss = terms(), mutual_information = terms(), entropy = terms(), conditional_entropy = terms();
  const at::Tensor joint = at::empty({num_heads, k, k}, sums.options());
  const at::Tensor joint_grad = at::empty({num_heads, k, k}, sums.options());
  AT_DISPATCH_FLOATING_TYPES(sums.scalar_type(), "iic_information_cuda", [&] {
    const InformationArgs<scalar_t> args = {sums.const_data_ptr<scalar_t>(),
                                            static_cast<int>(k),
                                            static_cast<int>(num_heads),
                                            static_cast<scalar_t>(entropy_weight),
                                            static_cast<scalar_t>(kEps),
                                            loss.mutable_data_ptr<scalar_t>(),
                                            mutual_information.mutable_data_ptr<scalar_t>(),
                                            entropy.mutable_data_ptr<scalar_t>(),
                                            conditional_entropy.mutable_data_ptr<scalar_t>(),
                                            joint.mutable_data_ptr<scalar_t>(),
                                            joint_grad.mutable_data_ptr<scalar_t>()};
    launch_information(args, sums.options());
  });
  return {loss, mutual_information, entropy, conditional_entropy, joint, joint_grad};
}

// ---- iic_logits_grad

template <typename scalar_t>
void launch_logits_grad(const at::Tensor& logits_a, const at::Tensor& logits_b, const JointGrad& joint_grad,
                        const at::Tensor& grad_a, const at::Tensor& grad_b) {
  const auto batch = batch_of<scalar_t>(logits_a, logits_b);
  const int64_t k = batch.num_clusters;
  const auto stream = getCurrentCUDAStream();
  auto* out_a = grad_a.mutable_data_ptr<scalar_t>();
  auto* out_b = grad_b.mutable_data_ptr<scalar_t>();
  if (k <= kSmallMax) {
    const dim3 grid(static_cast<unsigned>(ceil_div(batch.num_rows, kSmallRows)),
                    static_cast<unsigned>(batch.num_heads));
    with_small_max(k, [&](auto max) {
      iic_small_grad_kernel<max.value, scalar_t><<<grid, kSmallThreads, 0, stream>>>(batch, joint_grad, out_a, out_b);
    });
  } else {
    const Chunks split = tiled_chunks(batch);
    with_tiled_max(k, [&](auto max) {
      launch_tiled<max.value, scalar_t>(iic_tiled_grad_kernel<max.value, scalar_t>, split.grid(), batch, joint_grad,
                                        split.tiles_per_block, out_a, out_b);
    });
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// The gradient of the joint as an operand of the library: centred, times grad_loss, (H, K, K).
at::Tensor library_centred(const at::Tensor& joint_grad, const at::Tensor& grad_loss, at::ScalarType operand) {
  const at::Tensor centred = at::empty(joint_grad.sizes(), joint_grad.options().dtype(operand));
  const int64_t rows = joint_grad.size(0) * joint_grad.size(1);
  const auto grid = static_cast<unsigned>(ceil_div(rows, kLibraryRows));
  const auto launch = [&]<typename acc_t, typename operand_t>(acc_t, operand_t) {
    iic_centre_kernel<acc_t, operand_t><<<grid, kLibraryThreads, 0, getCurrentCUDAStream()>>>(
        joint_grad.const_data_ptr<acc_t>(), grad_loss.const_data_ptr<acc_t>(), grad_loss.stride(0), rows,
        static_cast<int>(joint_grad.size(2)), centred.mutable_data_ptr<operand_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (operand == at::kDouble) {
    launch(double(), double());
  } else if (operand == at::kFloat) {
    launch(float(), float());
  } else {
    launch(float(), c10::BFloat16());
  }
  return centred;
}

// Gradient of the logits of one view, (rows, H, K): `partner` (N, H, K) are the other view's probabilities.
void library_logits_grad(const at::Tensor& logits, const at::Tensor& partner, const at::Tensor& centred,
                         const at::Tensor& grad) {
  const at::Tensor grad_probs = at::bmm(partner.permute({1, 0, 2}), centred, acc_type(logits));
  const dim3 grid(static_cast<unsigned>(ceil_div(logits.size(0), kLibraryRows)), static_cast<unsigned>(logits.size(1)));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "iic_softmax_grad_cuda", [&] {
    using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    with_library_cols<acc_t>(logits.size(2), [&](auto cols) {
      iic_softmax_grad_kernel<cols.value, acc_t, scalar_t><<<grid, kLibraryThreads, 0, getCurrentCUDAStream()>>>(
          rows_of<scalar_t>(logits), grad_probs.const_data_ptr<acc_t>(), logits.size(0), partner.size(0),
          static_cast<int>(logits.size(2)), grad.mutable_data_ptr<scalar_t>());
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<at::Tensor, at::Tensor> iic_logits_grad_cuda(const at::Tensor& first, const at::Tensor& second,
                                                        const at::Tensor& probs_a, const at::Tensor& probs_b,
                                                        const at::Tensor& joint_grad, const at::Tensor& grad_loss) {
  check_iic_logits(first, second);
  const int64_t h = first.size(1), k = first.size(2);
  const at::ScalarType acc = acc_type(first);
  check_heads(h);
  TORCH_CHECK_VALUE(joint_grad.sizes() == at::IntArrayRef({h, k, k}) && joint_grad.scalar_type() == acc, "joint_grad ",
                    joint_grad.sizes(), " of ", joint_grad.scalar_type(), ": must be (H, K, K) = (", h, ", ", k, ", ",
                    k, ") of ", acc);
  TORCH_CHECK_VALUE(grad_loss.sizes() == at::IntArrayRef({h}) && grad_loss.scalar_type() == acc, "grad_loss ",
                    grad_loss.sizes(), " of ", grad_loss.scalar_type(), ": must be (", h, ",) of ", acc);
  const c10::cuda::CUDAGuard guard(first.device());
  const at::Tensor logits_a = with_dense_rows(first), logits_b = with_dense_rows(second);
  const at::Tensor matrix = joint_grad.contiguous();
  const at::Tensor grad_a = at::empty(logits_a.sizes(), logits_a.options());
  const at::Tensor grad_b = at::empty(logits_b.sizes(), logits_b.options());
  if (uses_library(logits_a)) {
    const at::Tensor centred = library_centred(matrix, grad_loss, operand_type(logits_a));
    library_logits_grad(logits_a, probs_b, centred, grad_a);
    library_logits_grad(logits_b, probs_a, centred, grad_b);
    return {grad_a, grad_b};
  }
  const JointGrad source = {matrix.const_data_ptr<float>(), grad_loss.const_data_ptr<float>(), grad_loss.stride(0)};
  const auto launch = [&](auto zero) {
    launch_logits_grad<decltype(zero)>(logits_a, logits_b, source, grad_a, grad_b);
  };
  AT_DISPATCH_SWITCH(logits_a.scalar_type(), "iic_logits_grad_cuda",
                     AT_DISPATCH_CASE(at::kFloat, [&] { launch(scalar_t()); })
                     AT_DISPATCH_CASE_REDUCED_FLOATING_TYPES([&] { launch(scalar_t()); }));
  return {grad_a, grad_b};
}

}  // namespace

TORCH_LIBRARY_IMPL(iic_dist, CUDA, m) {
  m.impl("iic_joint", &iic_joint_cuda);
  m.impl("iic_information", &iic_information_cuda);
  m.impl("iic_logits_grad", &iic_logits_grad_cuda);
}

}  // namespace iic_dist
