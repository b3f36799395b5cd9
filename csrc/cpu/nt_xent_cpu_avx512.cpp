// The NT-Xent kernels for AVX-512; see isa/avx512.h for the order of the headers.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "nt_xent_kernels.h"

#include "isa/avx512.h"
#include "nt_xent_kernels.inc"
#include "isa/end.h"
#endif
