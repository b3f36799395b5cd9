// What the hosts of the CUDA kernels share when they lay out a grid.
#pragma once

#include <cstdint>

namespace iic_dist {

// Of an H100. Not asked of the device, so that the order of summation is the same on all of them.
constexpr int kMultiprocessors = 132;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace iic_dist
