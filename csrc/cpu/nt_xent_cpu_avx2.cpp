// The NT-Xent kernels for AVX2; see isa/avx2.h for the order of the headers.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "nt_xent_kernels.h"

#include "isa/avx2.h"
#include "nt_xent_kernels.inc"
#include "isa/end.h"
#endif
