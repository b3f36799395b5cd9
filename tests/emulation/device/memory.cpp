// Watched memory. An access must lie in the stack of its thread, the call of the launch, one buffer of the host, or one
// variable in shared memory. There it must find what was written, and no other thread may touch the same byte between
// the same two barriers unless both only read.
#include "memory.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "device.h"

namespace emulation {
namespace {

char* reserve(size_t bytes) {
  void* const memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

// ---- buffers: all tensors that the host allocates while `guard` is on, full of NaN, pages apart

constexpr size_t kHeapBytes = size_t{1} << 35, kPage = 4096;

struct Heap {
  char* const memory = reserve(kHeapBytes);
  char* const live = reserve(kHeapBytes);  // 1 for each byte of a buffer
  size_t next = kPage;
  std::unordered_map<void*, size_t> sizes;
};

Heap& heap() {
  static Heap* const instance = new Heap;
  return *instance;
}

void release(void* pointer) {
  Heap& h = heap();
  const auto found = h.sizes.find(pointer);
  const size_t offset = static_cast<size_t>(static_cast<char*>(pointer) - h.memory), size = found->second;
  std::memset(h.live + offset, 0, size);
  madvise(h.memory + offset, (size + kPage - 1) / kPage * kPage, MADV_DONTNEED);
  h.sizes.erase(found);
  if (h.sizes.empty()) h.next = kPage;
}

struct GuardedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, c10::kCPU};
    Heap& h = heap();
    const size_t offset = h.next, whole = (bytes + kPage - 1) / kPage * kPage;
    if (offset + whole + kPage > kHeapBytes) throw std::bad_alloc();
    h.next += whole + kPage;
    char* const pointer = h.memory + offset;
    h.sizes[pointer] = bytes;
    std::memset(pointer, 0xff, bytes);
    std::memset(h.live + offset, 1, bytes);
    return {pointer, pointer, &release, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

bool in_heap(uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(heap().memory) < kHeapBytes;
}

bool in_buffer(uintptr_t address, size_t bytes) {
  const char* const live = heap().live + (address - reinterpret_cast<uintptr_t>(heap().memory));
  return std::all_of(live, live + bytes, [](char byte) { return byte == 1; });
}

// ---- shared memory: static variables from kStatic on, dynamic memory from kDynamic on, with gaps between them

constexpr size_t kBlockBytes = 256 * 1024, kStatic = 1024, kDynamic = 128 * 1024, kGap = 512;
constexpr unsigned kMaxBlocks = 8, kSeveral = 0xffff;
constexpr size_t kMaxStatic = 48 * 1024;
constexpr int kDynamicSite = -1;

enum Content : uint8_t { kOutside, kUnwritten, kWritten, kCopying };

struct Byte {
  Content content;
  uint16_t writer, reader;  // of the interval that is named beside it
  uint32_t written, read;
};

struct Range {
  size_t offset, bytes;
};

struct SharedBlock {
  uint32_t interval = 1;
  std::vector<Range> used;
  std::unordered_set<int> placed;
};

struct Copy {
  size_t to;
  unsigned char data[16];
};

char* const shared_memory = reserve(kBlockBytes * kMaxBlocks);
Byte* const shared_bytes = reinterpret_cast<Byte*>(reserve(kBlockBytes * kMaxBlocks * sizeof(Byte)));
SharedBlock blocks[kMaxBlocks];
std::unordered_map<int, size_t> places;  // of the launch, so that they are the same in all blocks
size_t next_place = kStatic, static_bytes = 0, dynamic_bytes = 0;
std::unordered_map<unsigned, std::vector<Copy>> copies;  // by thread

// The memory of a variable in the block that runs; the first thread that comes finds it unwritten.
void* place(int site, size_t offset, size_t bytes) {
  SharedBlock& block = blocks[accessor->block];
  const size_t from = accessor->block * kBlockBytes + offset;
  if (block.placed.insert(site).second) {
    std::memset(shared_memory + from, 0xff, bytes);
    for (size_t i = from; i < from + bytes; ++i) shared_bytes[i] = {kUnwritten, 0, 0, 0, 0};
    block.used.push_back({offset, bytes});
  }
  return shared_memory + from;
}

void close(unsigned block) {
  for (const Range& range : blocks[block].used) {
    for (size_t i = 0; i < range.bytes; ++i) shared_bytes[block * kBlockBytes + range.offset + i].content = kOutside;
  }
  blocks[block].used.clear();
  blocks[block].placed.clear();
}

[[noreturn]] void fail_access(const char* what, size_t bytes, bool write, const void* code) {
  char text[160];
  std::snprintf(text, sizeof(text), "%s %zu bytes %s", write ? "writes" : "reads", bytes, what);
  fail_at(text, code);
}

void watch_shared(size_t offset, size_t bytes, bool write, const void* code) {
  const uint32_t now = blocks[offset / kBlockBytes].interval;
  const auto thread = static_cast<uint16_t>(accessor->thread);
  for (Byte* byte = shared_bytes + offset; byte < shared_bytes + offset + bytes; ++byte) {
    if (byte->content == kOutside) fail_access("outside of every variable in shared memory", bytes, write, code);
    if (byte->content == kCopying) fail_access("that an asynchronous copy is still bringing", bytes, write, code);
    if (!write && byte->content == kUnwritten) fail_access("of shared memory that nobody has written", bytes, write, code);
    if (byte->written == now && byte->writer != thread) {
      fail_access("that another thread writes between the same barriers", bytes, write, code);
    }
    if (write) {
      if (byte->read == now && byte->reader != thread) {
        fail_access("that another thread reads between the same barriers", bytes, write, code);
      }
      byte->content = kWritten;
      byte->writer = thread;
      byte->written = now;
    } else {
      byte->reader = byte->read == now && byte->reader != thread ? kSeveral : thread;
      byte->read = now;
    }
  }
}

bool in_shared(uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(shared_memory) < kBlockBytes * kMaxBlocks;
}

size_t own_offset(const void* pointer) {
  if (!in_shared(reinterpret_cast<uintptr_t>(pointer))) fail("takes an address in shared memory of what is not there");
  return static_cast<size_t>(static_cast<const char*>(pointer) - shared_memory) - accessor->block * kBlockBytes;
}

}  // namespace

void watch(const void* pointer, size_t bytes, bool write, const void* code) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  count_step();
  if (in_shared(address)) {
    return watch_shared(address - reinterpret_cast<uintptr_t>(shared_memory), bytes, write, code);
  }
  if (in_heap(address)) {
    if (!in_buffer(address, bytes)) fail_access("outside of every buffer", bytes, write, code);
    return;
  }
  if (!write && address - reinterpret_cast<uintptr_t>(launch_call) + bytes <= launch_call_bytes) return;
  fail_access("where no buffer is", bytes, write, code);
}

void begin_blocks(size_t dynamic_shared) {
  copies.clear();
  dynamic_bytes = dynamic_shared;
  for (unsigned b = 0; b < kMaxBlocks; ++b) {
    close(b);
    next_interval(b);
  }
}

void next_interval(unsigned block) { ++blocks[block].interval; }

void end_of_block(unsigned block) { close(block); }

void forget_places() {
  places.clear();
  next_place = kStatic;
  static_bytes = 0;
}

// No better aligned than asked for, as a variable may be on a GPU.
void* place_shared(int site, size_t bytes, size_t alignment) {
  auto found = places.find(site);
  if (found == places.end()) {
    const size_t offset = (next_place + 127) / 128 * 128 + alignment % 128;
    next_place = offset + bytes + kGap;
    static_bytes += bytes;
    if (static_bytes > kMaxStatic) fail("more than 48 KiB of static shared memory");
    if (static_bytes + dynamic_bytes > kMaxShared) fail("more than 99 KiB of static and dynamic shared memory");
    found = places.emplace(site, offset).first;
  }
  return place(site, found->second, bytes);
}

void* place_dynamic(size_t alignment) { return place(kDynamicSite, kDynamic + alignment % 128, dynamic_bytes); }

void* of_block(void* shared, unsigned block) {
  if (block >= kMaxBlocks) fail("a block outside of its cluster");
  return shared_memory + block * kBlockBytes + own_offset(shared);
}

size_t shared_address(const void* pointer) { return own_offset(pointer); }

void* shared_pointer(size_t address) { return shared_memory + accessor->block * kBlockBytes + address; }

void start_copy(void* shared, const void* global, size_t bytes, const void* code) {
  watch(global, bytes, false, code);
  if (!in_shared(reinterpret_cast<uintptr_t>(shared))) fail_at("copies to what is not in shared memory", code);
  if (in_shared(reinterpret_cast<uintptr_t>(global))) fail_at("copies from what is not in global memory", code);
  watch(shared, bytes, true, code);
  Copy copy{static_cast<size_t>(static_cast<char*>(shared) - shared_memory), {}};
  std::memcpy(copy.data, global, bytes);
  for (size_t i = 0; i < bytes; ++i) shared_bytes[copy.to + i].content = kCopying;
  copies[accessor->thread].push_back(copy);
}

void finish_copies() {
  const auto found = copies.find(accessor->thread);
  if (found == copies.end()) return;
  for (const Copy& copy : found->second) {
    std::memcpy(shared_memory + copy.to, copy.data, sizeof(copy.data));
    for (size_t i = copy.to; i < copy.to + sizeof(copy.data); ++i) {
      shared_bytes[i] = {kWritten, static_cast<uint16_t>(accessor->thread), 0, blocks[copy.to / kBlockBytes].interval,
                         0};
    }
  }
  copies.erase(found);
}

}  // namespace emulation

extern "C" {

// Whether tensors of the CPU that are made from here on are watched buffers.
void emulation_guard(bool on) {
  static emulation::GuardedAllocator guarded;
  static c10::Allocator* usual = nullptr;
  if (usual == nullptr) usual = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? &guarded : usual);
}
}
