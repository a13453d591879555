// Barriers of a block (__syncthreads and the named ones) and of a cluster.
#pragma once

#include "banks.h"
#include "state.h"

namespace emulate {

inline void finish_phase(Barrier& barrier) {
  Clock* clock = barrier.release.seal();
  for (Fiber* fiber : barrier.waiting) {
    acquire(fiber->agent, clock, true);
    fiber->status = Status::READY;
  }
  clocks.drop(clock);
  barrier.waiting.clear();
  barrier.last_count = barrier.count;
  barrier.arrived = barrier.count = 0;
  state.report.barriers++;
}

// Arrives, and waits for the phase's end if `wait`.
inline void arrive(Barrier& barrier, const char* what, int expected, bool wait, uintptr_t pc) {
  Fiber& me = *state.current;
  if (barrier.arrived == 0) barrier.expected = expected;
  if (barrier.expected != expected) {
    return fail("%s @%lx for %d threads, where others have come for %d", what, (unsigned long)module_offset(pc),
                expected, barrier.expected);
  }
  barrier.release.arrive(me.agent);
  barrier.arrived++;
  if (wait) {
    me.wait = Wait{what, pc, 0, nullptr, nullptr, nullptr, nullptr};
    me.status = Status::BARRIER;
    barrier.waiting.push_back(&me);
  }
  if (barrier.arrived == barrier.expected) finish_phase(barrier);
  if (me.status != Status::READY) yield_fiber();
}

inline void check_all_live(const char* what, uintptr_t pc) {
  const Fiber& me = *state.current;
  if (me.block->live < state.threads()) {
    fail("%s @%lx, but %d of the block's %d threads have left the kernel", what, (unsigned long)module_offset(pc),
         state.threads() - me.block->live, state.threads());
  }
}

inline int sync_block(int line, bool predicate, uintptr_t pc) {
  Block& block = *state.current->block;
  Barrier& barrier = block.barriers[0];
  check_all_live("__syncthreads", pc);
  if (barrier.arrived == 0) barrier.line = line;
  if (barrier.line != line) {
    fail("__syncthreads at line %d, where other threads wait at the one of line %d: the threads have diverged", line,
         barrier.line);
  }
  barrier.count += predicate;
  arrive(barrier, "__syncthreads", state.threads(), true, pc);
  return barrier.last_count;
}

inline void named_barrier(int id, int threads, bool wait, uintptr_t pc) {
  const char* what = wait ? "named_barrier_sync" : "named_barrier_arrive";
  if (id < 0 || id >= BARRIERS) return fail("%s of id %d; there are 0 to %d", what, id, BARRIERS - 1);
  if (threads <= 0 || threads % LANES || threads > state.threads()) {
    return fail("%s for %d threads: whole warps of the block's %d threads, please", what, threads, state.threads());
  }
  arrive(state.current->block->barriers[id], what, threads, wait, pc);
}

}  // namespace emulate

extern "C" {
int emulate_syncthreads(int line, int predicate) { return emulate::sync_block(line, predicate != 0, EMULATE_PC); }

void emulate_named_barrier(int id, int threads, bool wait) { emulate::named_barrier(id, threads, wait, EMULATE_PC); }

void emulate_fence() { emulate::state.current->fenced = true; }
}
