// mbarriers: phases that end after so many arrivals and so many bytes, and hand on what those who arrived knew.
#pragma once

#include "hopper_state.h"
#include "intercept.h"

namespace emulate {

inline Mbarrier* find_barrier(const char* what, const void* address, uintptr_t pc) {
  Block& block = *state.current->block;
  const size_t offset = static_cast<const unsigned char*>(address) - block.shared;
  std::map<size_t, Mbarrier>& barriers = hopper_block(block).barriers;
  const auto found = barriers.find(offset);
  if (found == barriers.end()) {
    fail("%s @%lx at byte %ld of shared memory (%u bytes), where no mbarrier_init was", what,
         (unsigned long)module_offset(pc), long(offset), state.launch->shared_bytes);
    return nullptr;
  }
  const Access& write = block.cells[offset].write;
  if (write.time != found->second.init.time || write.agent != found->second.init.agent) {
    fail("%s @%lx at byte %zu of shared memory: the mbarrier there was overwritten @%x", what,
         (unsigned long)module_offset(pc), offset, write.pc);
    return nullptr;
  }
  shadow_read(block, state.current->agent, offset, 8, pc, ATOMIC);
  return &found->second;
}

inline void init_barrier(void* address, int count, uintptr_t pc) {
  Fiber& me = *state.current;
  Block& block = *me.block;
  std::map<size_t, Mbarrier>& barriers = hopper_block(block).barriers;
  const size_t offset = static_cast<unsigned char*>(address) - block.shared;
  if (offset % 8 || offset + 8 > state.launch->shared_bytes) {
    return fail("mbarrier_init at byte %ld of shared memory, which has %u: 8 bytes, aligned to 8", long(offset),
                state.launch->shared_bytes);
  }
  if (count < 1 || count >= 1 << 20) return fail("mbarrier_init of %d arrivals; 1 to 2^20 - 1 are possible", count);
  const int slot = barriers.count(offset) ? barriers[offset].slot : int(barriers.size());
  if (slot == BARRIER_SLOTS) return fail("more than %d mbarriers in a block, the emulator's limit", BARRIER_SLOTS);
  shadow_write(block, me.agent, offset, 8, pc);
  Mbarrier barrier;
  barrier.count = barrier.pending = count;
  barrier.slot = slot, barrier.initialiser = me.agent.index;
  barrier.init = block.cells[offset].write;
  barriers[offset] = barrier;
}

inline void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.last = hold(barrier.release.seal());
  barrier.phase++;
  barrier.pending = barrier.count;
  state.report.barriers++;
}

inline void arrive_at(Mbarrier& barrier, int bytes, uintptr_t pc) {
  if (bytes < 0 || bytes >= 1 << 20) return fail("mbarrier_arrive_expect of %d bytes; 0 to 2^20 - 1 fit", bytes);
  if (barrier.pending == 0) {
    return fail("mbarrier_arrive @%lx: the phase already has its %d arrivals, and waits for %ld bytes",
                (unsigned long)module_offset(pc), barrier.count, long(barrier.bytes));
  }
  barrier.bytes += bytes;
  barrier.pending--;
  barrier.release.arrive(state.current->agent);
  end_phase_if_complete(barrier);
}

// What TMA brought is there: `known` is what the copy's issuer knew.
inline void complete_bytes(Block& block, Mbarrier& barrier, size_t offset, int64_t bytes, const Clock& known) {
  if (barrier.bytes < bytes) {
    return fail(
        "a TMA load brings %ld bytes to the mbarrier at byte %zu of shared memory, which expects %ld more in its "
        "phase: mbarrier_arrive_expect must name all bytes, before the copies are issued",
        long(bytes), offset, long(barrier.bytes));
  }
  const int agent = barrier_agent(block, barrier.slot);
  barrier.release.complete(agent, hopper.times[agent], &known);
  barrier.bytes -= bytes;
  end_phase_if_complete(barrier);
}

struct BarrierWait {
  const Mbarrier* barrier;
  uint32_t parity;
};

inline bool phase_ended(void* argument) {
  const BarrierWait& wait = *static_cast<BarrierWait*>(argument);
  return (wait.barrier->phase & 1) != wait.parity;
}

inline void wait_barrier(Mbarrier& barrier, int parity, uintptr_t pc) {
  if (parity != 0 && parity != 1) return fail("mbarrier_wait for parity %d; there are 0 and 1", parity);
  BarrierWait wait{&barrier, uint32_t(parity)};
  wait_until("mbarrier_wait (arrivals or bytes are missing, or the parity is wrong)", pc, phase_ended, &wait);
  barrier.waited = barrier.phase;
  if (barrier.last) acquire(state.current->agent, barrier.last.get(), false);
}

// A block that has ended must have waited for all that TMA brings: its shared memory is another block's by then.
inline void check_loads_waited(const Block& block) {
  for (const auto& [offset, barrier] : hopper_block(block).barriers) {
    if (barrier.loaded > barrier.waited) {
      return fail(
          "leaves the kernel as the block's last thread, and nobody has waited for what TMA loads under the "
          "mbarrier at byte %zu of shared memory",
          offset);
    }
  }
}

// The thread's stores, and all stores that it knows of, become visible to the async proxy.
inline void flush_stores() {
  Agent& me = state.current->agent;
  Clock* next = clocks.make();
  merge(next, me.base);
  for (int i = 0; i < cluster_threads(); i++) {
    next->at[flush_agent(i)] = std::max(next->at[flush_agent(i)], next->at[i]);
  }
  next->at[flush_agent(me.index)] = me.now++;
  clocks.drop(me.base);
  me.base = next;
}

}  // namespace emulate

extern "C" {
void emulate_mbarrier_init(void* barrier, int count) { emulate::init_barrier(barrier, count, EMULATE_PC); }

void emulate_mbarrier_arrive(void* barrier, int bytes) {
  const uintptr_t pc = EMULATE_PC;
  if (auto* found = emulate::find_barrier("mbarrier_arrive", barrier, pc)) emulate::arrive_at(*found, bytes, pc);
}

void emulate_mbarrier_wait(void* barrier, int parity) {
  const uintptr_t pc = EMULATE_PC;
  if (auto* found = emulate::find_barrier("mbarrier_wait", barrier, pc)) emulate::wait_barrier(*found, parity, pc);
}

void emulate_fence_mbarrier_init() {
  using namespace emulate;
  const Fiber& me = *state.current;
  for (auto& [offset, barrier] : hopper_block(*me.block).barriers)
    barrier.fenced |= barrier.initialiser == me.agent.index;
}

void emulate_fence_async_shared() { emulate::flush_stores(); }
}
