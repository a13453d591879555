// What Hopper's instructions add to the state of a cluster, and the async proxy: TMA and wgmma see shared memory by a
// way of their own, on which ordinary stores of threads are visible only after fence_async_shared().
//
// In a cluster of n threads the agents of vector clocks (clock.h) are
//   0 ...   threads;
//   n ...   what each thread's TMA stores read;
//   2n ...  flushes: thread t's stores up to this time are visible to the async proxy for those who know this entry;
//   3n ...  what each warp group's products read;
//   then    what TMA wrote under each mbarrier.
#pragma once

#include <deque>
#include <map>
#include <memory>

#include "shadow.h"
#include "state.h"

namespace emulate {

constexpr int GROUP_WARPS = 4;
constexpr int GROUP_THREADS = 128;
constexpr int BARRIER_SLOTS = 64;  // mbarriers of a block

inline int groups_of(int threads) { return (threads + GROUP_THREADS - 1) / GROUP_THREADS; }

inline int agent_count(int threads, int blocks) { return blocks * (3 * threads + groups_of(threads) + BARRIER_SLOTS); }

inline int cluster_threads() { return int(state.fibers.size()); }
inline int store_agent(int thread) { return cluster_threads() + thread; }
inline int flush_agent(int thread) { return 2 * cluster_threads() + thread; }
inline int group_agent(const Block& block, int group) {
  return 3 * cluster_threads() + block.rank * groups_of(state.threads()) + group;
}
inline int barrier_agent(const Block& block, int slot) {
  return 3 * cluster_threads() + state.cluster_size * groups_of(state.threads()) + block.rank * BARRIER_SLOTS + slot;
}

inline void describe_access(char* text, size_t size, const char* kind, int agent) {
  const int n = cluster_threads(), threads = state.threads(), groups = state.cluster_size * groups_of(threads);
  const int thread = agent % n, other = agent - 3 * n;
  if (agent < n) {
    snprintf(text, size, "%s of thread %d of block rank %d", kind, thread % threads, thread / threads);
  } else if (agent < 3 * n) {
    snprintf(text, size, "%s by a TMA store of thread %d of block rank %d", kind, thread % threads, thread / threads);
  } else if (other < groups) {
    snprintf(text, size, "%s by a wgmma of warp group %d of block rank %d, which must be waited for", kind,
             other % groups_of(threads), other / groups_of(threads));
  } else {
    snprintf(text, size, "%s by a TMA load, whose mbarrier must be waited for", kind);
  }
}

// A clock of one's own, for as long as something needs it.
using SharedClock = std::shared_ptr<Clock>;
inline SharedClock hold(Clock* clock) {
  return SharedClock(clock, [](Clock* one) { clocks.drop(one); });
}

// All that `agent` knows and has done.
inline SharedClock knowledge(Agent& agent) {
  Clock* clock = clocks.make();
  merge(clock, agent.base);
  clock->at[agent.index] = agent.now++;
  return hold(clock);
}

// `agent` learns that `other` is done up to `time`.
inline void learn(Agent& agent, int other, uint32_t time) {
  Clock* next = clocks.make();
  merge(next, agent.base);
  next->at[other] = std::max(next->at[other], time);
  clocks.drop(agent.base);
  agent.base = next;
}

struct Mbarrier {
  int count = 0;                    // arrivals of a phase
  int pending = 0;                  // that this phase still needs,
  int64_t bytes = 0;                // and what TMA is still to bring
  uint32_t phase = 0;               // phases that have ended,
  uint32_t loaded = 0, waited = 0;  // to the last that TMA brought something for, and that was waited for
  int slot = 0, initialiser = 0;
  bool fenced = false;  // by fence_mbarrier_init
  Access init;          // the store that must still be the last one there
  Release release;
  SharedClock last;  // of the phase that ended last
};

// TMA stores that a thread has committed together.
struct StoreGroup {
  uint32_t time = 0;  // of its last store
  int reading = 0, writing = 0;
};

// An accumulator of a thread, where it stands on the thread's stack.
struct Accumulator {
  const unsigned char* begin;
  size_t bytes;
  uint32_t product;  // the last one that adds to it
  bool pending, touched;
};

struct HopperThread {
  std::shared_ptr<StoreGroup> open;
  std::deque<std::shared_ptr<StoreGroup>> groups;  // oldest first
  uint32_t stores = 0;                             // the time of its newest one
  bool fenced = false;                             // has called wgmma_fence
  std::vector<Accumulator> accumulators;
};

struct Product {
  char type = 0;
  int n = 0;
  uint64_t a = 0, b = 0;
  bool registers = false, accumulate = false, transpose_a = false, transpose_b = false;
  uintptr_t pc = 0;
  int warps = 0;  // that have come
  uint32_t a_registers[GROUP_THREADS][4];
  float* d[GROUP_THREADS];
  SharedClock known[GROUP_WARPS];
};

struct WarpGroup {
  std::deque<Product> products;               // from number `done` on
  uint32_t done = 0;                          // products computed
  uint32_t issued[GROUP_WARPS] = {};          // by each warp
  std::deque<uint32_t> commits[GROUP_WARPS];  // products issued at each commit that is not waited for
  uint32_t waited[GROUP_WARPS] = {};
  uint32_t earlier = 0;  // time of this agent when the cluster began
};

struct HopperBlock {
  std::map<size_t, Mbarrier> barriers;  // by offset
  std::vector<WarpGroup> groups;
  std::vector<int> limits;  // registers of a thread, by warp; 0 where setmaxnreg was not called
};

struct Hopper {
  std::vector<HopperThread> threads;
  std::vector<HopperBlock> blocks;
  std::vector<uint32_t> times;  // the newest time of every agent from n on
};

inline Hopper hopper;

inline HopperThread& hopper_thread(const Fiber& fiber) { return hopper.threads[fiber.agent.index]; }
inline HopperBlock& hopper_block(const Block& block) { return hopper.blocks[block.rank]; }

// Before the first cluster of a launch.
inline void hopper_allocate() {
  hopper.threads.clear(), hopper.blocks.clear();
  hopper.times.assign(agent_count(state.threads(), state.cluster_size), 0);
}

// A new cluster starts with `start`, which knows all that earlier ones did.
inline void hopper_begin(Clock* start) {
  const int n = cluster_threads();
  for (int i = 0; i < n; i++) start->at[flush_agent(i)] = start->at[i];
  for (size_t i = 0; i < start->at.size(); i++) {
    if (int(i) >= n && !(int(i) >= 2 * n && int(i) < 3 * n)) start->at[i] = hopper.times[i];
  }
  for (HopperBlock& block : hopper.blocks) {
    for (auto& [offset, barrier] : block.barriers) clocks.drop(barrier.release.seal());
  }
  hopper.threads.assign(n, HopperThread{});
  for (int i = 0; i < n; i++) hopper.threads[i].stores = hopper.times[store_agent(i)];
  hopper.blocks.assign(state.cluster_size, HopperBlock{});
  for (int rank = 0; rank < state.cluster_size; rank++) {
    HopperBlock& block = hopper.blocks[rank];
    block.groups.resize(groups_of(state.threads()));
    for (size_t i = 0; i < block.groups.size(); i++) {
      block.groups[i].earlier = hopper.times[group_agent(state.blocks[rank], int(i))];
    }
    block.limits.assign((state.threads() + LANES - 1) / LANES, 0);
  }
}

// ---- checks of accesses by the async proxy, whose issuer knows `known`

inline void fail_proxy(const char* what, size_t offset, const Access& write, uintptr_t pc) {
  fail(
      "%s @%lx touches byte %zu of shared memory, which thread %d wrote by an ordinary store @%x: between them, "
      "fence_async_shared() must follow the store",
      what, (unsigned long)module_offset(pc), offset, write.agent % state.threads(), write.pc);
}

// False, and failed, if the last write there is not ordered before, or not visible.
inline bool check_visible(const char* what, const Clock& known, const Access& write, size_t offset, uintptr_t pc) {
  if (known.at[write.agent] < write.time) {
    fail_race(what, module_offset(pc), offset, "write", write);
    return false;
  }
  if (write.agent < cluster_threads() && known.at[flush_agent(write.agent)] < write.time) {
    fail_proxy(what, offset, write, pc);
    return false;
  }
  return true;
}

inline bool check_async_read(const char* what, Block& block, const Clock& known, size_t offset, size_t bytes,
                             uintptr_t pc) {
  Access checked;  // neighbours were mostly written together
  for (size_t i = offset; i < offset + bytes; i++) {
    const uint8_t flags = block.flags[i];
    if (!(flags & INITIALISED) || flags & LANDING) {
      fail("%s @%lx reads byte %zu of shared memory, %s", what, (unsigned long)module_offset(pc), i,
           flags & LANDING ? "which an asynchronous copy is still to write: wait for its mbarrier first"
                           : "which nothing has written");
      return false;
    }
    const Access& write = block.cells[i].write;
    if (write.time == checked.time && write.agent == checked.agent) continue;
    if (!check_visible(what, known, write, i, pc)) return false;
    checked = write;
  }
  return true;
}

// The bytes are being read until end_async_read: an access of `agent` at `time`.
inline void begin_async_read(Block& block, const Clock& known, int agent, uint32_t time, size_t offset, size_t bytes,
                             uintptr_t pc) {
  const uint32_t where = uint32_t(module_offset(pc));
  for (size_t i = offset; i < offset + bytes; i++) {
    Cell& cell = block.cells[i];
    Access* slot = nullptr;
    for (Access& read : cell.reads) {
      if (known.at[read.agent] >= read.time || (read.agent == agent && read.time <= time)) slot = &read;
    }
    if (!slot) slot = &cell.reads[state.random.below(READERS)];
    *slot = Access{time, uint16_t(agent), PLAIN, where};
    if (block.flags[i] >= 256 - LEAVING) return fail("byte %zu is read by more products at once than are counted", i);
    block.flags[i] += LEAVING;
  }
}

inline void end_async_read(Block& block, size_t offset, size_t bytes) { shadow_end_leaving(block, offset, bytes); }

// The bytes are nobody's until end_async_write.
inline void begin_async_write(const char* what, Block& block, const Clock& known, size_t offset, size_t bytes,
                              uintptr_t pc) {
  for (const auto& [at, barrier] : hopper_block(block).barriers) {
    if (at + 8 > offset && at < offset + bytes) {
      return fail("%s @%lx of bytes %zu to %zu of shared memory, over the mbarrier at byte %zu", what,
                  (unsigned long)module_offset(pc), offset, offset + bytes, at);
    }
  }
  for (size_t i = offset; i < offset + bytes; i++) {
    const Cell& cell = block.cells[i];
    if (block.flags[i] >= LANDING) {
      return fail("%s @%lx writes byte %zu of shared memory, which an asynchronous copy or product under way %s", what,
                  (unsigned long)module_offset(pc), i, block.flags[i] & LANDING ? "writes too" : "still reads");
    }
    if (!check_visible(what, known, cell.write, i, pc)) return;
    for (const Access& read : cell.reads) {
      if (known.at[read.agent] < read.time) return fail_race(what, module_offset(pc), i, "read", read);
    }
    block.flags[i] |= LANDING;
  }
  memset(block.shared + offset, 0xff, bytes);
}

}  // namespace emulate
