// The IIC kernels for what every processor of the platform has.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "iic_kernels.h"

#include "isa/baseline.h"
#include "iic_kernels.inc"
