// The view kernels for what every processor of the platform has.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "augment_kernels.h"

#include "isa/baseline.h"
#include "augment_kernels.inc"
