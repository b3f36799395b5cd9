// The op that makes views, on CUDA: checks, allocation, what fits into shared memory, one launch.
//
// What does not fit into kSharedBytes of a block stands in global memory; planes come first, then blurred planes, then
// the image, which is otherwise read where it is. With planes in global memory kSpillingBlocks blocks at most take one
// view after the other, each with its own part of a workspace. In float32, of 3 channels, planes fit up to 91 px, with
// blur up to 64 px.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "../augment.h"
#include "augment_views.cuh"

namespace iic_dist {
namespace {

constexpr int kSharedBytes = 98 * 1024;  // 64 px in colour with blur; allowed from 8.0 on, two blocks a multiprocessor on 9.0
constexpr int kMaxSize = 2048;           // of a view: its filters take 48 KiB
constexpr int64_t kSpillingBlocks = 512;

// Gives out shared memory in pieces of 16 bytes.
struct SharedMemory {
  int used = 0;  // floats

  int take(int64_t floats) {
    const int64_t padded = (floats + 3) / 4 * 4;
    if ((used + padded) * static_cast<int64_t>(sizeof(float)) > kSharedBytes) return -1;
    used += static_cast<int>(padded);
    return used - static_cast<int>(padded);
  }
};

template <typename T>
void launch(const ViewShape& shape, const at::Tensor& images, const at::Tensor& rows, const at::Tensor& parameters,
            const at::Tensor& views) {
  const int64_t planes = int64_t{shape.channels} * shape.size * shape.size;
  const int64_t samples = shape.size * static_cast<int64_t>(sizeof(Sample) / sizeof(float));
  const bool may_blur = shape.blur_kernel > 1;
  SharedMemory memory;
  ViewLayout layout{};
  for (int& axis : layout.samples) axis = memory.take(samples);
  layout.gaussian = memory.take(shape.blur_kernel / 2 + 1);
  layout.planes = memory.take(planes);
  layout.blurred = may_blur ? memory.take(planes) : 0;
  layout.image = memory.take((int64_t{shape.channels} * shape.height * shape.width + 3) / 4);
  const int64_t spilled = (layout.planes < 0 ? planes : 0) + (layout.blurred < 0 ? planes : 0);
  const int64_t num_views = views.size(0), blocks = spilled > 0 ? std::min(num_views, kSpillingBlocks) : num_views;
  const at::Tensor workspace = at::empty({blocks * spilled}, parameters.options());
  const ViewTask<T> task{shape,
                         layout,
                         images.const_data_ptr<uint8_t>(),
                         images.stride(0),
                         images.size(0),
                         rows.const_data_ptr<int64_t>(),
                         rows.size(0),
                         num_views,
                         parameters.const_data_ptr<float>(),
                         workspace.mutable_data_ptr<float>(),
                         spilled,
                         views.mutable_data_ptr<T>()};
  const auto kernel = shape.channels == 1 ? &augment_views_kernel<1, T> : &augment_views_kernel<3, T>;
  const int bytes = memory.used * static_cast<int>(sizeof(float));
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  kernel<<<static_cast<unsigned>(blocks), kViewThreads, bytes, c10::cuda::getCurrentCUDAStream()>>>(task);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor augment_views_cuda(const at::Tensor& images, const at::Tensor& rows, const at::Tensor& parameters,
                              int64_t size, int64_t blur_kernel, bool sobel, at::ArrayRef<double> mean,
                              at::ArrayRef<double> std, at::ScalarType dtype, bool channels_last) {
  const ViewShape shape =
      check_views(images, rows, parameters, size, blur_kernel, sobel, mean, std, dtype, channels_last);
  TORCH_CHECK_VALUE(size <= kMaxSize, "size=", size, ": at most ", kMaxSize, " on CUDA; use impl='torch'");
  const c10::cuda::CUDAGuard guard(images.device());
  const at::Tensor views =
      at::empty({parameters.size(0), shape.out_channels, size, size}, images.options().dtype(dtype),
                channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  if (views.numel() == 0) return views;
  TORCH_CHECK_VALUE(views.size(0) <= INT32_MAX, views.size(0), " views: at most 2^31 - 1, the limit of a CUDA grid");
  with_view_type(dtype, [&](auto type) {
    launch<decltype(type)>(shape, with_dense_pixels(images), rows.contiguous(), parameters.contiguous(), views);
  });
  return views;
}

}  // namespace

TORCH_LIBRARY_IMPL(iic_dist, CUDA, m) { m.impl("augment_views", &augment_views_cuda); }

}  // namespace iic_dist
