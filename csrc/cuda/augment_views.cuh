// The kernel that makes views on CUDA; the contract stands in ../augment.h.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>
#include <cstdint>

#include "../augment_view.h"
#include "reduce.cuh"

namespace iic_dist {

constexpr int kViewThreads = 256;

// Where a block keeps what it works on: offsets in floats into its shared memory, or -1 for its part of `workspace`.
struct ViewLayout {
  int samples[2], gaussian, planes, blurred;
  int image;  // or -1 to read it where it is
};

template <typename T>
struct ViewTask {
  ViewShape shape;
  ViewLayout layout;
  const uint8_t* images;
  int64_t image_stride, num_images;
  const int64_t* rows;
  int64_t batch, num_views;
  const float* parameters;  // (V*N, kNumParameters)
  float* workspace;         // of each block, workspace_stride apart: planes, then blurred planes
  int64_t workspace_stride;
  T* views;
};

namespace {

// What sample j of a resampled line is made of: pixels first to first + count - 1, by the triangle filter of
// ops/augment.py's _triangle_weights; `rest` is how far the first one lies from the middle of the sample.
struct Sample {
  short first, count;
  float rest, scale;

  __device__ float weight(int k, float sharpness) const {
    return fmaxf(0.f, 1.f - fabsf((k + rest) * sharpness)) * scale;
  }
};

// One axis of a crop.
struct Axis {
  Sample* samples;
  float sharpness;  // 1 / how far the triangle reaches
};

__device__ double bounded(double v, double low, double high) { return v > low ? v < high ? v : high : low; }

// Fills the samples of an axis; every thread must call, and wait before it reads them.
__device__ Axis make_axis(float* memory, float start, float length, int pixels, int size, bool flip) {
  const double step = static_cast<double>(length) / size, support = fmax(step, 1.0), half = length / 2.0;
  const Axis axis{reinterpret_cast<Sample*>(memory), static_cast<float>(1 / support)};
  const double first = bounded(ceil(start - 0.5), 0, pixels - 1);
  const double last = bounded(floor(static_cast<double>(start) + length - 0.5), first, pixels - 1);
  for (int j = threadIdx.x; j < size; j += kViewThreads) {
    const double middle = start + half + (((flip ? size - 1 - j : j) + 0.5) * step - half) - 0.5;
    const double from = bounded(floor(middle - support) + 1, first, last);
    const double to = bounded(ceil(middle + support) - 1, from, last);
    Sample sample{static_cast<short>(from), static_cast<short>(to - from + 1), static_cast<float>(from - middle), 1.f};
    float sum = 0;
    for (int k = 0; k < sample.count; ++k) sum += sample.weight(k, axis.sharpness);
    sample.scale = 1.f / sum;
    axis.samples[j] = sample;
  }
  return axis;
}

__device__ float clamp01(float v) { return fminf(fmaxf(v, 0.f), 1.f); }

__device__ float luma(const float (&rgb)[3]) { return kRed * rgb[0] + kGreen * rgb[1] + kBlue * rgb[2]; }
__device__ float luma(const float (&gray)[1]) { return gray[0]; }

// The image that the crop sees: its pixels, or those of the affine image, bilinear and zero outside.
template <int kChannels>
struct Source {
  const uint8_t* image;  // in shared or global memory
  int height, width;
  bool moved;
  const float* affine;

  __device__ void add(int y, int x, float weight, float (&sums)[kChannels]) const {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) sums[c] += weight * image[(c * height + y) * width + x];
  }

  __device__ void add_moved(int y, int x, float weight, float (&sums)[kChannels]) const {
    const double middle_x = (width - 1) / 2.0, middle_y = (height - 1) / 2.0;  // float32 is off by 4e-6 pixels at 64
    const double from_x = affine[0] * (x - middle_x) + affine[1] * (y - middle_y) + affine[2] + middle_x;
    const double from_y = affine[3] * (x - middle_x) + affine[4] * (y - middle_y) + affine[5] + middle_y;
    if (!(from_x > -1 && from_x < width && from_y > -1 && from_y < height)) return;
    const int left = static_cast<int>(floor(from_x)), top = static_cast<int>(floor(from_y));
    const float rest_x = static_cast<float>(from_x - left), rest_y = static_cast<float>(from_y - top);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = left + i % 2, row = top + i / 2;
      const float share = (i % 2 ? rest_x : 1.f - rest_x) * (i / 2 ? rest_y : 1.f - rest_y);
      if (column >= 0 && column < width && row >= 0 && row < height) add(row, column, weight * share, sums);
    }
  }

