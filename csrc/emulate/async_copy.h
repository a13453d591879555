// cp.async: nothing arrives before the thread waits for it, so a wait that is missing always shows.
#pragma once

#include "intercept.h"

namespace emulate {

inline void issue_copy(void* shared, const void* global, int bytes, bool valid, uintptr_t pc) {
  Fiber& me = *state.current;
  Block& block = *me.block;
  unsigned char* to = static_cast<unsigned char*>(shared);
  const size_t offset = to - block.shared;
  const uint32_t where = uint32_t(module_offset(pc));
  if (offset + bytes > state.launch->shared_bytes) {
    return fail("cp_async @%x to byte %ld of shared memory, which has %u", where, long(offset),
                state.launch->shared_bytes);
  }
  if (offset % bytes) return fail_misaligned(shared, bytes, "cp_async writes", pc);
  const unsigned char* from = static_cast<const unsigned char*>(global);
  if (valid) {
    if (reinterpret_cast<uintptr_t>(from) % bytes) return fail_misaligned(global, bytes, "cp_async reads", pc);
    global_access(from, bytes, false, pc);
  }
  log_shared(me, offset, bytes, pc);
  shadow_begin_landing(block, me.agent, offset, bytes, pc);
  memset(to, 0xff, bytes);
  me.copies.push_back(AsyncCopy{to, from, bytes, valid, pc});
}

inline void land(Fiber& me, const AsyncCopy& copy) {
  if (copy.valid) {
    memcpy(copy.shared, copy.global, copy.bytes);
  } else {
    memset(copy.shared, 0, copy.bytes);
  }
  Block& block = *me.block;
  shadow_land(block, me.agent.index, me.agent.now, copy.shared - block.shared, copy.bytes, copy.pc);
}

inline void wait_copies(int groups) {
  Fiber& me = *state.current;
  while (int(me.groups.size()) > groups) {
    for (const AsyncCopy& copy : me.groups.front()) land(me, copy);
    me.groups.pop_front();
  }
}

}  // namespace emulate

extern "C" {
void emulate_cp_async(void* shared, const void* global, int bytes, bool valid) {
  emulate::issue_copy(shared, global, bytes, valid, EMULATE_PC);
}
void emulate_cp_async_commit() {
  emulate::Fiber& me = *emulate::state.current;
  me.groups.push_back(std::move(me.copies));
  me.copies.clear();
}
void emulate_cp_async_wait(int groups) { emulate::wait_copies(groups); }
}
