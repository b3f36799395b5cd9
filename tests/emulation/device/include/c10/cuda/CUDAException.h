// In the place of torch's: errors of the emulated device are exceptions already.
#pragma once

#define C10_CUDA_CHECK(expression) static_cast<void>(expression)
#define C10_CUDA_KERNEL_LAUNCH_CHECK() C10_CUDA_CHECK(cudaGetLastError())
