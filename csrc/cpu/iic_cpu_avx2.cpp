// The IIC kernels for AVX2; see isa/avx2.h for the order of the headers.
#if defined(__x86_64__)
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "iic_kernels.h"

#include "isa/avx2.h"
#include "iic_kernels.inc"
#include "isa/end.h"
#endif
