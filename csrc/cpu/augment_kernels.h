// What augment_cpu.cpp asks of an instruction set. augment_cpu_{avx512,avx2,baseline}.cpp each compile
// augment_kernels.inc for one.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

#include "../augment_view.h"

namespace iic_dist::cpu {

// The images of a set, `stride` bytes apart, and one past their last byte: how far a whole vector may read beyond a row.
struct Images {
  const uint8_t* data;
  int64_t stride;
  const uint8_t* end;
};

template <typename T>
struct ViewTask {
  ViewShape shape;
  Images images;
  const float* parameters;  // (V*N, kNumParameters)
  T* views;
};

template <typename T>
struct ViewKernels {
  int64_t (*scratch_size)(const ViewShape&);  // floats that make_view needs
  void (*make_view)(const ViewTask<T>&, int64_t view, int64_t image, float* scratch);
};

namespace avx512 {
template <typename T>
ViewKernels<T> view_kernels();
}
namespace avx2 {
template <typename T>
ViewKernels<T> view_kernels();
}
namespace baseline {
template <typename T>
ViewKernels<T> view_kernels();
}

}  // namespace iic_dist::cpu