  // Sample (j, i) of the resampled crop.
  __device__ void resample(const Axis& rows, const Axis& columns, int j, int i, float (&sums)[kChannels]) const {
    const Sample down = rows.samples[j], across = columns.samples[i];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) sums[c] = 0.f;
    for (int k = 0; k < down.count; ++k) {
      const float share = down.weight(k, rows.sharpness) * (1.f / 255.f);
      for (int l = 0; l < across.count; ++l) {
        const float weight = share * across.weight(l, columns.sharpness);
        if (moved)
          add_moved(down.first + k, across.first + l, weight, sums);
        else
          add(down.first + k, across.first + l, weight, sums);
      }
    }
  }
};

// Contrast, saturation, hue and gray of one pixel.
__device__ void adjust_colours(const float* p, float mean, float (&pixel)[1]) {
  pixel[0] = clamp01(pixel[0] * p[kContrast] + mean * (1.f - p[kContrast]));
}

__device__ void adjust_colours(const float* p, float mean, float (&rgb)[3]) {
#pragma unroll
  for (int c = 0; c < 3; ++c) rgb[c] = clamp01(rgb[c] * p[kContrast] + mean * (1.f - p[kContrast]));
  if (p[kSaturation] != 1.f) {
    const float other = luma(rgb) * (1.f - p[kSaturation]);
#pragma unroll
    for (int c = 0; c < 3; ++c) rgb[c] = clamp01(rgb[c] * p[kSaturation] + other);
  }
  if (p[kHue] != 0.f) {
    const float smallest = fminf(fminf(rgb[0], rgb[1]), rgb[2]);
    const float spread = fmaxf(fmaxf(rgb[0], rgb[1]), rgb[2]) - smallest;
    const float side = 1.f + (rgb[1] + rgb[2] - rgb[0] - smallest) / fmaxf(spread, kNoSpread);
    float hue = (rgb[1] < rgb[2] ? -side : side) + 6.f * p[kHue];
    hue = hue < 0.f ? hue + 6.f : hue;  // [0, 6]; 6 is red like 0
    rgb[0] = smallest + spread * clamp01(fabsf(hue - 3.f) - 1.f);
    rgb[1] = smallest + spread * clamp01(2.f - fabsf(hue - 2.f));
    rgb[2] = smallest + spread * clamp01(2.f - fabsf(hue - 4.f));
  }
  if (p[kGray] != 0.f) rgb[0] = rgb[1] = rgb[2] = clamp01(luma(rgb));
}

__device__ int reflect(int i, int size) { return i < 0 ? -i : i >= size ? 2 * size - 2 - i : i; }

// Blurs planes (channels, size, size) along their columns (step = size) or rows (step = 1).
__device__ void blur(const float* from, float* to, int channels, int size, int step, const float* weights, int reach) {
  for (int i = threadIdx.x; i < channels * size * size; i += kViewThreads) {
    const int place = i / step % size;
    const float* line = from + (i - place * step);
    float sum = line[place * step] * weights[0];
    for (int k = 1; k <= reach; ++k)
      sum += (line[reflect(place - k, size) * step] + line[reflect(place + k, size) * step]) * weights[k];
    to[i] = sum;
  }
}

// Gray of a pixel of the planes, zero outside.
template <int kChannels>
__device__ float gray_at(const float* planes, int size, int y, int x) {
  if (y < 0 || y >= size || x < 0 || x >= size) return 0.f;
  float pixel[kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) pixel[c] = planes[(c * size + y) * size + x];
  return luma(pixel);
}

template <int kChannels>
__device__ void sobel_at(const float* planes, int size, int y, int x, float (&gradient)[2]) {
  const auto gray = [&](int dy, int dx) { return gray_at<kChannels>(planes, size, y + dy, x + dx); };
  const float corners[4] = {gray(-1, -1), gray(-1, 1), gray(1, -1), gray(1, 1)};
  gradient[0] = (corners[0] - corners[1]) + (corners[2] - corners[3]) + 2.f * (gray(0, -1) - gray(0, 1));
  gradient[1] = (corners[0] - corners[2]) + (corners[1] - corners[3]) + 2.f * (gray(-1, 0) - gray(1, 0));
}

template <int kOut, typename T>
__device__ void write_pixel(const ViewShape& shape, const float (&pixel)[kOut], int i, T* out) {
#pragma unroll
  for (int c = 0; c < kOut; ++c) {
    const T value = static_cast<T>((pixel[c] - shape.mean[c]) * shape.scale[c]);
    out[shape.channels_last ? i * kOut + c : c * shape.size * shape.size + i] = value;
  }
}

// Copies the bytes of an image, 16 at a time where both sides allow it.
__device__ void copy_image(const uint8_t* from, uint8_t* to, int bytes) {
  const bool aligned = bytes % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
  if (aligned) {
    for (int i = threadIdx.x; i < bytes / 16; i += kViewThreads)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  } else {
    for (int i = threadIdx.x; i < bytes; i += kViewThreads) to[i] = from[i];
  }
}

