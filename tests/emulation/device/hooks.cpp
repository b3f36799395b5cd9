// What the compiler calls: at each access because of -fsanitize=thread, in the place of libtsan; and where it has found a
// fault itself, because of -fsanitize=alignment,bounds, in the place of libubsan. Host code comes here too, unwatched.
#include <cstdio>
#include <cstring>

#include "device.h"
#include "memory.h"

using emulation::accessor;

static void watch(void* address, size_t bytes, bool write, const void* code) {
  if (accessor == nullptr || reinterpret_cast<uintptr_t>(address) - accessor->stack < accessor->stack_bytes) return;
  emulation::watch(address, bytes, write, code);
}

#define ACCESS(name, bytes, write)                                                             \
  void name(void* address) {                                                                   \
    watch(address, bytes, write, __builtin_return_address(0));                                 \
  }
#define ATOMIC(bits, type)                                                                                        \
  type __tsan_atomic##bits##_load(const volatile type* at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); } \
  void __tsan_atomic##bits##_store(volatile type* at, type value, int) {                                          \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                               \
  type __tsan_atomic##bits##_exchange(volatile type* at, type value, int) {                                       \
    return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                               \
  type __tsan_atomic##bits##_fetch_add(volatile type* at, type value, int) {                                      \
    return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);                                                       \
  }                                                                                                               \
  type __tsan_atomic##bits##_fetch_sub(volatile type* at, type value, int) {                                      \
    return __atomic_fetch_sub(at, value, __ATOMIC_SEQ_CST);                                                       \
  }                                                                                                               \
  bool __tsan_atomic##bits##_compare_exchange_strong(volatile type* at, type* old, type value, int, int) {        \
    return __atomic_compare_exchange_n(at, old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                \
  }                                                                                                               \
  bool __tsan_atomic##bits##_compare_exchange_weak(volatile type* at, type* old, type value, int, int) {          \
    return __atomic_compare_exchange_n(at, old, value, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                 \
  }

extern "C" {

ACCESS(__tsan_read1, 1, false)
ACCESS(__tsan_read2, 2, false)
ACCESS(__tsan_read4, 4, false)
ACCESS(__tsan_read8, 8, false)
ACCESS(__tsan_read16, 16, false)
ACCESS(__tsan_write1, 1, true)
ACCESS(__tsan_write2, 2, true)
ACCESS(__tsan_write4, 4, true)
ACCESS(__tsan_write8, 8, true)
ACCESS(__tsan_write16, 16, true)
ACCESS(__tsan_unaligned_read2, 2, false)
ACCESS(__tsan_unaligned_read4, 4, false)
ACCESS(__tsan_unaligned_read8, 8, false)
ACCESS(__tsan_unaligned_read16, 16, false)
ACCESS(__tsan_unaligned_write2, 2, true)
ACCESS(__tsan_unaligned_write4, 4, true)
ACCESS(__tsan_unaligned_write8, 8, true)
ACCESS(__tsan_unaligned_write16, 16, true)
void __tsan_read_range(void* address, size_t bytes) {
  watch(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  watch(address, bytes, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}
ATOMIC(8, uint8_t)
ATOMIC(16, uint16_t)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)

struct SourcePlace {  // that begins every report of -fsanitize=alignment,bounds
  const char* file;
  uint32_t line, column;
};

static void report(const char* what, const SourcePlace& place) {
  if (accessor == nullptr) return;
  const char* const slash = std::strrchr(place.file, '/');
  char text[200];
  std::snprintf(text, sizeof(text), "%s (%s:%u)", what, slash == nullptr ? place.file : slash + 1, place.line);
  emulation::fail(text);
}
void __ubsan_handle_type_mismatch_v1(SourcePlace* place, uintptr_t) { report("an address of a wrong alignment", *place); }
void __ubsan_handle_out_of_bounds(SourcePlace* place, uintptr_t) { report("an index outside of an array", *place); }
}
