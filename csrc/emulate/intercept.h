// The calls that -fsanitize=thread puts before every load and store of a kernel, answered by the emulator's checks.
#pragma once

#include <dlfcn.h>

#include "banks.h"
#include "global_shadow.h"
#include "memory.h"
#include "shadow.h"
#include "state.h"

namespace emulate {

// Of a thread that has accumulators of wgmma: hopper_wgmma.h.
inline void check_registers(const Fiber& fiber, const unsigned char* begin, size_t bytes, uintptr_t pc);

inline void fail_misaligned(const void* pointer, size_t bytes, const char* verb, uintptr_t pc) {
  fail("%s %zu bytes @%lx at an address that is %lu past a multiple of %zu: such an access must be aligned to its size",
       verb, bytes, (unsigned long)module_offset(pc), (unsigned long)(reinterpret_cast<uintptr_t>(pointer) % bytes),
       bytes);
}

// A loop on a flag that another thread is to set never ends here: threads take turns only where they wait.
constexpr uint64_t SPIN_LIMIT = uint64_t(1) << 23;

inline void fail_spinning(uintptr_t pc) {
  fail("has made %lu accesses @%lx without waiting for anybody: a loop that does not end, or one on a flag",
       (unsigned long)SPIN_LIMIT, (unsigned long)module_offset(pc));
}

// `aligned`: one instruction of this width, which must be aligned to it; else bytes that may be moved in any pieces.
inline void check_access(const void* pointer, size_t bytes, bool write, bool aligned, uintptr_t pc,
                         uint16_t kind = PLAIN) {
  Fiber* fiber = state.current;
  const unsigned char* p = static_cast<const unsigned char*>(pointer);
  if (size_t(p - fiber->stack) < STACK_BYTES) {
    if (fiber->accumulators) check_registers(*fiber, p, bytes, pc);
    return;
  }
  if (aligned && (reinterpret_cast<uintptr_t>(p) & (bytes - 1))) {
    return fail_misaligned(pointer, bytes, write ? "writes" : "reads", pc);
  }
  Block& block = *fiber->block;
  if (++state.accesses > SPIN_LIMIT) return fail_spinning(pc);
  const size_t offset = p - block.shared, size = state.launch->shared_bytes;
  if (offset >= size || offset + bytes > size) return global_access(pointer, bytes, write, pc, kind);
  log_shared(*fiber, offset, bytes, pc);
  if (write) {
    shadow_write(block, fiber->agent, offset, bytes, pc, kind);
  } else {
    shadow_read(block, fiber->agent, offset, bytes, pc, kind);
  }
}

}  // namespace emulate

#define EMULATE_PC reinterpret_cast<uintptr_t>(__builtin_return_address(0))
#define EMULATE_ACCESS(BYTES)                                                                               \
  void __tsan_read##BYTES(void* p) { emulate::check_access(p, BYTES, false, true, EMULATE_PC); }            \
  void __tsan_write##BYTES(void* p) { emulate::check_access(p, BYTES, true, true, EMULATE_PC); }            \
  void __tsan_unaligned_read##BYTES(void* p) { emulate::check_access(p, BYTES, false, false, EMULATE_PC); } \
  void __tsan_unaligned_write##BYTES(void* p) { emulate::check_access(p, BYTES, true, false, EMULATE_PC); }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
EMULATE_ACCESS(1)
EMULATE_ACCESS(2)
EMULATE_ACCESS(4)
EMULATE_ACCESS(8)
EMULATE_ACCESS(16)
void __tsan_read_range(void* p, size_t bytes) { emulate::check_access(p, bytes, false, false, EMULATE_PC); }
void __tsan_write_range(void* p, size_t bytes) { emulate::check_access(p, bytes, true, false, EMULATE_PC); }

void emulate_load_bytes(void* to, const void* from, int bytes) {
  emulate::check_access(from, bytes, false, true, EMULATE_PC);
  memcpy(to, from, bytes);
}
void emulate_store_bytes(void* to, const void* from, int bytes) {
  emulate::check_access(to, bytes, true, true, EMULATE_PC);
  memcpy(to, from, bytes);
}
void* emulate_memcpy(void* to, const void* from, size_t bytes) {
  emulate::check_access(from, bytes, false, false, EMULATE_PC);
  emulate::check_access(to, bytes, true, false, EMULATE_PC);
  return memmove(to, from, bytes);
}
void* emulate_memset(void* to, int value, size_t bytes) {
  emulate::check_access(to, bytes, true, false, EMULATE_PC);
  return memset(to, value, bytes);
}
}

namespace emulate {

inline uintptr_t module_base() {
  static uintptr_t base = 0;
  static const void* of = nullptr;
  const void* call = reinterpret_cast<const void*>(state.launch->call);
  if (of != call) {
    Dl_info info;
    base = dladdr(call, &info) ? reinterpret_cast<uintptr_t>(info.dli_fbase) : 0;
    of = call;
  }
  return base;
}

// The instruction before the return address is the one that was called for.
inline uintptr_t module_offset(uintptr_t pc) { return pc - 1 - module_base(); }

inline bool in_module(const void* pointer) {
  Dl_info info;
  return dladdr(pointer, &info) && reinterpret_cast<uintptr_t>(info.dli_fbase) == module_base();
}

}  // namespace emulate