// The half of a Gaussian from its middle, as ops/augment.py's gaussian_blur; every thread must call.
__device__ void make_gaussian(float* weights, float sigma, int reach) {
  const float narrow = fmaxf(sigma, kSharpest);
  if (threadIdx.x == 0) {
    float sum = -1;
    for (int k = 0; k <= reach; ++k) {
      weights[k] = expf(-0.5f * (k / narrow) * (k / narrow));
      sum += 2 * weights[k];
    }
    for (int k = 0; k <= reach; ++k) weights[k] /= sum;
  }
  __syncthreads();
}

// A block owns a view at a time, a thread every 256th of its pixels. Shared memory holds the filters and, where they
// fit, the image and the planes of the view.
template <int kChannels, typename T>
__global__ void __launch_bounds__(kViewThreads) augment_views_kernel(ViewTask<T> task) {
  extern __shared__ float4 dynamic[];
  float* const shared = reinterpret_cast<float*>(dynamic);
  __shared__ float p[kNumParameters];
  __shared__ float scratch[kViewThreads / kWarp];
  const ViewShape& shape = task.shape;
  const ViewLayout& layout = task.layout;
  const int size = shape.size, pixels = size * size, height = shape.height, width = shape.width;
  float* const spilled = task.workspace + blockIdx.x * task.workspace_stride;
  float* const planes = layout.planes >= 0 ? shared + layout.planes : spilled;
  float* const blurred =
      layout.blurred >= 0 ? shared + layout.blurred : spilled + (layout.planes >= 0 ? 0 : kChannels * pixels);
  for (int64_t view = blockIdx.x; view < task.num_views; view += gridDim.x) {
    const int64_t row = task.rows[view % task.batch];
    CUDA_KERNEL_ASSERT(row >= 0 && row < task.num_images);
    const uint8_t* image = task.images + row * task.image_stride;
    __syncthreads();  // the view before is done
    if (threadIdx.x < kNumParameters) p[threadIdx.x] = task.parameters[view * kNumParameters + threadIdx.x];
    if (layout.image >= 0) {
      auto* const copy = reinterpret_cast<uint8_t*>(shared + layout.image);
      copy_image(image, copy, kChannels * height * width);
      image = copy;
    }
    __syncthreads();
    const Axis rows = make_axis(shared + layout.samples[0], p[kBox], p[kBox + 2], height, size, false);
    const Axis columns = make_axis(shared + layout.samples[1], p[kBox + 1], p[kBox + 3], width, size, p[kFlip] != 0.f);
    const bool moved = !(p[0] == 1.f && p[1] == 0.f && p[2] == 0.f && p[3] == 0.f && p[4] == 1.f && p[5] == 0.f);
    const Source<kChannels> source{image, height, width, moved, p + kAffine};
    __syncthreads();
    float pixel[kChannels], gray = 0.f;
    for (int i = threadIdx.x; i < pixels; i += kViewThreads) {
      source.resample(rows, columns, i / size, i % size, pixel);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) planes[c * pixels + i] = pixel[c] = clamp01(pixel[c] * p[kBrightness]);
      gray += luma(pixel);
    }
    const float mean = block_sum(gray, scratch) / pixels;
    const bool blurs = p[kSigma] > 0.f && shape.blur_kernel > 1, spatial = blurs || shape.sobel;
    T* const out = task.views + view * shape.out_channels * pixels;
    for (int i = threadIdx.x; i < pixels; i += kViewThreads) {  // the pixels that this thread has written
#pragma unroll
      for (int c = 0; c < kChannels; ++c) pixel[c] = planes[c * pixels + i];
      adjust_colours(p, mean, pixel);
      if (!spatial) write_pixel(shape, pixel, i, out);
#pragma unroll
      for (int c = 0; spatial && c < kChannels; ++c) planes[c * pixels + i] = pixel[c];
    }
    if (!spatial) continue;
    __syncthreads();
    if (blurs) {
      float* const weights = shared + layout.gaussian;
      const int reach = shape.blur_kernel / 2;
      make_gaussian(weights, p[kSigma], reach);
      blur(planes, blurred, kChannels, size, size, weights, reach);
      __syncthreads();
      blur(blurred, planes, kChannels, size, 1, weights, reach);
      __syncthreads();
    }
    for (int i = threadIdx.x; i < pixels; i += kViewThreads) {
      if (shape.sobel) {
        float gradient[2];
        sobel_at<kChannels>(planes, size, i / size, i % size, gradient);
        write_pixel(shape, gradient, i, out);
      } else {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) pixel[c] = planes[c * pixels + i];
        write_pixel(shape, pixel, i, out);
      }
    }
  }
}

}  // namespace

}  // namespace iic_dist
