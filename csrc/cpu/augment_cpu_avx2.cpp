// The view kernels for AVX2. Other headers come before the pragma: their inline functions are shared with the
// rest of the program and must not need AVX2.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "augment_kernels.h"

#define IIC_DIST_ISA avx2
#define IIC_DIST_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "augment_kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
