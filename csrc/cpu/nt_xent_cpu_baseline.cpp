// The NT-Xent kernels for what every processor of the platform has.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "nt_xent_kernels.h"

#include "isa/baseline.h"
#include "nt_xent_kernels.inc"
