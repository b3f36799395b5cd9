// What a .cu file finds without an include, or in cuda_runtime.h: keywords, indices, vectors, intrinsics, launches.
// Included before all else in the sources that tests/support/emulation.py has translated.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "device.h"
#include "ptx.h"

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition) ((condition) ? void() : emulation::fail("assertion " #condition))

using dim3 = emulation::Index;

// Indices are asked for when they are used.
template <emulation::Index (*kIndex)()>
struct IndexVariable {
  template <unsigned emulation::Index::*kMember>
  struct Component {
    operator unsigned() const { return kIndex().*kMember; }
  };
  Component<&emulation::Index::x> x;
  Component<&emulation::Index::y> y;
  Component<&emulation::Index::z> z;
};
inline constexpr IndexVariable<emulation::thread_index> threadIdx = {};
inline constexpr IndexVariable<emulation::block_index> blockIdx = {};
inline constexpr IndexVariable<emulation::block_size> blockDim = {};
inline constexpr IndexVariable<emulation::grid_size> gridDim = {};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

inline int min(int a, int b) { return a < b ? a : b; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline size_t __cvta_generic_to_shared(const void* pointer) { return emulation::shared_address(pointer); }
inline size_t __cvta_generic_to_global(const void* pointer) { return reinterpret_cast<size_t>(pointer); }

inline void __syncthreads(int line = __builtin_LINE()) { emulation::block_barrier(line); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  emulation::shuffle_xor(mask, &value, sizeof(T), lane_mask);
  return value;
}

// ---- launches

namespace emulation {

// A variable in shared memory. site: its place in the sources; all threads of a block get the same memory for it.
template <typename T>
T& shared(int site, size_t alignment = alignof(T)) {
  return *reinterpret_cast<T*>(place_shared(site, sizeof(T), alignment));
}
template <typename T>
T* dynamic_shared(size_t alignment = alignof(T)) {
  return reinterpret_cast<T*>(place_dynamic(alignment));
}

template <typename... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> arguments;
};

template <typename... Parameters>
void run_kernel(void (*kernel)(Parameters...), const LaunchShape& shape, const std::tuple<Parameters...>& arguments) {
  const Call<Parameters...> call = {kernel, arguments};
  run(shape, reinterpret_cast<const void*>(kernel), &call, sizeof(call), [](const void* pointer) {
    const auto* one = static_cast<const Call<Parameters...>*>(pointer);
    std::apply(one->kernel, one->arguments);
  });
}

template <typename... Arguments>
struct BoundLaunch {
  LaunchShape shape;
  std::tuple<Arguments...> arguments;
};

// kernel<<<grid, block, shared, stream>>>(arguments) is translated to kernel << Launch(grid, ...)(arguments).
struct Launch {
  LaunchShape shape;
  Launch(Index grid, Index block, size_t dynamic_shared = 0, const void* = nullptr)
      : shape{grid, block, 1, dynamic_shared} {}

  template <typename... Arguments>
  BoundLaunch<Arguments...> operator()(Arguments... arguments) const {
    return {shape, {arguments...}};
  }
};

template <typename... Parameters, typename... Arguments>
void operator<<(void (*kernel)(Parameters...), const BoundLaunch<Arguments...>& launch) {
  run_kernel(kernel, launch.shape, std::tuple<Parameters...>(launch.arguments));
}

}  // namespace emulation

using cudaStream_t = const void*;
enum cudaError_t { cudaSuccess };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
struct cudaFuncAttributes {
  int ptxVersion;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// Errors are thrown where they are made: a launch is over when it returns.
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  emulation::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), bytes);
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = EMULATED_ARCH / 10;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulation::compute_capability();
  return cudaSuccess;
}
template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               std::type_identity_t<Parameters>... arguments) {
  const unsigned cluster = config->numAttrs > 0 ? config->attrs->val.clusterDim.x : 1;
  emulation::run_kernel(kernel, {config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes},
                        std::tuple<Parameters...>(arguments...));
  return cudaSuccess;
}
