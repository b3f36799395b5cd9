// The NT-Xent kernels for what every processor of the platform has: SSE2 on x86-64, NEON on arm64.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "nt_xent_kernels.h"

#define IIC_DIST_ISA baseline
#define IIC_DIST_VECTOR_BYTES 16
#if defined(__aarch64__)
#define IIC_DIST_REGISTERS 32
#else
#define IIC_DIST_REGISTERS 16
#endif
#include "nt_xent_kernels.inc"
