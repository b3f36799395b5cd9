// The view kernels for AVX-512. Other headers come before the pragma: their inline functions are shared with
// the rest of the program and must not need AVX-512.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "augment_kernels.h"

#define IIC_DIST_ISA avx512
#define IIC_DIST_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#include "augment_kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
