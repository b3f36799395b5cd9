// The emulated device: threads as fibres, barriers, and memory that is watched. No torch header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

constexpr unsigned kLanes = 32;

struct Index {
  unsigned x, y, z;
  Index(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  size_t volume() const { return size_t{x} * y * z; }
};

struct LaunchShape {
  Index grid, block;
  unsigned cluster;  // blocks in one, along x
  size_t dynamic_shared;
};

// ---- of the host

// Runs every thread of a grid: blocks one after the other in a random order, those of a cluster together. Throws
// std::runtime_error for the first fault of a thread; the others are then dropped where they are.
// call, of call_bytes: what a thread may read besides its stack and the buffers.
void run(const LaunchShape& shape, const void* kernel, const void* call, size_t call_bytes,
         void (*thread)(const void* call));
void allow_dynamic_shared(const void* kernel, int bytes);
int compute_capability();

// ---- of a thread. The index of a thread never changes, so that the compiler may ask once.

[[gnu::const]] Index thread_index();
[[gnu::const]] Index block_index();
[[gnu::const]] Index block_size();
[[gnu::const]] Index grid_size();
[[noreturn]] void fail(const char* what);

// Of tests/support/kernel_mutations.py: whether one is switched on; fills a variable with what is in no variable.
[[gnu::const]] bool mutated(int number);
void forget(void* variable, size_t bytes);

void block_barrier(int line);
void cluster_arrive();
void cluster_wait();

// All lanes of a warp must come, each with `bytes` (up to 64) of its own; gives those of lane l at l * 64, until the
// lane comes back the time after next.
const unsigned char* exchange(const char* operation, const void* mine, size_t bytes);
void shuffle_xor(unsigned mask, void* value, size_t bytes, int lane_mask);

// ---- memory.cpp

void* place_shared(int site, size_t bytes, size_t alignment);
void* place_dynamic(size_t alignment);
void* of_block(void* shared, unsigned block);  // the same variable of another block of the cluster
size_t shared_address(const void* pointer);
void* shared_pointer(size_t address);

}  // namespace emulation
