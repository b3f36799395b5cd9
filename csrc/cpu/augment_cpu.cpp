// The op that makes views, on the CPU: a view is one piece of work, in the scratch memory of its thread.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <string>

#include "../augment.h"
#include "augment_kernels.h"

namespace iic_dist {
namespace {

template <typename T>
cpu::ViewKernels<T> choose_view_kernels() {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return cpu::avx512::view_kernels<T>();
  if (capability == "AVX2") return cpu::avx2::view_kernels<T>();
#endif
  return cpu::baseline::view_kernels<T>();
}

template <typename T>
void make_views(const ViewShape& shape, const at::Tensor& images, const at::Tensor& rows, const at::Tensor& parameters,
                const at::Tensor& views) {
  const int64_t batch = rows.size(0);
  const auto* data = images.const_data_ptr<uint8_t>();
  const auto* end = data + (images.size(0) - 1) * images.stride(0) + images[0].numel();
  const cpu::ViewTask<T> task{
      shape, {data, images.stride(0), end}, parameters.const_data_ptr<float>(), views.mutable_data_ptr<T>()};
  const auto* image = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < batch; ++i)
    TORCH_CHECK_INDEX(image[i] >= 0 && image[i] < images.size(0), "row ", image[i], " of ", images.size(0), " images");
  const auto kernels = choose_view_kernels<T>();
  const int64_t scratch_size = kernels.scratch_size(shape);
  at::parallel_for(0, views.size(0), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView without_autograd;
    const at::Tensor scratch = at::empty({scratch_size}, parameters.options());
    for (int64_t view = begin; view < end; ++view)
      kernels.make_view(task, view, image[view % batch], scratch.mutable_data_ptr<float>());
  });
}

at::Tensor augment_views_cpu(const at::Tensor& images, const at::Tensor& rows, const at::Tensor& parameters,
                             int64_t size, int64_t blur_kernel, bool sobel, at::ArrayRef<double> mean,
                             at::ArrayRef<double> std, at::ScalarType dtype, bool channels_last) {
  const ViewShape shape =
      check_views(images, rows, parameters, size, blur_kernel, sobel, mean, std, dtype, channels_last);
  const at::Tensor views =
      at::empty({parameters.size(0), shape.out_channels, size, size}, images.options().dtype(dtype),
                channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  if (views.numel() == 0) return views;
  with_view_type(dtype, [&](auto type) {
    make_views<decltype(type)>(shape, with_dense_pixels(images), rows.contiguous(), parameters.contiguous(), views);
  });
  return views;
}

}  // namespace

TORCH_LIBRARY_IMPL(iic_dist, CPU, m) { m.impl("augment_views", &augment_views_cpu); }

}  // namespace iic_dist
