// What the parts of the device tell each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "device.h"

namespace emulation {

// ---- device.cpp

struct Accessor {
  unsigned thread;  // in its cluster; 0xffff stands for several
  unsigned block;   // in its cluster
  uintptr_t stack, stack_bytes;
};
extern const Accessor* accessor;  // of the thread that runs, or null: then nothing is watched
extern const void* launch_call;
extern size_t launch_call_bytes;

// Ends the launch with `what` about the code at a return address.
[[noreturn]] void fail_at(const char* what, const void* code);
void count_step();

// ---- limits.cpp, place.cpp

constexpr size_t kMaxShared = 99 * 1024;  // of a block, where the kernel asks for it
void check_shape(const LaunchShape& shape, const void* kernel);
std::string place_of(const void* code);

// ---- memory.cpp

void forget_places();                      // of variables: a launch begins
void begin_blocks(size_t dynamic_shared);  // a cluster begins
void next_interval(unsigned block);        // a barrier: what was before is ordered before what comes
void end_of_block(unsigned block);         // its shared memory is gone

// Checks an access of the thread that runs to what is not its stack, and fails.
void watch(const void* address, size_t bytes, bool write, const void* code);
void start_copy(void* shared, const void* global, size_t bytes, const void* code);
void finish_copies();

}  // namespace emulation
