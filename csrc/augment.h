// The contract of the op that makes views, which the CPU and CUDA files share; library.cpp holds the schema.
//
//   augment_views(images, rows, parameters, size, blur_kernel, sobel, mean, std, dtype, channels_last) -> views
//
// images      (M, C, H, W) uint8, C = 1 or 3, all of a set; copied if the pixels of an image are not contiguous.
// rows        (N,) int64, the place in `images` of each image of the batch.
// parameters  (V*N, 17) float32, a row a view in the order of `Parameter`; view v of image i in row v*N + i. What is
//             neutral is not computed: identity, factor 1, hue 0, sigma 0.
// size        side of the views; blur_kernel odd, at most 2 * size - 1.
// mean, std   none, one, or one a channel of the views.
// dtype       of the views: float32, bfloat16 or float16; computed in float32.
// views       (V*N, C', size, size), C' = 2 with `sobel`, else C; contiguous or channels_last.
//
// A view is what `apply` of iic_dist/views/apply.py makes of parameters that it takes by name, in its order: affine, crop
// and resize, flip, brightness, contrast, saturation, hue, gray, blur, Sobel, normalise. It depends on its image and its parameters alone, bit for bit.
#pragma once

#include <ATen/core/Tensor.h>

#include "augment_view.h"

namespace iic_dist {

inline ViewShape check_views(const at::Tensor& images, const at::Tensor& rows, const at::Tensor& parameters,
                             int64_t size, int64_t blur_kernel, bool sobel, at::ArrayRef<double> mean,
                             at::ArrayRef<double> std, at::ScalarType dtype, bool channels_last) {
  TORCH_CHECK_VALUE(images.dim() == 4 && images.scalar_type() == at::kByte && (images.size(1) == 1 || images.size(1) == 3),
                    "images ", images.sizes(), " of ", images.scalar_type(),
                    ": must be (M, C, H, W) of uint8, C = 1 or 3");
  TORCH_CHECK_VALUE(rows.dim() == 1 && rows.scalar_type() == at::kLong && rows.device() == images.device(), "rows ",
                    rows.sizes(), " of ", rows.scalar_type(), " on ", rows.device(),
                    ": must be (N,) of int64 on the device of the images");
  TORCH_CHECK_VALUE(parameters.dim() == 2 && parameters.size(1) == kNumParameters &&
                        parameters.scalar_type() == at::kFloat && parameters.device() == images.device(),
                    "parameters ", parameters.sizes(), " of ", parameters.scalar_type(), " on ", parameters.device(),
                    ": must be (V*N, ", int(kNumParameters), ") of float32 on the device of the images");
  TORCH_CHECK_VALUE(rows.size(0) == 0 ? parameters.size(0) == 0 : parameters.size(0) % rows.size(0) == 0, "parameters ",
                    parameters.sizes(), " for rows ", rows.sizes(), ": must be whole views of the batch");
  TORCH_CHECK_VALUE(rows.size(0) == 0 || images.numel() > 0, "images ", images.sizes(), ": there is no pixel");
  TORCH_CHECK_VALUE(images.size(2) < 32768 && images.size(3) < 32768 && size >= 1 && size < 32768, "images ",
                    images.sizes(), " and size=", size, ": sides must be from 1 to 32767");
  TORCH_CHECK_VALUE(blur_kernel >= 1 && blur_kernel % 2 == 1 && blur_kernel < 2 * size, "blur_kernel=", blur_kernel,
                    " for size=", size, ": must be odd and at most 2 * size - 1");
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, "dtype=", dtype,
                    ": must be float32, bfloat16 or float16");
  const int64_t channels = images.size(1), wanted = sobel ? 2 : channels, given = static_cast<int64_t>(mean.size());
  TORCH_CHECK_VALUE(mean.size() == std.size() && (given == 0 || given == 1 || given == wanted), "mean ", mean,
                    " and std ", std, ": must hold none, 1 or ", wanted, " numbers");
  ViewShape shape{static_cast<int>(channels),
                  static_cast<int>(images.size(2)),
                  static_cast<int>(images.size(3)),
                  static_cast<int>(size),
                  static_cast<int>(blur_kernel),
                  static_cast<int>(wanted),
                  sobel,
                  channels_last,
                  {},
                  {1.f, 1.f, 1.f}};
  for (int64_t c = 0; c < wanted && given > 0; ++c) {
    shape.mean[c] = static_cast<float>(mean[given == 1 ? 0 : c]);
    shape.scale[c] = static_cast<float>(1 / std[given == 1 ? 0 : c]);
  }
  return shape;
}

// Calls body with a value of the type of the views.
template <typename Body>
void with_view_type(at::ScalarType dtype, const Body& body) {
  switch (dtype) {
    case at::kBFloat16:
      return body(c10::BFloat16());
    case at::kHalf:
      return body(c10::Half());
    default:
      return body(float());
  }
}

// The kernels take any stride from image to image.
inline at::Tensor with_dense_pixels(const at::Tensor& images) {
  return images.numel() == 0 || images[0].is_contiguous() ? images : images.contiguous();
}

}  // namespace iic_dist
