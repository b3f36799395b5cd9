// The view kernels for what every processor of the platform has: SSE2 on x86-64, NEON on arm64.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "augment_kernels.h"

#define IIC_DIST_ISA baseline
#define IIC_DIST_VECTOR_BYTES 16
#include "augment_kernels.inc"
