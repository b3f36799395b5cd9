// What a launch may ask for: the limits that every device from 8.0 on keeps.
#include <cstddef>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "device.h"
#include "memory.h"

namespace emulation {
namespace {

constexpr size_t kMaxSharedUnasked = 48 * 1024;
constexpr unsigned kMaxThreads = 1024, kMaxGrid = 65535;

int capability = 9;
std::unordered_map<const void*, size_t> allowed_shared;  // by kernel

void refuse(const std::string& what) { throw std::runtime_error("emulated launch: " + what); }

}  // namespace

void check_shape(const LaunchShape& shape, const void* kernel) {
  const size_t threads = shape.block.volume();
  if (threads == 0 || threads > kMaxThreads) refuse("a block of " + std::to_string(threads) + " threads");
  if (shape.grid.volume() == 0 || shape.grid.x > 0x7fffffffu || shape.grid.y > kMaxGrid || shape.grid.z > kMaxGrid) {
    refuse("a grid of " + std::to_string(shape.grid.x) + " x " + std::to_string(shape.grid.y) + " x " +
           std::to_string(shape.grid.z) + " blocks");
  }
  const auto asked = allowed_shared.find(kernel);
  const size_t most = asked == allowed_shared.end() ? kMaxSharedUnasked : asked->second;
  if (shape.dynamic_shared > most) refuse(std::to_string(shape.dynamic_shared) + " bytes of shared memory");
  if (shape.cluster < 1 || shape.cluster > 8 || shape.grid.x % shape.cluster != 0 ||
      (shape.cluster > 1 && capability < 9)) {
    refuse("clusters of " + std::to_string(shape.cluster) + " blocks");
  }
}

void allow_dynamic_shared(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kMaxShared) {
    refuse("asks for " + std::to_string(bytes) + " bytes of shared memory");
  }
  allowed_shared[kernel] = static_cast<size_t>(bytes);
}

int compute_capability() { return capability; }

}  // namespace emulation

extern "C" {

void emulation_capability(int major) { emulation::capability = major; }
}
