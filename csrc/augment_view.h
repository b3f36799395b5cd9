// What every kernel that makes views knows of one; no torch header. The contract stands in augment.h.
#pragma once

namespace iic_dist {

// Columns of `parameters`, as iic_dist/ops/augment.py fills them.
enum Parameter {
  kAffine = 0,   // a, b, c, d, e, f: x' = a x + b y + c, y' = d x + e y + f in pixels from the centre, result to image
  kBox = 6,      // top, left, height, width in pixels; inside the image, sides at least 1
  kFlip = 10,    // 0 or 1
  kBrightness,   // factors from 0
  kContrast,
  kSaturation,
  kHue,          // part of the circle, in [-0.5, 0.5]
  kGray,         // 0 or 1
  kSigma,        // pixels of the view
  kNumParameters
};

// ITU-R BT.601 luma, as rounded by torchvision.
constexpr float kRed = 0.2989f, kGreen = 0.587f, kBlue = 0.114f;
constexpr float kSharpest = 1e-3f;   // pixels; a Gaussian so narrow is exactly one pixel
constexpr float kNoSpread = 1e-12f;  // keeps 0 / 0 out of the hue of gray
constexpr int kMaxChannels = 3;

// What all views of a call have in common.
struct ViewShape {
  int channels, height, width, size, blur_kernel, out_channels;
  bool sobel, channels_last;
  float mean[kMaxChannels], scale[kMaxChannels];  // view = (pixel - mean) * scale
};

}  // namespace iic_dist
